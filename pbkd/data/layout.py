"""Labels and splits out of paths: ``split/class/image``, or ``class/image`` for a seed to split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import numpy as np

from pbkd.data.sources import Listing
from pbkd.errors import DataError

_SPLIT_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
EXTENSIONS = {
    f".{name}": kind
    for kind, names in {
        "JPEG": "jpg jpeg jpe jfif",
        "PNG": "png",
        "BMP": "bmp dib",
        "GIF": "gif",
        "TIFF": "tif tiff",
        "WEBP": "webp",
        "PPM": "ppm pgm pbm pnm",
        "JPEG2000": "jp2",
        "TGA": "tga",
    }.items()
    for name in names.split()
}
"""File name endings that count as images, and Pillow's names of the formats."""

_EXPECTED = "expected split/class/image (train/cat/1.jpg) or class/image (cat/1.jpg)"


def is_image(path: str) -> bool:
    """Whether a path names an image; hidden files and folders do not count."""
    pure = PurePosixPath(path)
    hidden = any(
        (part.startswith(".") and part != "..") or part == "__MACOSX" for part in pure.parts
    )
    return not hidden and pure.suffix.lower() in EXTENSIONS


def read_layout(paths: Sequence[str], folders: Iterable[str], where: str) -> Listing:
    """Class and split of every image.

    Folders that hold everything are skipped over. With two splits, the one that is not `train` is
    the test split, whatever its name. Folders below a class belong to it.

    Args:
        paths: of the images, with slashes.
        folders: all folders, also those without images.
        where: the source, for messages.

    Raises:
        DataError: no images, images outside of class folders, an empty class, fewer than two
            classes, or splits that do not have the same classes.
    """
    if not paths:
        endings = ", ".join(sorted(EXTENSIONS))
        raise DataError(f"{where}: no image found; {_EXPECTED}; endings: {endings}")
    parts = [PurePosixPath(path).parts for path in paths]
    depth = _wrapping_folders(parts)
    inner = [own[depth:] for own in parts]
    _check_depth(paths, inner, 2, where)
    has_splits = _has_splits(inner, where)
    level = 1 if has_splits else 0
    _check_depth(paths, inner, level + 2, where)
    prefix = parts[0][:depth]
    empty = _empty_classes(inner, folders, prefix, level)
    if empty:
        raise DataError(
            f"{where}: class folder {empty[0]} holds no image; add images, or remove the folder"
        )
    names = sorted({own[level] for own in inner})
    if len(names) < 2:
        raise DataError(f"{where}: one class, `{names[0]}`, expected at least two; {_EXPECTED}")
    if has_splits:
        _check_same_classes(inner, names, where)
    index = {name: number for number, name in enumerate(names)}
    return Listing(
        class_names=tuple(names),
        names=tuple(paths),
        labels=np.array([index[own[level]] for own in inner], np.int64),
        splits=_splits(inner) if has_splits else None,
        channels=3,
    )


def _check_depth(
    paths: Sequence[str], parts: Sequence[tuple[str, ...]], depth: int, where: str
) -> None:
    loose = next((path for path, own in zip(paths, parts, strict=True) if len(own) < depth), None)
    if loose is not None:
        raise DataError(f"{where}: {loose} lies in no class folder; {_EXPECTED}")


def _wrapping_folders(parts: Sequence[tuple[str, ...]]) -> int:
    """How many leading folders hold everything and are neither split nor class."""
    depth = 0
    shortest = min(map(len, parts))
    while shortest - depth > 2 and len({own[depth] for own in parts}) == 1:
        depth += 1
    return depth


def _has_splits(parts: Sequence[tuple[str, ...]], where: str) -> bool:
    tops = {own[0] for own in parts}
    others = {name for name in tops if name.lower() not in _SPLIT_OF}
    splits = {_SPLIT_OF[name.lower()] for name in tops - others}
    if len(splits) > 1 and others and "train" in splits:
        raise DataError(
            f"{where}: {min(others)} lies beside {' and '.join(sorted(tops - others))}; expected "
            "splits only, or classes only; move it elsewhere"
        )
    if len(splits) > 1 and not others and "train" not in splits:
        raise DataError(f"{where}: {' and '.join(sorted(tops))}, but no train; {_EXPECTED}")
    return len(splits) > 1 and not others


def _splits(parts: Sequence[tuple[str, ...]]) -> np.ndarray[tuple[int], np.dtype[np.str_]]:
    found = [_SPLIT_OF[own[0].lower()] for own in parts]
    if len(set(found)) == 2:
        found = [name if name == "train" else "test" for name in found]
    return np.array(found)


def _empty_classes(
    parts: Sequence[tuple[str, ...]],
    folders: Iterable[str],
    prefix: tuple[str, ...],
    level: int,
) -> list[str]:
    used = {own[: level + 1] for own in parts}
    tops = {own[0] for own in parts} if level else None
    empty = []
    for folder in sorted(folders):
        own = PurePosixPath(folder).parts
        if own[: len(prefix)] != prefix or any(part.startswith((".", "__")) for part in own):
            continue
        own = own[len(prefix) :]
        is_class = len(own) == level + 1 and (tops is None or own[0] in tops)
        if is_class and own not in used:
            empty.append(folder)
    return empty


def _check_same_classes(parts: Sequence[tuple[str, ...]], names: list[str], where: str) -> None:
    for split in sorted({own[0] for own in parts}):
        missing = set(names) - {own[1] for own in parts if own[0] == split}
        if missing:
            raise DataError(
                f"{where}: split {split} has no class `{min(missing)}`, another split has; "
                f"expected the same {len(names)} classes in each"
            )
