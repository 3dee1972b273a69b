"""Kinds that stand for single convolutions: which ones, alone or inside a whole block.

Of a block that is no convolution itself, a copy is made in which the convolutions are replaced, so
that skips and norms stay as the teacher has them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pbkd.blocks.swap import swap
from pbkd.errors import CandidateError
from pbkd.measure import eval_mode

SKIPS = ("downsample", "shortcut", "skip")
"""Names under which residual blocks hold the layers of their skip."""


class Part(nn.Sequential):
    """Stands for one convolution."""

    def inherit(self, conv: nn.Conv2d) -> None:
        """Take weights over from it, in place."""
        raise NotImplementedError

    def conv(self, name: str) -> nn.Conv2d:
        """A convolution of its own."""
        return conv_at(self, name)

    def take(self, conv: nn.Conv2d, **weights: Tensor) -> None:
        """Set the weights of its convolutions by name, and the last one's bias to the given's."""
        with torch.no_grad():
            for name, weight in weights.items():
                self.conv(name).weight.copy_(weight)
            last = self.conv([*weights][-1])
            if conv.bias is not None and last.bias is not None:
                last.bias.copy_(conv.bias)


def conv_like(conv: nn.Conv2d, num_in: int, num_out: int, *, groups: int, bias: bool) -> nn.Conv2d:
    """A convolution with another one's kernel size, stride, padding and dilation."""
    return nn.Conv2d(
        num_in,
        num_out,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=bias,
        padding_mode=conv.padding_mode,
    )


def conv_at(module: nn.Module, path: str) -> nn.Conv2d:
    """The convolution at a path; the module itself for an empty one."""
    conv = module.get_submodule(path)
    assert isinstance(conv, nn.Conv2d)
    return conv


def replaceable_convs(module: nn.Module) -> list[str]:
    """Paths, below a module, of its dense k x k convolutions, k > 1."""
    return [
        path
        for path, child in module.named_modules()
        if isinstance(child, nn.Conv2d)
        and max(child.kernel_size) > 1
        and child.groups < child.in_channels  # a depthwise one is separable already
    ]


def convs_of(block: nn.Module) -> list[str]:
    """The paths to replace: "" for a convolution, else those of its dense k x k ones.

    Raises:
        CandidateError: the block holds none.
    """
    if isinstance(block, nn.Conv2d):
        return [""]
    paths = replaceable_convs(block)
    if not paths:
        raise CandidateError(
            f"{type(block).__name__} holds no dense k x k convolution, k > 1 (nn.Conv2d, fewer "
            "groups than channels)"
        )
    return paths


def needs_dense(conv: nn.Conv2d, otherwise: str) -> None:
    """Raise CandidateError for a 1 x 1 or depthwise convolution; ``otherwise``: what to do."""
    if max(conv.kernel_size) == 1:
        raise CandidateError(f"is a 1 x 1 convolution: {otherwise}")
    if conv.groups == conv.in_channels > 1:
        raise CandidateError(f"is a depthwise convolution: {otherwise}")


def with_parts(block: nn.Module, parts: Mapping[str, Part]) -> nn.Module:
    """A copy of the block with parts in place of its convolutions."""
    if "" in parts:
        return parts[""]
    whole = copy.deepcopy(block)
    swap(whole, parts)
    return whole


def inherit_parts(candidate: nn.Module, block: nn.Module, paths: Iterable[str]) -> list[Part]:
    """Let each part take over its convolution; returns the parts."""
    parts = []
    for path in paths:
        part = candidate.get_submodule(path)
        assert isinstance(part, Part)
        part.inherit(conv_at(block, path))
        parts.append(part)
    return parts


def inputs_of(whole: nn.Module, parts: Sequence[nn.Module], x_nchw: Tensor) -> list[Tensor]:
    """What each part gets when the whole runs in evaluation mode."""
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
