"""Where images come from: what a source lists, and how its images are opened.

A source first lists all of its images by name, label and split, which is cheap; it opens those that
are wanted later, in the order in which they are read fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pbkd.config import PrepareConfig
from pbkd.errors import MissingExtraError

SPLITS = ("train", "val", "test")

Opener = Callable[[], Image.Image]
"""Opens one image; called in any thread, raises whatever a damaged file makes Pillow raise."""


@dataclass(frozen=True)
class Listing:
    """All images of a source; N images, K classes.

    Attributes:
        class_names: K names.
        names: N names, for messages.
        labels: (N,) int64, 0 to K - 1.
        splits: (N,) strings out of ``SPLITS``, or None: all are for the seed to split.
        channels: 1 for a gray source, 3 for any other.
    """

    class_names: tuple[str, ...]
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    splits: NDArray[np.str_] | None
    channels: int

    def __len__(self) -> int:
        return len(self.names)


class ImageSource(Protocol):
    """What ``prepare`` needs of a source."""

    @property
    def listing(self) -> Listing:
        """Names, labels and splits of all images."""
        ...

    def images(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[int, Opener]]:
        """Index and opener of each image that is wanted, (N,) bool; in any order."""
        ...


def open_source(config: PrepareConfig, root: Path, downloads: Path) -> ImageSource:
    """The source that the parameters name.

    Args:
        root: the folder to which ``prepare.path`` is relative.
        downloads: where torchvision may put files that are not there.

    Raises:
        DataError: nothing is there, or it is no set of labelled images.
        MissingExtraError: scikit-learn is not installed.
    """
    if config.source == "image_folder":
        from pbkd.data.folder import open_folder

        return open_folder(root / config.path)
    if config.source == "torchvision":
        from pbkd.data.torchvision_sets import TorchvisionSource

        return TorchvisionSource(config.dataset, config.arguments, root / config.path, downloads)
    return DigitsSource()


class DigitsSource:
    """The 1,797 handwritten 8x8 digits that scikit-learn ships (UCI Optical Recognition)."""

    def __init__(self) -> None:
        try:
            from sklearn import datasets
        except ImportError:
            raise MissingExtraError("scikit-learn", "digits", "prepare.source: digits") from None
        bunch = datasets.load_digits()
        self._pixels = np.round(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)
        labels = np.asarray(bunch.target, np.int64)
        names = tuple(f"digit {index}" for index in range(len(labels)))
        classes = tuple(str(name) for name in bunch.target_names)
        self.listing = Listing(classes, names, labels, None, channels=1)

    def images(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[int, Opener]]:
        """Index and opener of each wanted image."""
        for index in np.flatnonzero(wanted).tolist():
            yield index, partial(Image.fromarray, self._pixels[index])
