"""The source `torchvision`: any classification set there with a `train=` or `split=` argument."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pbkd.data.sources import Listing, Opener
from pbkd.errors import DataError, did_you_mean

# Names that sets give to a split, the first that a set knows is taken.
_SPLIT_NAMES = {
    "train": ("train", "trainval"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}
_FILE = re.compile(r"[\w.-]+\.(?:tar\.gz|tgz|tar\.bz2|tar|zip|gz|bz2|mat|csv|h5)")


class TorchvisionSource:
    """A data set of ``torchvision.datasets``.

    Args:
        name: its class there.
        arguments: more arguments of the class.
        path: where its files are looked for first.
        downloads: where they are looked for next, and put if there is a network.

    Raises:
        DataError: there is no such set, it is no classification set, or its files are missing
            and cannot be downloaded; the message names them.
    """

    def __init__(
        self, name: str, arguments: Mapping[str, str | int | bool], path: Path, downloads: Path
    ) -> None:
        self._name = name
        self._kind = find_set(name)
        parameters = _parameters(self._kind)
        self._parts: list[tuple[str, Any]] = []
        uses_train = "train" in parameters and ("split" not in parameters or "split" in arguments)
        if not uses_train and "split" not in parameters:
            raise DataError(
                f"prepare.dataset: {name} has neither a `train` nor a `split` argument; export it "
                "as an image folder"
            )
        for split in ("train", "val", "test"):
            values = [split == "train"] if uses_train else list(_SPLIT_NAMES[split])
            if uses_train and split == "val":
                continue
            keyword = "train" if uses_train else "split"
            part = self._open({**arguments, keyword: None}, keyword, values, path, downloads)
            if part is not None:
                self._parts.append((split, part))
        found = [split for split, _ in self._parts]
        if "train" not in found:
            raise DataError(
                f"prepare.dataset: {name} has no training split; some sets need "
                "prepare.arguments, as EMNIST does: {split: balanced}"
            )
        if len(found) == 2:
            self._parts = [(s if s == "train" else "test", part) for s, part in self._parts]
        self._starts = np.cumsum([0, *(len(part) for _, part in self._parts)])
        self.listing = self._list()

    def images(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[int, Opener]]:
        """Index and opener of each wanted image."""
        for (_, part), start in zip(self._parts, self._starts, strict=False):
            for own in np.flatnonzero(wanted[start : start + len(part)]).tolist():
                yield int(start) + own, partial(_image, part, own)

    def _open(
        self,
        arguments: dict[str, Any],
        keyword: str,
        values: list[Any],
        path: Path,
        downloads: Path,
    ) -> Any:
        """The part for the first value that the set knows; None: it knows none of them."""
        for value in values:
            given = arguments | {keyword: value}
            try:
                return self._make(given, path, downloads)
            except ValueError as error:
                if keyword == "split" and "nknown value" in str(error):
                    continue
                raise DataError(f"prepare.dataset: {self._name}: {error}") from error
        return None

    def _make(self, arguments: dict[str, Any], path: Path, downloads: Path) -> Any:
        try:
            return self._kind(root=str(path), **arguments)
        except (RuntimeError, OSError):
            pass  # not there
        except TypeError as error:
            raise DataError(f"prepare.arguments: {self._name}: {error}") from error
        try:
            downloads.mkdir(parents=True, exist_ok=True)
            if "download" in _parameters(self._kind):
                arguments = arguments | {"download": True}
            return self._kind(root=str(downloads), **arguments)
        except (URLError, OSError, RuntimeError) as error:
            files = ", ".join(_files(self._kind)) or "see torchvision's documentation"
            raise DataError(
                f"prepare.dataset: {self._name} is neither in {path} nor could it be downloaded "
                f"({error}); put its files into {_folder(self._kind, downloads)}: {files}"
            ) from error

    def _list(self) -> Listing:
        labels, names, splits = [], [], []
        for split, part in self._parts:
            own = self._labels(part)
            labels += own
            names += [f"{self._name} {split} image {index}" for index in range(len(own))]
            splits += [split] * len(own)
        image = self._parts[0][1][0][0]
        if not isinstance(image, Image.Image):
            raise DataError(
                f"prepare.dataset: {self._name} gives {type(image).__name__}, expected images"
            )
        known = getattr(self._parts[0][1], "classes", None)
        classes = [_first(name) for name in known or range(max(labels) + 1)]
        if max(labels) >= len(classes):
            raise DataError(f"prepare.dataset: {self._name}: label {max(labels)} has no class name")
        present, numbers = np.unique(np.array(labels, np.int64), return_inverse=True)
        is_gray = image.mode in ("1", "L", "I", "I;16", "F")
        return Listing(
            class_names=tuple(classes[label] for label in present),  # EMNIST has one without images
            names=tuple(names),
            labels=numbers.astype(np.int64),
            splits=np.array(splits),
            channels=1 if is_gray else 3,
        )

    def _labels(self, part: Any) -> list[int]:
        for name in ("targets", "labels", "_labels", "_samples"):  # without decoding the images
            known = getattr(part, name, None)
            if name == "_samples" and known:
                known = [sample[1] for sample in known]
            if known is not None and len(known) == len(part) and _are_labels(np.asarray(known)):
                return [int(value) for value in known]
        values = np.asarray([part[index][1] for index in range(len(part))])
        if not _are_labels(values):
            raise DataError(
                f"prepare.dataset: {self._name} is no classification set: expected one class "
                f"number per image, got {values[:1].tolist()}"
            )
        return [int(value) for value in values]


def _first(name: Any) -> str:
    """A class's name; ImageNet has a tuple of synonyms."""
    return str(name[0] if isinstance(name, tuple) else name)


def _are_labels(values: NDArray[Any]) -> bool:
    return values.ndim == 1 and np.issubdtype(values.dtype, np.integer) and values.min() >= 0


def _image(part: Any, index: int) -> Image.Image:
    return part[index][0]  # type: ignore[no-any-return]


def find_set(name: str) -> Any:
    """The class of a set; DataError with the nearest name where torchvision has none."""
    from torchvision import datasets

    known = [entry for entry in datasets.__all__ if inspect.isclass(getattr(datasets, entry))]
    if name in known:
        return getattr(datasets, name)
    hint = did_you_mean(name, known, "see torchvision.datasets")
    raise DataError(f"prepare.dataset: torchvision has no `{name}`; {hint}")


def _parameters(kind: type) -> set[str]:
    """Names of the arguments of a class and of those that it derives from."""
    names: set[str] = set()
    for cls in inspect.getmro(kind):
        if "__init__" in vars(cls):
            names |= set(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    return names


def _folder(kind: type, downloads: Path) -> Path:
    """Where a class that may download looks for the files that it would download."""
    from torchvision import datasets

    return downloads / kind.__name__ / "raw" if issubclass(kind, datasets.MNIST) else downloads


def _files(kind: type) -> list[str]:
    """File names that stand in a class's attributes."""
    text = " ".join(
        str(value) for cls in inspect.getmro(kind) for value in vars(cls).values() if value
    )
    return sorted(set(_FILE.findall(text)))
