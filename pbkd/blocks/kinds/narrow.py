"""`narrow`: the same structure with fewer inner channels.

Which channels are inner is settled by ``pbkd.blocks.inner`` and verified: with the channels that
go masked, the block has to give what the narrowed one gives. Importance of a channel is what it
contributes to the convolutions that take it: the root mean square of its activations times the norm
of their kernels for it (Sun et al., arXiv 2306.11695, equation 1, summed up over the kernel). That
holds whatever stands between; the norm of the kernel that makes the channel would be scaled away by
a batch norm, and the batch norm's scale says nothing where there is none.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pbkd.blocks.inner import find_inner, random_inputs, randomised
from pbkd.blocks.kinds.convs import conv_at, conv_like, inputs_of
from pbkd.blocks.kinds.kind import Kind
from pbkd.blocks.swap import swap
from pbkd.config import NarrowConfig
from pbkd.config.candidates import InnerChannels
from pbkd.errors import CandidateError
from pbkd.measure import eval_mode

_Kept = list[tuple[InnerChannels, Tensor]]


def build(config: NarrowConfig, block: nn.Module) -> nn.Module:
    """See ``Kind.build``."""
    if not config.inner:
        raise CandidateError(
            "its inner channels are not settled; take configs as pbkd.blocks.find_blocks gives them"
        )
    sizes = [(inner, _num_kept(config, block, inner)) for inner in config.inner]
    return _narrowed(block, [(inner, torch.arange(kept)) for inner, kept in sizes])


def init(config: NarrowConfig, candidate: nn.Module, block: nn.Module, x_nchw: Tensor) -> None:
    """See ``Kind.init``; the inputs tell which channels matter."""
    kept: _Kept = []
    for inner in config.inner:
        order = _importance(block, inner, x_nchw).argsort(descending=True, stable=True)
        kept.append((inner, order[: _num_kept(config, block, inner)].sort().values))
    _copy_kept(candidate, block, kept)


def settle(config: NarrowConfig, block: nn.Module, x_nchw: Tensor) -> NarrowConfig:
    """See ``Kind.settle``: the inner channels, each group tried by itself."""
    if isinstance(block, nn.Conv2d):
        raise CandidateError(
            "is a single convolution, without inner channels; `narrow` is for blocks of several "
            "(`select: residual` or `paths`)"
        )
    if x_nchw.dim() != 4:
        raise CandidateError(
            f"{type(block).__name__} takes tensors of shape {tuple(x_nchw.shape)}; `narrow` is for "
            "blocks that take (N, C, H, W)"
        )
    found = find_inner(block, x_nchw)
    verified = tuple(inner for inner in found if _holds(config, block, inner, x_nchw))
    if not verified:
        raise CandidateError(
            f"{type(block).__name__} has no inner channels: what its convolutions give leaves it, "
            "is mixed, or meets its input"
        )
    return config.model_copy(update={"inner": verified})


KIND = Kind(build, init, settle)


def _num_kept(config: NarrowConfig, block: nn.Module, inner: InnerChannels) -> int:
    return max(1, round(config.ratio * conv_at(block, inner.producers[0]).out_channels))


def _importance(block: nn.Module, inner: InnerChannels, x_nchw: Tensor) -> Tensor:
    """Of each channel: (C,), squared."""
    consumers = [conv_at(block, path) for path in inner.consumers]
    total = torch.zeros(consumers[0].in_channels, dtype=torch.float64, device=x_nchw.device)
    for path, conv in zip(inner.consumers, consumers, strict=True):
        (inputs,) = inputs_of(block, [conv_at(block, path)], x_nchw)
        mean_square = inputs.double().square().mean((0, 2, 3))
        total += mean_square * conv.weight.detach().double().square().sum((0, 2, 3))
    return total


def _narrowed(block: nn.Module, kept: _Kept) -> nn.Module:
    """A copy with fewer channels, and random weights where they changed."""
    whole = copy.deepcopy(block)
    outputs = {path: len(index) for inner, index in kept for path in inner.producers}
    inputs = {path: len(index) for inner, index in kept for path in inner.consumers}
    between = {path: len(index) for inner, index in kept for path in inner.between}
    replaced: dict[str, nn.Module] = {}
    for path, module in block.named_modules():
        if path in outputs or path in inputs:
            assert isinstance(module, nn.Conv2d)
            num_in = inputs.get(path, module.in_channels)
            num_out = outputs.get(path, module.out_channels)
            replaced[path] = conv_like(
                module, num_in, num_out, groups=1, bias=module.bias is not None
            )
        elif path in between and isinstance(module, nn.Conv2d):
            num = between[path]
            replaced[path] = conv_like(module, num, num, groups=num, bias=module.bias is not None)
        elif path in between:
            assert isinstance(module, nn.BatchNorm2d)
            replaced[path] = nn.BatchNorm2d(
                between[path],
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
            )
    swap(whole, replaced)
    return whole


def _copy_kept(candidate: nn.Module, block: nn.Module, kept: _Kept) -> None:
    """Take over the slices of the kept channels."""
    outputs = {path: index for inner, index in kept for path in (*inner.producers, *inner.between)}
    inputs = {path: index for inner, index in kept for path in inner.consumers}
    for path in outputs.keys() | inputs.keys():
        own = candidate.get_submodule(path).state_dict()
        for name, tensor in block.get_submodule(path).state_dict().items():
            if path in outputs and tensor.dim() > 0:
                tensor = tensor[outputs[path]]
            if path in inputs and tensor.dim() > 1:
                tensor = tensor[:, inputs[path]]
            own[name].copy_(tensor)


def _holds(config: NarrowConfig, block: nn.Module, inner: InnerChannels, x_nchw: Tensor) -> bool:
    """Whether a narrowed block gives what the whole one gives with the other channels masked."""
    whole, x = randomised(block), random_inputs(x_nchw)
    channels = conv_at(whole, inner.producers[0]).out_channels
    index = torch.arange(channels)[-_num_kept(config, block, inner) :]  # not those of `build`
    mask = torch.zeros(channels, dtype=x.dtype)
    mask[index] = 1
    hooks = [
        conv_at(whole, path).register_forward_pre_hook(
            lambda _, args: (args[0] * mask[:, None, None],)
        )
        for path in inner.consumers
    ]
    try:
        with torch.no_grad(), eval_mode(whole):
            expected = whole(x.clone())
            for hook in hooks:
                hook.remove()
            narrowed = _narrowed(whole, [(inner, index)]).float().eval()
            _copy_kept(narrowed, whole, [(inner, index)])
            got = narrowed(x.clone())
    except RuntimeError:  # its code counts on the channels
        return False
    scale = float(expected.abs().max())
    return expected.shape == got.shape and torch.allclose(expected, got, rtol=0, atol=1e-4 * scale)
