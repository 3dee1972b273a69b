"""Networks as users write them: functions that `teacher.model` names."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _TwoOutputs(nn.Module):
    def forward(self, x_nchw: Tensor) -> tuple[Tensor, Tensor]:
        return x_nchw.mean((2, 3)), x_nchw


def small(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )


def eleven(num_classes: int, in_channels: int) -> nn.Module:
    return small(11, in_channels)


def two_outputs(num_classes: int, in_channels: int) -> nn.Module:
    return _TwoOutputs()


def boom(num_classes: int, in_channels: int) -> nn.Module:
    raise ZeroDivisionError("boom")


def no_arguments() -> nn.Module:
    return nn.Linear(1, 1)


def no_module(num_classes: int, in_channels: int) -> int:
    return torch.get_num_threads()
