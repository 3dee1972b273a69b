"""Give a freshly built network the structure that a card's edits record; weights do not matter.

The steps of `shrink` make the edits, and `load_model` applies them behind the replacements.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pbkd.blocks import build_candidate
from pbkd.blocks.factors import pair_factors
from pbkd.config import Edit, Factorized, LowRankConfig
from pbkd.devices import channels_last
from pbkd.errors import ArtifactError, CandidateError

Sizes = tuple[int, ...]


def apply_edits(net: nn.Module, edits: Sequence[Edit]) -> None:
    """Change the structure of a network, in place, edit by edit; what changes has fresh weights.

    Raises:
        ArtifactError: the network has no such layer, or one that the edit does not fit.
    """
    for edit in edits:
        if isinstance(edit, Factorized):
            for path, config in edit.layers.items():
                net.set_submodule(path, factorized(config, _at(net, path), path))
        else:
            for path, sizes in edit.layers.items():
                _resize(net, path, sizes)
    if edits:
        channels_last(net)


def factorized(config: LowRankConfig, layer: nn.Module, path: str) -> nn.Module:
    """The factors that stand for a convolution or linear layer, with fresh weights.

    In its mode, on its device, and trained if it is.

    Raises:
        ArtifactError: it is neither, or the config does not fit it.
    """
    try:
        if isinstance(layer, nn.Linear):
            factors: nn.Module = LinearPair(layer, _rank(config, layer))
        elif isinstance(layer, nn.Conv2d):
            factors = build_candidate(config, layer)
        else:
            raise CandidateError(
                f"is {type(layer).__name__}, expected nn.Conv2d or nn.Linear to factorize"
            )
    except CandidateError as error:
        raise ArtifactError(
            f"edit of {path}: {error}; the card belongs to another network"
        ) from error
    factors.requires_grad_(layer.weight.requires_grad)
    return factors.to(layer.weight.device).train(layer.training)


def _rank(config: LowRankConfig, layer: nn.Linear) -> int:
    """The rank that the config gives a linear layer, if the factors are smaller."""
    if config.energy is not None:
        if len(config.ranks) != 1 or len(config.ranks[0]) != 1:
            raise CandidateError(f"has one rank, `ranks` are {config.ranks}")
        rank = config.ranks[0][0]
    else:
        assert config.ratio is not None
        each = layer.in_features + layer.out_features
        rank = max(1, math.floor(config.ratio * layer.weight.numel() / each))
    if rank * (layer.in_features + layer.out_features) >= layer.weight.numel():
        raise CandidateError("at such a rank its factors have as many weights as the layer")
    return rank


class LinearPair(nn.Sequential):
    """A linear layer as two, with fewer features between; exact at full rank."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__(
            OrderedDict(
                reduce=nn.Linear(layer.in_features, rank, bias=False),
                expand=nn.Linear(rank, layer.out_features, bias=layer.bias is not None),
            )
        )
        self.rank = rank

    def inherit(self, layer: nn.Linear) -> None:
        """Take over the truncated singular value decomposition of a linear layer."""
        first, last = pair_factors(layer.weight[:, :, None, None], 1, self.rank)
        expand = cast(nn.Linear, self.expand)
        with torch.no_grad():
            cast(nn.Linear, self.reduce).weight.copy_(first.flatten(1))
            expand.weight.copy_(last.flatten(1))
            if layer.bias is not None:
                expand.bias.copy_(layer.bias)


# ---------------------------------------------------------------- sizes

_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("out_channels", "in_channels", "groups"),
    nn.Linear: ("out_features", "in_features"),
    _NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels",),
    nn.PReLU: ("num_parameters",),
}
"""The attributes of a layer that hold its sizes."""


def sizes_of(net: nn.Module) -> dict[str, Sizes]:
    """By path, what ``Resized`` says of each layer, whether it was resized or not.

    Of a parameter that belongs to no layer that can be resized, its shape.
    """
    found: dict[str, Sizes] = {}
    for path, module in net.named_modules():
        sizes = _sizes(module)
        if sizes is not None:
            found[path] = sizes
            continue
        for name, parameter in module.named_parameters(recurse=False):
            found[f"{path}.{name}".removeprefix(".")] = tuple(parameter.shape)
    return found


def _sizes(module: nn.Module) -> Sizes | None:
    """None: no layer that can be resized."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape
    for kind, names in _SIZES.items():
        if isinstance(module, kind):
            return tuple(getattr(module, name) for name in names)
    return None


def _resize(net: nn.Module, path: str, sizes: Sizes) -> None:
    """Make a layer, or a parameter of no layer, smaller."""
    owner, _, name = path.rpartition(".")
    parameter = _at(net, owner)._parameters.get(name)
    old = _sizes(_at(net, path)) if parameter is None else tuple(parameter.shape)
    if old is None:
        raise ArtifactError(
            f"edit of {path}: {type(_at(net, path)).__name__} has no channels to take out, "
            "expected a convolution, a linear layer or a norm; the card belongs to another network"
        )
    if len(sizes) != len(old) or any(new > size for new, size in zip(sizes, old, strict=True)):
        raise ArtifactError(
            f"edit of {path}: got sizes {sizes}, expected {len(old)} of at most {old}; the card "
            "belongs to another network"
        )
    if parameter is not None:
        setattr(_at(net, owner), name, _smaller(parameter, sizes))
    else:
        _resize_layer(_at(net, path), sizes, path)


def _resize_layer(layer: nn.Module, sizes: Sizes, path: str) -> None:
    """Set a layer's sizes; its weights are those of PyTorch's constructors."""
    channels, shape = sizes[0], sizes
    groups = 1
    if isinstance(layer, nn.Conv2d):
        groups = sizes[2]
        shape = (channels, sizes[1] // groups, *layer.kernel_size)
    elif isinstance(layer, nn.GroupNorm):
        groups = layer.num_groups
    if any(size % groups for size in sizes):
        raise ArtifactError(
            f"edit of {path}: got sizes {sizes}, expected channels that {groups} groups divide; "
            "the card belongs to another network"
        )
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = sizes
    else:
        names = next(names for kind, names in _SIZES.items() if isinstance(layer, kind))
        for name, size in zip(names, sizes, strict=True):
            setattr(layer, name, size)
    for name, parameter in list(layer.named_parameters(recurse=False)):
        is_bias = name == "bias" and isinstance(layer, nn.Conv2d | nn.Linear)
        setattr(layer, name, _smaller(parameter, (channels,) if is_bias else shape))
    for name, buffer in list(layer.named_buffers(recurse=False)):
        if buffer.dim():  # the count of batches has none
            setattr(layer, name, buffer.new_empty(shape))
    layer.reset_parameters()  # type: ignore[operator]


def _smaller(parameter: nn.Parameter, shape: Sizes) -> nn.Parameter:
    values: Tensor = parameter.detach().new_ones(shape)
    return nn.Parameter(values, parameter.requires_grad)


def _at(net: nn.Module, path: str) -> nn.Module:
    try:
        return net.get_submodule(path)
    except AttributeError:
        raise ArtifactError(
            f"edit of {path}: {type(net).__name__} has no such layer; the card belongs to another "
            "network"
        ) from None
