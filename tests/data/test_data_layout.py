"""Classes and splits out of paths."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from pbkd.data.layout import EXTENSIONS, is_image, read_layout
from pbkd.data.sources import Listing
from pbkd.errors import DataError

TWO = ("cat/1.png", "dog/1.png")


def _under(*folders: str, paths: tuple[str, ...] = TWO) -> list[str]:
    return [f"{folder}/{path}" for folder in folders for path in paths]


def _folders(paths: list[str]) -> set[str]:
    parents = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    return parents - {"."}


def _read(paths: list[str], *empty: str) -> Listing:
    return read_layout(paths, _folders([*paths, *(f"{name}/x" for name in empty)]), "SOURCE")


def _as_dict(listing: Listing) -> dict[str, tuple[str | None, str]]:
    """Split and class of every path."""
    splits = [None] * len(listing) if listing.splits is None else listing.splits.tolist()
    classes = [listing.class_names[label] for label in listing.labels]
    return dict(zip(listing.names, zip(splits, classes, strict=True), strict=True))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train", "val", "test"), ("train", "val", "test")),
        (("training", "valid", "testing"), ("train", "val", "test")),
        (("TRAIN", "Validation", "Test"), ("train", "val", "test")),
        (("Training", "VAL", "TESTING"), ("train", "val", "test")),
        (("train", "test"), ("train", "test")),
        (("train", "val"), ("train", "test")),
        (("Train", "Valid"), ("train", "test")),
        (("training", "validation"), ("train", "test")),
        (("train", "training", "test"), ("train", "train", "test")),
        (("train", "val", "validation", "test"), ("train", "val", "val", "test")),
    ],
    ids=lambda names: "-".join(names),
)
@pytest.mark.parametrize("wrapping", ["", "set/", "a/train/b.c/"])
def test_split_folders(wrapping: str, names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    listing = _read([f"{wrapping}{path}" for path in _under(*names)])
    assert listing.class_names == ("cat", "dog")
    assert _as_dict(listing) == {
        f"{wrapping}{name}/{own}/1.png": (split, own)
        for name, split in zip(names, expected, strict=True)
        for own in ("cat", "dog")
    }


@pytest.mark.parametrize("wrapping", ["", "set/", "set/images/", "train/", "set/train/", "test/"])
def test_classes_without_splits(wrapping: str) -> None:
    """A single split folder is one that holds everything: the seed splits it."""
    paths = [f"{wrapping}{path}" for path in TWO]
    assert _as_dict(_read(paths)) == {paths[0]: (None, "cat"), paths[1]: (None, "dog")}


def test_a_class_may_have_the_name_of_a_split() -> None:
    listing = _read(["train/1.png", "bus/1.png", "tram/1.png"])
    assert listing.splits is None
    assert listing.class_names == ("bus", "train", "tram")


@pytest.mark.parametrize("below", ["sub", "sub/deeper", "train", "dog"])
@pytest.mark.parametrize("top", ["", "train/"])
def test_folders_below_a_class_belong_to_it(top: str, below: str) -> None:
    paths = [f"{top}cat/{below}/1.png", f"{top}cat/2.png", f"{top}dog/{below}/3.png"]
    others = _under("test") if top else []
    found = _as_dict(_read([*paths, *others]))
    split = "train" if top else None
    assert [found[path] for path in paths] == [(split, "cat"), (split, "cat"), (split, "dog")]


def test_labels_follow_the_sorted_names() -> None:
    listing = _read(["b/1.png", "a/1.png", "B/1.png", "10/1.png", "9/1.png", "ä/1.png"])
    assert listing.class_names == ("10", "9", "B", "a", "b", "ä")
    assert listing.labels.tolist() == [4, 3, 2, 0, 1, 5]
    assert listing.labels.dtype == "int64"
    assert listing.channels == 3


@pytest.mark.parametrize("ending", sorted(EXTENSIONS))
def test_known_endings_are_images(ending: str) -> None:
    assert is_image(f"cat/1{ending}")
    assert is_image(f"cat/1{ending.upper()}")
    assert not is_image(f"cat/1{ending}.txt")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("./cat/1.png", True),
        ("cat/__1__.png", True),
        ("__cat/1.png", True),
        ("cat/..1.png", False),
        ("cat/._1.png", False),
        ("cat/.1.png", False),
        (".git/cat/1.png", False),
        ("cat/.cache/1.png", False),
        ("__MACOSX/cat/1.png", False),
        ("set/__MACOSX/cat/1.png", False),
        ("cat/1", False),
        ("cat/.png", False),
        ("cat/png", False),
        ("cat/1.npy", False),
        ("cat/1.png~", False),
        ("README.md", False),
    ],
)
def test_hidden_files_and_others_are_no_images(path: str, expected: bool) -> None:
    assert is_image(path) is expected


def test_a_path_that_leaves_its_folder_is_no_hidden_one() -> None:
    """It must reach the check of an archive's members."""
    assert is_image("../cat/1.png")
    assert is_image("cat/../../1.png")


