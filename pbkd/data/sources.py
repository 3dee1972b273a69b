"""Raw images and labels by source name.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from pbkd.errors import MissingExtraError


@dataclass(frozen=True)
class RawImages:
    """All images of a source, not split.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, 0 to K - 1.
        class_names: K names.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def load_digits(size: int) -> RawImages:
    """The 1,797 handwritten 8x8 digits that scikit-learn ships (UCI Optical Recognition).

    Args:
        size: height and width of the result, pixels; resized bilinearly.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingExtraError("scikit-learn", "digits", "prepare.source: digits") from None
    bunch = datasets.load_digits()
    gray = torch.from_numpy(np.asarray(bunch.images, np.float32))[:, None] * (255 / 16)
    resized = F.interpolate(gray, size=(size, size), mode="bilinear", align_corners=False)
    return RawImages(
        images=resized.round().clamp(0, 255).to(torch.uint8).numpy(),
        labels=np.asarray(bunch.target, np.int64),
        class_names=tuple(str(name) for name in bunch.target_names),
    )
