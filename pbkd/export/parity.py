"""Whether an exported file computes what the model computes, on given images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pbkd.errors import ExportError
from pbkd.export.tracing import traceable

TOLERANCE = 1e-4
"""By how much a logit of a float32 file may differ, as a share of the largest logit."""

_BATCH = 64


@dataclass(frozen=True)
class Parity:
    """How far a file is from its model.

    Attributes:
        max_difference: the largest absolute difference of two logits.
        max_logit: the model's largest absolute logit.
        same_predictions: share of the images with the same largest logit, 0 to 1.
        num_images: how many were compared.
    """

    max_difference: float
    max_logit: float
    same_predictions: float
    num_images: int

    @property
    def is_close(self) -> bool:
        """Whether the difference is within ``TOLERANCE``; what is not finite is not."""
        return self.max_difference <= TOLERANCE * self.max_logit < float("inf")


def parity(model: nn.Module, exported: Callable[[Tensor], Tensor], images_nchw: Tensor) -> Parity:
    """Compare the logits of a model with those of its exported form, on the CPU.

    Args:
        model: stays as it is, on whatever device.
        exported: an ``OnnxModel``, or the module of an archive.
        images_nchw: (N, C, H, W) float32 in [0, 1], N >= 1. The first is passed alone, the others
            in batches: so the batch size is seen to be free.
    """
    assert len(images_nchw) >= 1
    own = traceable(model)
    with torch.no_grad():
        batches = [images_nchw[:1], *torch.split(images_nchw[1:], _BATCH)]
        pairs = [(own(batch), exported(batch)) for batch in batches if len(batch)]
    wanted_nk = torch.cat([pair[0] for pair in pairs]).double()
    found_nk = torch.cat([pair[1] for pair in pairs]).double()
    same = wanted_nk.argmax(1) == found_nk.argmax(1)
    return Parity(
        max_difference=float((wanted_nk - found_nk).abs().max()),
        max_logit=float(wanted_nk.abs().max()),
        same_predictions=float(same.double().mean()),
        num_images=len(images_nchw),
    )


def check_parity(found: Parity, what: str) -> None:
    """Raise ExportError where a float32 file is further than ``TOLERANCE`` from its model."""
    if not found.is_close:
        raise ExportError(
            f"{what} does not compute what the model computes: logits differ by up to "
            f"{found.max_difference:.3g}, where the largest is {found.max_logit:.3g} (allowed: "
            f"{TOLERANCE:g} of it); try the other format, or newer versions of torch and ONNX"
        )
