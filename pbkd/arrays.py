"""Images and labels that are in memory, as splits of 8-bit arrays; for ``pbkd.compress``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pbkd.data import Split
from pbkd.errors import DataError

Data = Sequence[Any] | Iterable[tuple[Any, int]]
"""(images, labels) as two arrays, or a data set of (image, label) pairs."""


def split_of(data: Data, name: str) -> Split:
    """Arrays of 8 bits out of what the user gave.

    Raises:
        DataError: it is neither, or holds what is no image or label.
    """
    if isinstance(data, tuple) and len(data) == 2 and len(data[0]) == len(data[1]):
        images, labels = _pixels(data[0], name), np.asarray(data[1])
    else:
        pairs = [(_pixels(image, name), label) for image, label in _pairs(data, name)]
        shapes = {image.shape for image, _ in pairs}
        if len(shapes) != 1:
            raise DataError(f"{name}: images of {len(shapes)} shapes, expected one: {shapes}")
        images = np.stack([image for image, _ in pairs])
        labels = np.asarray([int(label) for _, label in pairs])
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        raise DataError(
            f"{name}: images of shape {images.shape}, expected (N, C, H, W) with 1 or 3 channels"
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{name}: labels of shape {labels.shape} and type {labels.dtype}, expected "
            f"({len(images)},) integers"
        )
    if labels.min() < 0:
        raise DataError(f"{name}: label {labels.min()}, expected 0 to the number of classes - 1")
    return Split(images, labels.astype(np.int64))


def _pairs(data: Any, name: str) -> list[tuple[Any, Any]]:
    items = [data[i] for i in range(len(data))] if hasattr(data, "__getitem__") else list(data)
    if not items or any(not isinstance(item, tuple | list) or len(item) != 2 for item in items):
        raise DataError(
            f"{name}: expected (images, labels) as two arrays of one length, or a data set of "
            "(image, label) pairs"
        )
    return [(image, label) for image, label in items]


def _pixels(images: Any, name: str) -> NDArray[np.uint8]:
    """One or many images as uint8, channels first."""
    if hasattr(images, "getbands"):  # a Pillow image has its channels last
        plain = images if images.mode in ("L", "RGB") else images.convert("RGB")
        array = np.atleast_3d(np.asarray(plain)).transpose(2, 0, 1)
    else:
        array = np.asarray(images.detach().cpu() if isinstance(images, Tensor) else images)
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8)
    in_range = np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1
    if not np.issubdtype(array.dtype, np.floating) or not in_range:
        raise DataError(
            f"{name}: {array.dtype} pixels from {array.min():g} to {array.max():g}, expected uint8 "
            "or floats in [0, 1]; give normalisation by `mean` and `std`, not in the data"
        )
    return np.round(array * 255).astype(np.uint8)
