"""Images and labels that are in memory, as splits of 8-bit arrays; for ``pbkd.compress``."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pbkd.data import Split
from pbkd.errors import DataError

Data = Sequence[Any] | Iterable[tuple[Any, int]]
"""(images, labels) as two arrays, or a data set of (image, label) pairs."""

_EXPECTED = (
    "expected (images, labels) as two arrays of one length, or a data set of (image, label) pairs"
)
_PIXELS = "expected uint8 or floats in [0, 1]"


def split_of(data: Data, name: str) -> Split:
    """Arrays of 8 bits out of what the user gave.

    Raises:
        DataError: it is neither, or holds what is no image or label.
    """
    if _is_two_arrays(data):
        images, labels = _pixels(data[0], name), _array(data[1], name)
    else:
        pairs = list(_pairs(data, name))
        if not pairs:
            raise DataError(f"{name}: got nothing, {_EXPECTED}")
        shapes = {image.shape for image, _ in pairs}
        if len(shapes) != 1:
            raise DataError(f"{name}: images of {len(shapes)} shapes, expected one: {shapes}")
        images = np.stack([image for image, _ in pairs])
        labels = np.asarray([label for _, label in pairs])
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


def _is_two_arrays(data: Any) -> TypeGuard[Sequence[Any]]:
    """Images and labels, and not two pairs: there the second one begins with an image."""
    return _is_pair(data) and not (all(map(_is_pair, data)) and np.ndim(data[1][0]) > 0)


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2


def _pairs(data: Any, name: str) -> Iterator[tuple[NDArray[np.uint8], int]]:
    if hasattr(data, "__iter__"):
        items = iter(data)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        items = (data[index] for index in range(len(data)))
    else:
        raise DataError(f"{name}: got {type(data).__name__}, {_EXPECTED}")
    for item in items:
        if not _is_pair(item):
            raise DataError(f"{name}: got {reprlib.repr(item)} as an item, {_EXPECTED}")
        label = _label(item[1], name)
        yield _pixels(item[0], name), label


def _label(label: Any, name: str) -> int:
    try:
        return operator.index(label)
    except TypeError:
        raise DataError(
            f"{name}: got {reprlib.repr(label)} as an image's label, expected an integer; of a "
            "DataLoader give its `dataset`, not the batches"
        ) from None


def _array(values: Any, name: str) -> NDArray[Any]:
    try:
        return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: got {type(values).__name__}, which is no array ({error}); {_EXPECTED}"
        ) from None


def _pixels(images: Any, name: str) -> NDArray[np.uint8]:
    """One or many images as uint8, channels first."""
    if hasattr(images, "getbands"):  # a Pillow image has its channels last
        plain = images if images.mode in ("L", "RGB") else images.convert("RGB")
        array = np.atleast_3d(np.asarray(plain)).transpose(2, 0, 1)
    else:
        array = _array(images, name)
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{name}: pixels of type {array.dtype}, {_PIXELS}")
    low, high = array.min(), array.max()
    if not 0 <= low <= high <= 1:
        raise DataError(
            f"{name}: {array.dtype} pixels from {low:g} to {high:g}, {_PIXELS}; give normalisation "
            "by `mean` and `std`, not in the data"
        )
    return np.round(array * 255).astype(np.uint8)
