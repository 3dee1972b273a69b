"""Networks as users write them: functions that `teacher.model` names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _TwoOutputs(nn.Module):
    def forward(self, x_nchw: Tensor) -> tuple[Tensor, Tensor]:
        return x_nchw.mean((2, 3)), x_nchw


class Odd(nn.Module):
    """In-place ReLU after an addition, a module used twice, a functional branch."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.kernel = nn.Parameter(0.1 * torch.randn(8, 8, 3, 3))
        self.last = nn.Conv2d(8, 16, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x_nchw: Tensor) -> Tensor:
        x = self.relu(self.stem(x_nchw))
        x = self.relu(x + self.left(x))
        x = self.relu(self.twice(self.relu(self.twice(x))))
        x = self.relu(x + F.conv2d(x, self.kernel, padding=1))
        x = self.relu(self.last(F.max_pool2d(x, 2)))
        return self.fc(x.mean((2, 3)))


def odd(num_classes: int, in_channels: int) -> nn.Module:
    return Odd(num_classes, in_channels)


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