@pytest.mark.parametrize("empty", [".cache", ".cat", "__MACOSX", "__pycache__", "cat/sub"])
def test_folders_that_do_not_count_may_be_empty(empty: str) -> None:
    assert len(_read(list(TWO), empty)) == 2


@pytest.mark.parametrize(
    ("paths", "empty"),
    [
        (_under("train", "test"), "other"),  # beside the splits
        (_under("train", "test"), "other/bird"),
        (_under("set"), "other"),  # beside the folder that holds everything
        (_under("train"), "test/cat"),
        (_under("train", "test"), "train/cat/sub"),
    ],
)
def test_empty_folders_elsewhere_are_no_classes(paths: list[str], empty: str) -> None:
    assert _read(paths, empty).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("paths", "empty"),
    [
        (list(TWO), "bird"),
        (_under("set"), "set/bird"),
        (_under("train"), "train/bird"),
        (_under("train", "test"), "train/bird"),
        (_under("train", "test"), "test/bird"),
        (_under("set/Train", "set/Val"), "set/Val/bird"),
        ([*_under("train"), "test/cat/1.png"], "test/dog"),
    ],
)
def test_an_empty_class_folder_is_named(paths: list[str], empty: str) -> None:
    with pytest.raises(DataError, match=f"SOURCE: class folder {empty} holds no image; add"):
        _read(paths, empty)


@pytest.mark.parametrize(
    ("paths", "loose"),
    [
        ([*TWO, "logo.png"], "logo.png"),
        (["logo.png"], "logo.png"),
        ([*_under("train", "test"), "test/1.png"], "test/1.png"),
        (["train/1.png", "test/1.png"], "train/1.png"),
        ([*_under("train", "test"), "1.png"], "1.png"),
    ],
)
def test_an_image_in_no_class_folder_is_named(paths: list[str], loose: str) -> None:
    with pytest.raises(DataError, match=f"SOURCE: {loose} lies in no class folder; expected split"):
        _read(paths)


@pytest.mark.parametrize(
    "paths",
    [
        ["cat/1.png", "cat/2.png"],
        ["set/cat/1.png"],
        ["train/cat/1.png", "test/cat/1.png"],
        ["train/cat/1.png"],
    ],
)
def test_one_class_is_refused(paths: list[str]) -> None:
    with pytest.raises(DataError, match="SOURCE: one class, `cat`, expected at least two; "):
        _read(paths)


@pytest.mark.parametrize(
    ("missing", "split", "name"),
    [
        ("train/cat/1.png", "train", "cat"),
        ("val/dog/1.png", "val", "dog"),
        ("test/cat/1.png", "test", "cat"),
    ],
)
def test_splits_with_other_classes_are_refused(missing: str, split: str, name: str) -> None:
    paths = [path for path in _under("train", "val", "test") if path != missing]
    expected = f"split {split} has no class `{name}`, another split has; expected the same 2"
    with pytest.raises(DataError, match=expected):
        _read(paths)


def test_no_image_at_all_is_refused() -> None:
    with pytest.raises(DataError, match=r"SOURCE: no image found; expected .*endings: \.bmp, "):
        read_layout([], ["train", "train/cat"], "SOURCE")
