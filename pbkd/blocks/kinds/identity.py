"""`identity`: the block is dropped.

What stays of a residual block is its skip. Where input and output differ in shape and there is no
skip with parameters of its own, a 1 x 1 convolution at the centre of each window takes its place,
as the least squares of the block's outputs given its inputs. Where a block's outputs are never
negative, a ReLU follows.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from pbkd.blocks.factors import fit_pointwise
from pbkd.blocks.inner import random_inputs, randomised
from pbkd.blocks.kinds.convs import SKIPS
from pbkd.blocks.kinds.kind import Kind
from pbkd.config import IdentityConfig
from pbkd.config.candidates import Place
from pbkd.errors import CandidateError
from pbkd.measure import eval_mode

_MORE = 12
"""Pixels by which an image grows to find a stride: a multiple of the usual ones."""


def build(config: IdentityConfig, block: nn.Module) -> nn.Module:
    """See ``Kind.build``."""
    place = config.place
    if place is None:
        raise CandidateError(
            "its place is not settled; take configs as pbkd.blocks.find_blocks gives them"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if place.skip and config.adapter != "always":
        layers["skip"] = copy.deepcopy(block.get_submodule(place.skip))
    elif not place.keeps_shape or config.adapter == "always":
        if config.adapter == "never":
            raise CandidateError(
                f"turns {place.channels[0]} channels into {place.channels[1]}, stride "
                f"{place.stride}, cut {place.crop}: without `adapter` it cannot be dropped"
            )
        if any(place.crop):
            left, right, top, bottom = place.crop
            layers["crop"] = nn.ZeroPad2d((-left, -right, -top, -bottom))
        if place.stride != (1, 1):
            layers["every"] = Every(place.stride)
        layers["adapter"] = nn.Conv2d(*place.channels, 1, groups=place.groups, bias=True)
    if place.relu:
        layers["relu"] = nn.ReLU()
    if not layers:
        layers["copy"] = Copy()
    return nn.Sequential(layers)


class Copy(nn.Module):
    """Its input as a tensor of its own: what follows may work in place."""

    def forward(self, x: Tensor) -> Tensor:
        """A tensor of any shape."""
        return x.clone()


class Every(nn.Module):
    """Every n-th row and m-th column.

    A 1 x 1 convolution with a stride is the same, but its backward pass on the CPU (torch 2.14,
    channels last, few input channels) reads outside its memory.
    """

    def __init__(self, stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, C, H, W)."""
        down, right = self.stride
        return x_nchw[:, :, ::down, ::right]


def init(config: IdentityConfig, candidate: nn.Module, block: nn.Module, x_nchw: Tensor) -> None:
    """See ``Kind.init``; a skip's weights are the block's."""
    if not hasattr(candidate, "adapter"):
        return
    adapter = candidate.get_submodule("adapter")
    assert isinstance(adapter, nn.Conv2d)
    with torch.no_grad(), eval_mode(block):
        y_nchw = block(x_nchw.clone())
    for name in ("crop", "every"):
        x_nchw = candidate.get_submodule(name)(x_nchw) if hasattr(candidate, name) else x_nchw
    fit_pointwise(adapter, x_nchw, y_nchw)


def settle(config: IdentityConfig, block: nn.Module, x_nchw: Tensor) -> IdentityConfig:
    """See ``Kind.settle``: shapes, and the sign of the outputs."""
    if x_nchw.dim() != 4:
        raise CandidateError(f"takes {tuple(x_nchw.shape)}, expected (N, C, H, W)")
    x, trial = random_inputs(x_nchw), randomised(block)
    try:
        with torch.no_grad():
            y = trial(x.clone())
    except Exception as error:  # whatever a block does not bear
        raise CandidateError(f"does not run with random weights in float32: {error}") from error
    if y.dim() != 4:
        raise CandidateError(f"gives {tuple(y.shape)}, expected (N, C, H, W)")
    if isinstance(block, nn.Conv2d):
        stride = (block.stride[0], block.stride[1])
        (top, bottom), (left, right) = (_border(block, axis) for axis in (0, 1))
    else:
        stride = _strides(trial, x, y)
        (top, bottom), (left, right) = (
            _cut(x.shape[axis], y.shape[axis], stride[axis - 2]) for axis in (2, 3)
        )
    place = Place(
        channels=(x.shape[1], y.shape[1]),
        groups=block.groups if isinstance(block, nn.Conv2d) else 1,
        stride=stride,
        crop=(left, right, top, bottom),
        relu=bool((y >= 0).all()),
        skip=_skip(block),
    )
    return config.model_copy(update={"place": place})


KIND = Kind(build, init, settle)


def _skip(block: nn.Module) -> str:
    """Path of the layers on its skip that have parameters; empty for none."""
    for name in SKIPS:
        module = getattr(block, name, None)
        if isinstance(module, nn.Module) and any(True for _ in module.parameters()):
            return name
    return ""


def _border(conv: nn.Conv2d, axis: int) -> tuple[int, int]:
    """Pixels that the middle of a convolution's window leaves out at both ends."""
    if conv.padding == "same":
        return 0, 0
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    padding = 0 if isinstance(conv.padding, str) else int(conv.padding[axis])
    return reach // 2 - padding, reach - reach // 2 - padding


def _strides(block: nn.Module, x: Tensor, y: Tensor) -> tuple[int, int]:
    """Vertical and horizontal: by how much the output grows with the input."""
    strides = [max(1, round(x.shape[axis] / y.shape[axis])) for axis in (2, 3)]
    larger = torch.zeros(*x.shape[:2], x.shape[2] + _MORE, x.shape[3] + _MORE)
    try:
        with torch.no_grad():
            grown = block(larger).shape
    except RuntimeError:  # it takes this size only
        grown = y.shape
    for index, axis in enumerate((2, 3)):
        growth = grown[axis] - y.shape[axis]
        if growth > _MORE:
            raise CandidateError(f"enlarges {x.shape[axis]} pixels to {y.shape[axis]}")
        if growth > 0:
            strides[index] = round(_MORE / growth)
    return strides[0], strides[1]


def _cut(before: int, after: int, stride: int) -> tuple[int, int]:
    """Pixels to leave out at both ends; an end that the stride does not reach stays."""
    extra = before - ((after - 1) * stride + 1)
    start = extra // 2
    return start, 0 if 0 <= extra - start < stride else extra - start
