"""Cheaper modules for a block, by kind.

A kind is a function ``build(config, block) -> nn.Module`` that gives a module with the block's
shapes. ``build_candidate`` chooses it; ``init_candidate`` gives the weights with which training
starts.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from pbkd.blocks.inherit import neutral_batch_norms, pass_through, rank_one_factors
from pbkd.blocks.swap import swap
from pbkd.config import CandidateConfig, SeparableConfig
from pbkd.devices import channels_last
from pbkd.errors import CandidateError
from pbkd.measure import eval_mode


def candidate_name(config: CandidateConfig) -> str:
    """A readable name, also of a folder: the kind and the settings that are not the default."""
    settings = config.model_dump(exclude_defaults=True, exclude={"kind"})
    # a dot, because MLflow's metric names allow few other characters
    parts = [f"{name}.{value}".lower() for name, value in settings.items()]
    return "-".join([config.kind, *parts])


def build_candidate(config: CandidateConfig, block: nn.Module) -> nn.Module:
    """The candidate's structure for a block, with the constructors' random weights.

    A convolution becomes the kind's module; of any other block, a copy is made in which every
    k x k convolution (k > 1) is replaced, so that skips and norms stay as the teacher has them.

    Raises:
        CandidateError: the block holds nothing that the kind can replace.
    """
    if isinstance(block, nn.Conv2d):
        return channels_last(Separable(config, block))
    paths = replaceable_convs(block)
    if not paths:
        raise CandidateError("holds no dense k x k convolution, k > 1")
    whole = copy.deepcopy(block)
    swap(whole, {path: Separable(config, _conv(whole, path)) for path in paths})
    return channels_last(whole)


def init_candidate(
    config: CandidateConfig, candidate: nn.Module, block: nn.Module, x_nchw: Tensor
) -> None:
    """Give a built candidate the weights with which it starts, in place.

    Args:
        x_nchw: some inputs of the block; they set the batch norms of inherited candidates.
    """
    if config.init == "random":
        return
    if isinstance(block, nn.Conv2d):
        assert isinstance(candidate, Separable)
        candidate.inherit(block)
        new_parts = [candidate]
    else:
        paths = replaceable_convs(block)
        new_parts = []
        for path in paths:
            part = candidate.get_submodule(path)
            assert isinstance(part, Separable)
            part.inherit(_conv(block, path))
            new_parts.append(part)
    if config.batch_norm:
        for part, inputs in zip(new_parts, _inputs_of(candidate, new_parts, x_nchw), strict=True):
            neutral_batch_norms(part, inputs)


def replaceable_convs(module: nn.Module) -> list[str]:
    """Paths, below a module, of the convolutions that ``separable`` can stand in for."""
    return [
        path
        for path, child in module.named_modules()
        if isinstance(child, nn.Conv2d)
        and max(child.kernel_size) > 1
        and child.groups < child.in_channels  # a depthwise one is separable already
    ]


class Separable(nn.Sequential):
    """Depthwise and pointwise convolutions with the stride, padding, dilation, groups, bias of one.

    With ``depth: 2`` a channel-keeping separable convolution and a ReLU come first, as in Blakeney
    et al., arXiv 2012.03096.
    """

    def __init__(self, config: SeparableConfig, conv: nn.Conv2d) -> None:
        layers: list[tuple[str, nn.Module]] = []
        if config.depth == 2:
            layers += [
                *_pair(config, conv, "0", keeps_shape=True),
                ("relu", nn.ReLU()),
            ]
        layers += _pair(config, conv, str(config.depth - 1), keeps_shape=False)
        super().__init__(OrderedDict(layers))
        self.depth = config.depth

    def inherit(self, conv: nn.Conv2d) -> None:
        """Take over a convolution: its rank-1 factors, behind an identity where depth is 2."""
        last = str(self.depth - 1)
        with torch.no_grad():
            depthwise, pointwise = rank_one_factors(conv.weight, conv.groups)
            self._conv(f"depthwise{last}").weight.copy_(depthwise)
            final = self._conv(f"pointwise{last}")
            final.weight.copy_(pointwise)
            if conv.bias is not None and final.bias is not None:
                final.bias.copy_(conv.bias)
        if self.depth == 2:
            pass_through(self._conv("depthwise0"), self._conv("pointwise0"))

    def _conv(self, name: str) -> nn.Conv2d:
        return _conv(self, name)


def _pair(
    config: SeparableConfig, conv: nn.Conv2d, suffix: str, *, keeps_shape: bool
) -> list[tuple[str, nn.Module]]:
    channels = conv.in_channels
    depthwise = nn.Conv2d(
        channels,
        channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=1 if keeps_shape else conv.stride,  # type: ignore[arg-type]
        padding="same" if keeps_shape else conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=channels,
        bias=False,
        padding_mode=conv.padding_mode,
    )
    pointwise = nn.Conv2d(
        channels,
        channels if keeps_shape else conv.out_channels,
        1,
        groups=conv.groups,
        bias=not keeps_shape and conv.bias is not None,
    )
    layers: list[tuple[str, nn.Module]] = [("depthwise" + suffix, depthwise)]
    if config.batch_norm:
        layers.append(("norm" + suffix, nn.BatchNorm2d(channels)))
    return [*layers, ("pointwise" + suffix, pointwise)]


def _conv(module: nn.Module, path: str) -> nn.Conv2d:
    conv = module.get_submodule(path)
    assert isinstance(conv, nn.Conv2d)
    return conv


def _inputs_of(whole: nn.Module, parts: list[Separable], x_nchw: Tensor) -> list[Tensor]:
    """What each part gets when the whole runs; the parts are called in the order of the list."""
    if whole is parts[0]:
        return [x_nchw]
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [
        part.register_forward_pre_hook(lambda part, args: inputs.update({part: args[0].clone()}))
        for part in parts
    ]
    try:
        with torch.no_grad(), eval_mode(whole):
            whole(x_nchw.clone())  # it may begin with an in-place operation
    finally:
        for hook in hooks:
            hook.remove()
    return [inputs[part] for part in parts]
