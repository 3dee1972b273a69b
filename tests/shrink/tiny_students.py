"""Tiny students of all sorts, with weights that no training has touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbkd.config import AugmentConfig, CandidateConfig, LowRankConfig, SeparableConfig
from pbkd.data import Split, Stream
from pbkd.measure import count_macs
from pbkd.models import Classifier, ModelCard, NetworkSpec
from pbkd.shrink import Shrunk, Trainer
from pbkd.students import build_model, load_model
from pbkd.testing import random_split

WIDTHS = {"cifar_resnet20": 0.25, "vgg_small": 0.25}
NETWORKS = {"cifar_resnet20": 8, "vgg_small": 8, "mobilenet_v3_small": 32, "resnet18": 32}
"""Name to image size."""


def card_of(
    network: str,
    *,
    channels: int = 3,
    num_classes: int = 4,
    replacements: dict[str, CandidateConfig] | None = None,
) -> ModelCard:
    size = NETWORKS.get(network, 8)
    return ModelCard(
        network=NetworkSpec(
            name=network,
            num_classes=num_classes,
            in_channels=channels,
            width=WIDTHS.get(network, 1.0),
        ),
        mean=(0.4,) * channels,
        std=(0.2,) * channels,
        image_size=(size, size),
        class_names=tuple("abcdefghij"[:num_classes]),
        augment=AugmentConfig(),
        replacements=replacements or {},
        data_digest="data",
    )


def student_of(card: ModelCard, seed: int = 0) -> Shrunk:
    """Random weights; norms' scales differ, and their statistics are not the initial ones."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build_model(card, allow_code=True)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
        model(images_of(card, 16))
    return Shrunk(model.eval(), card)


def stitched() -> Shrunk:
    """A student with candidates in place of a convolution, and of a whole block."""
    return student_of(
        card_of(
            "cifar_resnet20",
            replacements={
                "layer1.0": SeparableConfig(batch_norm=True),
                "layer3.1.conv1": LowRankConfig(ratio=0.5),
            },
        )
    )


class _Tied(nn.Module):
    """One weight in two convolutions and in a function of its own; one scale in two norms."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.fc = nn.Linear(8, num_classes)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 3, padding=2, dilation=2)  # the last layer by its place
        self.right.weight = self.kernel = self.left.weight
        self.norms[1].weight = self.norms[0].weight

    def forward(self, x_nchw: Tensor) -> Tensor:
        x = torch.relu(self.stem(x_nchw))
        x = torch.relu(self.norms[0](self.left(x)))
        x = torch.relu(self.norms[1](self.right(x)))
        x = torch.relu(F.conv2d(x, self.kernel, padding=1))
        return self.fc(x.mean((2, 3)))


def tied_network(num_classes: int, in_channels: int) -> nn.Module:
    return _Tied(num_classes, in_channels)


def tied() -> Shrunk:
    """A student for the streams, with weights that several layers share."""
    return student_of(card_of("tiny_students:tied_network", channels=1, num_classes=2))


def every_student() -> dict[str, Shrunk]:
    found = {name: student_of(card_of(name)) for name in NETWORKS}
    return found | {"stitched": stitched()}


def images_of(card: ModelCard, number: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(number, card.network.in_channels, *card.image_size, generator=generator)


def macs_of(shrunk: Shrunk) -> int:
    return count_macs(shrunk.model, images_of(shrunk.card, 1))


def reloaded(shrunk: Shrunk, folder: Path) -> Classifier:
    """Built from the card and the file alone."""
    shrunk.save(folder)
    return load_model(folder, allow_code=True)[0]


def stream(seed: int, number: int = 48) -> Stream:
    """Two classes, told apart by brightness."""
    noise = random_split(number, channels=1, num_classes=2, seed=seed)
    images = noise.images // 2 + (noise.labels * 90).astype(np.uint8)[:, None, None, None]
    return Stream(Split(images, noise.labels), seed=0, augment=AugmentConfig(pad=1))


def learner() -> Shrunk:
    """A student for the streams."""
    return student_of(card_of("vgg_small", channels=1, num_classes=2), seed=1)


def trainer_of(folder: Path) -> Trainer:
    teacher = student_of(card_of("vgg_small", channels=1, num_classes=2), seed=2).model
    return Trainer(teacher, stream(0), stream(1), folder)
