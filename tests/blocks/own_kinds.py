"""Kinds as users write them: functions that `blocks.candidates` names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pbkd.errors import CandidateError


def thin(block: nn.Module, width: int = 4) -> nn.Module:
    """The five lines of docs/adding_a_candidate.md."""
    if not isinstance(block, nn.Conv2d) or block.stride != (1, 1):
        raise CandidateError("`thin` stands for convolutions without stride")
    reduce = nn.Conv2d(block.in_channels, width, 1)
    return nn.Sequential(reduce, nn.ReLU(), nn.Conv2d(width, block.out_channels, 3, padding=1))


def part_of(block: nn.Module) -> nn.Module:
    """Takes a part of the block as it is."""
    assert isinstance(block, nn.Sequential)
    return nn.Sequential(block[0])


class Mean(nn.Module):
    """Gives what the block gives on average, which it learns before training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(channels))

    def forward(self, x_nchw: Tensor) -> Tensor:
        return self.mean[:, None, None].expand(len(x_nchw), -1, *x_nchw.shape[2:])

    def inherit(self, block: nn.Module, x_nchw: Tensor) -> None:
        assert not self.training
        self.mean.copy_(block(x_nchw).mean((0, 2, 3)))
        x_nchw.zero_()
        nn.init.zeros_(block.get_parameter("weight"))


def mean(block: nn.Conv2d) -> nn.Module:
    return Mean(block.out_channels)


class _Failing(nn.Identity):
    def inherit(self, block: nn.Module, x_nchw: Tensor) -> None:
        raise ZeroDivisionError("boom")


def failing_inherit(block: nn.Module) -> nn.Module:
    return _Failing()


def by_weights(block: nn.Conv2d) -> nn.Module:
    width = 1 + int(block.weight.detach().abs().sum() * 1000) % 50
    return nn.Sequential(
        nn.Conv2d(block.in_channels, width, 1), nn.Conv2d(width, block.out_channels, 1)
    )


def boom(block: nn.Module) -> nn.Module:
    raise ZeroDivisionError("boom")


def no_module(block: nn.Module) -> int:
    return 3


def other_shape(block: nn.Module) -> nn.Module:
    return nn.Conv2d(8, 3, 1)


def other_channels(block: nn.Module) -> nn.Module:
    return nn.Conv2d(5, 8, 1)


class _Pair(nn.Module):
    def forward(self, x_nchw: Tensor) -> tuple[Tensor, Tensor]:
        return x_nchw, x_nchw


def two_outputs(block: nn.Module) -> nn.Module:
    return _Pair()
