"""The prepared data set: memory-mapped uint8 arrays, labels, splits and checksums in one folder."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pbkd.artifacts import (
    atomic_dir,
    atomic_path,
    digest_of,
    file_digest,
    new_array,
    read_json,
    write_json,
)
from pbkd.config import PrepareConfig
from pbkd.data.decode import Fit, Place, decode_all
from pbkd.data.sources import SPLITS, ImageSource, Listing, open_source
from pbkd.errors import ArtifactError, DataError
from pbkd.seeding import derive_seed

_PIECE = 1024  # images that are in memory at a time
_PIXELS = 1 << 22  # that are counted at a time, as integers of 64 bits


class PreparedMeta(BaseModel):
    """What ``meta.json`` says of a prepared data set.

    ``mean`` and ``std`` are per channel over the training split, pixels scaled to [0, 1].
    ``skipped`` names the images that could not be decoded. ``digest`` covers every array and the
    class names.
    """

    model_config = ConfigDict(frozen=True)

    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_images: dict[str, int]
    skipped: tuple[str, ...] = ()
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
            images = np.load(self.folder / _images(name), mmap_mode="r")
            labels = np.load(self.folder / f"{name}_labels.npy")
        except (OSError, EOFError, ValueError) as error:
            raise ArtifactError(
                f"{self.folder}: split {name} cannot be read ({error}); run: pbkd prepare"
            ) from None
        return Split(images, labels)


def prepare(
    config: PrepareConfig, seed: int, folder: Path, root: Path, downloads: Path
) -> Prepared:
    """Decode the source once into ``folder``, which appears whole or not at all.

    The order is shuffled by the seed, so that a chunk of consecutive images holds all classes.

    Args:
        root: the folder to which ``prepare.path`` is relative.
        downloads: where torchvision may put files that are not there.

    Raises:
        DataError: the source cannot be read, an image cannot be decoded, or a split lacks images of
            a class.
    """
    source = open_source(config, root, downloads)
    rows = _split(source.listing, config, seed)
    _check_classes(source.listing, rows)
    with atomic_dir(folder) as temporary:
        skipped = _decode(source, rows, config, temporary)
        left = {name: own[~np.isin(own, skipped)] for name, own in rows.items()}
        _check_classes(source.listing, left)
        for name in SPLITS:
            if len(left[name]) < len(rows[name]):
                _drop_rows(temporary / _images(name), np.isin(rows[name], skipped))
            np.save(temporary / f"{name}_labels.npy", source.listing.labels[left[name]])
        write_json(temporary / "meta.json", _describe(temporary, source.listing, left, skipped))
    return load_prepared(folder)


def load_prepared(folder: Path) -> Prepared:
    """Open a prepared data set; the arrays are opened, and their headers checked, by ``split``."""
    try:
        return Prepared(folder, PreparedMeta.model_validate(read_json(folder / "meta.json")))
    except ValidationError as error:
        raise ArtifactError(
            f"{folder / 'meta.json'} is not of this version ({error}); run: pbkd prepare"
        ) from None


def _images(split: str) -> str:
    return f"{split}_images.npy"


def _split(listing: Listing, config: PrepareConfig, seed: int) -> dict[str, NDArray[np.int64]]:
    """Indices of each split's images, shuffled; what the source does not split, the seed does."""
    rng = np.random.default_rng(derive_seed(seed, "split"))
    order = rng.permutation(len(listing))
    given = np.full(len(order), "train") if listing.splits is None else listing.splits[order]
    rows = {name: order[given == name] for name in SPLITS}
    for name, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if not len(rows[name]):
            drawn = _draw(listing.labels[rows["train"]], fraction, rng)
            rows[name], rows["train"] = rows["train"][drawn], rows["train"][~drawn]
    return {name: own[: config.limit] for name, own in rows.items()}


