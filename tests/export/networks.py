"""Small networks with their cards, and images with structure."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbkd.blocks import build_candidate, find_blocks
from pbkd.config import (
    AugmentConfig,
    BlocksConfig,
    IdentityConfig,
    LowRankConfig,
    SeparableConfig,
)
from pbkd.models import Classifier, ModelCard, NetworkSpec, build_classifier
from pbkd.students import stitch

CLASSES = ("ant", "bee", "cat", "dog", "elk")

NETWORKS = {
    "vgg_small": (0.5, 16),
    "cifar_resnet20": (0.5, 16),
    "mobilenet_v3_small": (1.0, 32),
    "student": (0.5, 16),  # of vgg_small
}
"""Width and image size of each."""


def images_of(card: ModelCard, num_images: int, seed: int = 0) -> Tensor:
    """(N, C, H, W) in [0, 1]: coarse shapes with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    channels, (height, width) = card.network.in_channels, card.image_size
    coarse = torch.rand(num_images, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth + 0.1 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1)


def network(name: str) -> tuple[Classifier, ModelCard]:
    """Random weights, with the batch-norm statistics of such images."""
    width, size = NETWORKS[name]
    card = ModelCard(
        network=NetworkSpec(
            name="vgg_small" if name == "student" else name,
            num_classes=len(CLASSES),
            in_channels=3,
            width=width,
        ),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
        image_size=(size, size),
        class_names=CLASSES,
        augment=AugmentConfig(),
        data_digest="data",
        digest=f"digest-of-{name}",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_classifier(card)
        if name == "student":
            model, card = _stitched(model, card)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # the mean of all passes, without the start
                module.eps, module.momentum = 1e-5, None
        with torch.no_grad():
            for seed in range(10):
                model.train()(images_of(card, 32, seed + 1))
    return model.eval(), card


def _stitched(teacher: Classifier, card: ModelCard) -> tuple[Classifier, ModelCard]:
    """With a candidate of three kinds in place of three blocks."""
    kinds = (SeparableConfig(batch_norm=True), LowRankConfig(ratio=0.3), IdentityConfig())
    found = find_blocks(teacher.net, BlocksConfig(candidates=kinds), images_of(card, 2)).blocks
    chosen = {
        block.path: block.candidates[index].config
        for index, block in enumerate(found[1 : 1 + len(kinds)])
    }
    assert {config.kind for config in chosen.values()} == {config.kind for config in kinds}
    weights = {
        path: build_candidate(config, teacher.net.get_submodule(path)).state_dict()
        for path, config in chosen.items()
    }
    return stitch(teacher, chosen, weights), card.model_copy(update={"replacements": chosen})
