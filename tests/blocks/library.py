"""What the tests of the kinds share: odd convolutions, odd networks, and a candidate in one go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbkd.blocks import build_candidate, init_candidate, settle_candidate
from pbkd.config import CandidateConfig

CONVS: dict[str, dict[str, Any]] = {
    "plain": {"padding": 1},
    "stride 2": {"padding": 1, "stride": 2},
    "stride 2 x 1": {"padding": 1, "stride": (2, 1)},
    "dilation": {"padding": 2, "dilation": 2},
    "groups": {"padding": 1, "groups": 2},
    "no bias": {"padding": 1, "bias": False},
    "narrowing": {"out_channels": 4, "padding": 1},
    "one input channel": {"in_channels": 1, "padding": 1},
    "1 x 3": {"kernel_size": (1, 3), "padding": (0, 1)},
    "3 x 1": {"kernel_size": (3, 1), "padding": (1, 0)},
    "5 x 5": {"kernel_size": 5, "padding": 2},
    "5 x 3, unpadded": {"kernel_size": (5, 3)},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular, stride 2": {"padding": 2, "padding_mode": "circular", "stride": 2},
    "even kernel": {"kernel_size": 4, "padding": 1, "stride": 2},
    "even kernel, same": {"kernel_size": 2, "padding": "same"},
    "wide padding": {"padding": 2},
}
"""Odd ones by name: 8 to 12 channels, 3 x 3, where nothing else is said."""

HEIGHT, WIDTH = 9, 14


def conv_of(name: str) -> nn.Conv2d:
    """An odd convolution with weights of a low rank and some noise, as trained ones have them."""
    torch.manual_seed(0)
    settings = {"in_channels": 8, "out_channels": 12, "kernel_size": 3} | CONVS[name]
    return _like_trained(nn.Conv2d(**settings)).eval()


def _like_trained(conv: nn.Conv2d) -> nn.Conv2d:
    """Give a kernel a few strong directions; one of noise alone has no lower rank."""
    with torch.no_grad():
        left = torch.randn(conv.out_channels, 2)
        right = torch.randn(2, *conv.weight.shape[1:]) * conv.weight.std()
        conv.weight.mul_(0.3).add_(torch.einsum("or,rihw->oihw", left, right))
    return conv


def inputs_for(conv: nn.Conv2d, num: int = 8) -> Tensor:
    """Images that are not square; neighbours are alike, as in real ones."""
    coarse = torch.randn(num, conv.in_channels, 3, 4)
    smooth = F.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear", align_corners=True)
    return smooth + torch.randn(num, conv.in_channels, HEIGHT, WIDTH) / 4


def started(config: CandidateConfig, block: nn.Module, x_nchw: Tensor) -> nn.Module:
    """The candidate as training would start with it, in evaluation mode."""
    config = settle_candidate(config, block, x_nchw)
    candidate = build_candidate(config, block).to(x_nchw.dtype).eval()
    init_candidate(config, candidate, block, x_nchw)
    return candidate


def relative_error(candidate: nn.Module, block: nn.Module, x_nchw: Tensor) -> float:
    """Squared error over the squared norm of the block's outputs."""
    with torch.no_grad():
        y, got = block(x_nchw.clone()), candidate(x_nchw.clone())
    assert got.shape == y.shape
    return float((got - y).square().sum() / y.square().sum())


def seen(net: nn.Module, size: int = 32, channels: int = 3) -> nn.Module:
    """A network whose batch norms have seen some images, in evaluation mode."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            _like_trained(module)
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, channels, size, size))
    return net.eval()


class Squeeze(nn.Module):
    """Channels scaled by what their means say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x_nchw: Tensor) -> Tensor:
        scale = self.fc2(F.relu(self.fc1(x_nchw.mean((2, 3), keepdim=True))))
        return x_nchw * torch.sigmoid(scale)


class OddBlock(nn.Module):
    """A residual block with everything in its way: two branches, depthwise, squeeze, in-place."""

    def __init__(self, channels: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, (3, 1), padding=(1, 0))
        self.branch = nn.Conv2d(channels, inner, 1)
        self.norm = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 5, padding=2, groups=inner)
        self.squeeze = Squeeze(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, padding_mode="reflect")
        self.skip = nn.Identity()

    def forward(self, x_nchw: Tensor) -> Tensor:
        y = F.relu_(self.norm(self.conv1(x_nchw) + self.branch(x_nchw)))
        y = self.conv2(self.squeeze(F.hardswish(self.depthwise(y))))
        return F.relu(y.add_(self.skip(x_nchw)))