def _draw(
    labels: NDArray[np.int64], fraction: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """A fraction of all, the same share of each class, at least one image."""
    share_before = np.zeros(len(labels))
    classes = np.unique(labels)
    for label in classes:
        own = np.flatnonzero(labels == label)
        share_before[rng.permutation(own)] = np.arange(len(own)) / len(own)
    num = max(round(len(labels) * fraction), len(classes))
    drawn = np.zeros(len(labels), bool)
    drawn[np.argsort(share_before, kind="stable")[:num]] = True
    return drawn


def _check_classes(listing: Listing, rows: dict[str, NDArray[np.int64]]) -> None:
    for name, own in rows.items():
        missing = set(range(len(listing.class_names))) - set(listing.labels[own].tolist())
        if missing:
            raise DataError(
                f"split {name}: no image of class {listing.class_names[min(missing)]!r}; expected "
                f"images of all {len(listing.class_names)} classes; give more images or a larger "
                "split"
            )


def _decode(
    source: ImageSource, rows: dict[str, NDArray[np.int64]], config: PrepareConfig, folder: Path
) -> list[int]:
    """Fill the arrays of all splits; returns the indices of corrupt images."""
    listing = source.listing
    channels = {"gray": 1, "rgb": 3}[config.channels] if config.channels else listing.channels
    fit = Fit(channels, config.image_size, config.resize, config.interpolation)
    shape = _shape(source, rows, fit)
    places: list[Place | None] = [None] * len(listing)
    wanted = np.zeros(len(listing), bool)
    for name, own in rows.items():
        array = new_array(folder / _images(name), np.uint8, (len(own), *shape))
        for row, index in enumerate(own.tolist()):
            places[index] = Place(array, row)
        wanted[own] = True
    return decode_all(source.images(wanted), places, listing.names, fit, config.on_corrupt)


def _shape(
    source: ImageSource, rows: dict[str, NDArray[np.int64]], fit: Fit
) -> tuple[int, int, int]:
    """(C, H, W) of the prepared images; without a size, of the first that can be decoded."""
    if fit.size is not None:
        return fit.channels, fit.size, fit.size
    wanted = np.zeros(len(source.listing), bool)
    wanted[np.concatenate(list(rows.values()))] = True
    for _, opener in source.images(wanted):
        with suppress(Exception):  # a damaged file makes Pillow raise anything; told later
            _, height, width = fit(opener()).shape
            return fit.channels, height, width
    raise DataError("no image can be decoded; look at prepare.path")


def _drop_rows(path: Path, dropped: NDArray[np.bool_]) -> None:
    """Write an array of images anew without some rows, a piece at a time."""
    whole = np.load(path, mmap_mode="r")
    kept = np.flatnonzero(~dropped)
    with atomic_path(path) as temporary:
        array = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.uint8, shape=(len(kept), *whole.shape[1:])
        )
        for start in range(0, len(kept), _PIECE):
            array[start : start + _PIECE] = whole[kept[start : start + _PIECE]]
        array.flush()


def _describe(
    folder: Path, listing: Listing, rows: dict[str, NDArray[np.int64]], skipped: list[int]
) -> PreparedMeta:
    mean, std = _mean_and_std(np.load(folder / _images("train"), mmap_mode="r"))
    files = {path.name: file_digest(path) for path in sorted(folder.glob("*.npy"))}
    return PreparedMeta(
        class_names=listing.class_names,
        mean=mean,
        std=std,
        num_images={name: len(own) for name, own in rows.items()},
        skipped=tuple(sorted(listing.names[index] for index in skipped)),
        files=files,
        digest=digest_of({"files": files, "class_names": listing.class_names}),
    )


def _mean_and_std(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, pixels in [0, 1], from exact sums; a constant channel counts as spread 1."""
    num_channels = images.shape[1]
    counts = np.zeros((num_channels, 256), np.int64)
    rows = max(1, _PIXELS // images[0, 0].size)
    for start in range(0, len(images), rows):
        piece = images[start : start + rows]
        for channel in range(num_channels):
            counts[channel] += np.bincount(piece[:, channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    total = counts.sum(1)
    mean = counts @ values / total
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / total
    std = np.where(variance > 0, np.sqrt(variance), 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())
