"""What both exporters need: a copy of the model to trace, and images of its size."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pbkd.models import ModelCard

_TRACED_BATCH = 2  # of one image, a tracer would take the batch for a constant


def dynamic_batch() -> tuple[dict[int, Any]]:
    """Shapes of the one input: the batch may have any size, the image may not."""
    return ({0: torch.export.Dim("batch", min=1)},)


def traceable(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in evaluation mode, without gradients; the model itself stays as it is."""
    return copy.deepcopy(model).cpu().eval().requires_grad_(False)


def image_shape(card: ModelCard) -> tuple[int, int, int]:
    """(C, H, W) of the images that the model was made for."""
    return (card.network.in_channels, *card.image_size)


def example_images(card: ModelCard) -> Tensor:
    """(2, C, H, W) float32 in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(_TRACED_BATCH, *image_shape(card), generator=generator)
