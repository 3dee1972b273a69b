"""The prepared data set: memory-mapped uint8 arrays, labels, splits and checksums in one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pbkd.artifacts import atomic_dir, digest_of, file_digest, read_json, write_json
from pbkd.config import PrepareConfig
from pbkd.data.sources import RawImages, load_digits
from pbkd.errors import ArtifactError, DataError
from pbkd.seeding import derive_seed

SPLITS = ("train", "val", "test")


class PreparedMeta(BaseModel):
    """What ``meta.json`` says of a prepared data set.

    ``mean`` and ``std`` are per channel over the training split, pixels scaled to [0, 1].
    ``digest`` covers every array and the class names.
    """

    model_config = ConfigDict(frozen=True)

    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_images: dict[str, int]
    files: dict[str, str]
    digest: str


@dataclass(frozen=True)
class Split:
    """One split: ``images`` (N, C, H, W) uint8 and ``labels`` (N,) int64, memory-mapped."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Prepared:
    """A prepared data set on disk; splits are opened when asked for."""

    folder: Path
    meta: PreparedMeta

    @property
    def num_classes(self) -> int:
        return len(self.meta.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.split("val").images.shape[1:]
        return channels, height, width

    def split(self, name: str) -> Split:
        """Open ``train``, ``val`` or ``test``."""
        assert name in SPLITS, name
        try:
            images = np.load(self.folder / f"{name}_images.npy", mmap_mode="r")
            labels = np.load(self.folder / f"{name}_labels.npy")
        except (OSError, EOFError, ValueError) as error:
            raise ArtifactError(
                f"{self.folder}: split {name} cannot be read ({error}); run: pbkd prepare"
            ) from None
        return Split(images, labels)


def prepare(config: PrepareConfig, seed: int, folder: Path) -> Prepared:
    """Decode the source once into ``folder``, which appears whole or not at all.

    The order is shuffled by the seed, so that a chunk of consecutive images holds all classes.

    Raises:
        DataError: fewer than two classes, or a class without images in a split.
    """
    raw = {"digits": load_digits}[config.source](config.size)
    splits = _split(raw, config, seed)
    for name, rows in splits.items():
        missing = set(range(len(raw.class_names))) - set(raw.labels[rows].tolist())
        if missing:
            raise DataError(
                f"split {name}: no image of class {raw.class_names[min(missing)]!r}; expected "
                f"images of all {len(raw.class_names)} classes; give more images or a larger split"
            )
    with atomic_dir(folder) as temporary:
        for name, rows in splits.items():
            np.save(temporary / f"{name}_images.npy", raw.images[rows])
            np.save(temporary / f"{name}_labels.npy", raw.labels[rows])
        write_json(temporary / "meta.json", _describe(temporary, raw, splits))
    return load_prepared(folder)


def load_prepared(folder: Path) -> Prepared:
    """Open a prepared data set; the arrays are opened, and their headers checked, by ``split``."""
    try:
        return Prepared(folder, PreparedMeta.model_validate(read_json(folder / "meta.json")))
    except ValidationError as error:
        raise ArtifactError(
            f"{folder / 'meta.json'} is not of this version ({error}); run: pbkd prepare"
        ) from None


def _split(raw: RawImages, config: PrepareConfig, seed: int) -> dict[str, NDArray[np.int64]]:
    order = np.random.default_rng(derive_seed(seed, "split")).permutation(len(raw.labels))
    num_test = round(len(order) * config.test_fraction)
    num_val = round((len(order) - num_test) * config.val_fraction)
    test, val, train = np.split(order, [num_test, num_test + num_val])
    return {"train": train, "val": val, "test": test}


def _describe(folder: Path, raw: RawImages, splits: dict[str, NDArray[np.int64]]) -> PreparedMeta:
    train = raw.images[splits["train"]].astype(np.float64) / 255
    files = {path.name: file_digest(path) for path in sorted(folder.glob("*.npy"))}
    return PreparedMeta(
        class_names=raw.class_names,
        mean=tuple(train.mean((0, 2, 3)).tolist()),
        std=tuple(train.std((0, 2, 3)).tolist()),
        num_images={name: len(rows) for name, rows in splits.items()},
        files=files,
        digest=digest_of({"files": files, "class_names": raw.class_names}),
    )
