"""The prepared data set: splits, checksums, and files that are not what they should be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pbkd.artifacts import file_digest
from pbkd.config import PrepareConfig
from pbkd.data import Prepared, load_prepared
from pbkd.data import prepare as prepare_from
from pbkd.data.prepare import SPLITS
from pbkd.data.sources import DigitsSource
from pbkd.errors import ArtifactError, DataError

CONFIG = PrepareConfig(image_size=8)


def prepare(config: PrepareConfig, seed: int, folder: Path) -> Prepared:
    return prepare_from(config, seed, folder, folder.parent, folder.parent / "downloads")


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return prepare(CONFIG, 0, tmp_path / "prepared")


def _images(prepared: Prepared) -> Counter[tuple[bytes, int]]:
    return Counter(
        (image.tobytes(), int(label))
        for split in map(prepared.split, SPLITS)
        for image, label in zip(split.images, split.labels, strict=True)
    )


def test_splits_hold_every_image_with_its_label_once(prepared: Prepared) -> None:
    source = DigitsSource()
    labels = source.listing.labels
    expected = Counter(
        (opener().tobytes(), int(labels[index]))
        for index, opener in source.images(np.ones(len(labels), bool))
    )
    assert len(labels) == 1797
    assert _images(prepared) == expected


def test_splits_have_the_sizes_of_the_fractions(prepared: Prepared) -> None:
    num_test = round(1797 * 0.2)
    num_val = round((1797 - num_test) * 0.15)
    expected = {"train": 1797 - num_test - num_val, "val": num_val, "test": num_test}
    assert prepared.meta.num_images == expected
    assert {name: len(prepared.split(name)) for name in SPLITS} == expected


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_has_all_classes_mixed(prepared: Prepared, name: str) -> None:
    labels = prepared.split(name).labels
    assert set(labels.tolist()) == set(range(10))
    assert set(labels[:60].tolist()) == set(range(10))


def test_arrays_are_uint8_nchw(prepared: Prepared) -> None:
    assert prepared.image_shape == (1, 8, 8)
    assert prepared.num_classes == 10
    split = prepared.split("train")
    assert split.images.dtype == np.uint8
    assert split.images.max() == 255
    assert split.labels.dtype == np.int64


def test_mean_and_std_are_of_the_training_split(prepared: Prepared) -> None:
    pixels = prepared.split("train").images.astype(np.float64) / 255
    assert prepared.meta.mean == pytest.approx((pixels.mean(),))
    assert prepared.meta.std == pytest.approx((pixels.std(),))


def test_the_seed_alone_decides_the_splits(prepared: Prepared, tmp_path: Path) -> None:
    again = prepare(CONFIG, 0, tmp_path / "again")
    other = prepare(CONFIG, 1, tmp_path / "other")
    assert again.meta == prepared.meta
    assert other.meta.digest != prepared.meta.digest
    assert not np.array_equal(other.split("test").labels, prepared.split("test").labels)


def test_checksums_are_those_of_the_files(prepared: Prepared) -> None:
    assert set(prepared.meta.files) == {
        f"{s}_{k}.npy" for s in SPLITS for k in ("images", "labels")
    }
    for name, digest in prepared.meta.files.items():
        assert file_digest(prepared.folder / name) == digest


def test_loading_gives_what_was_prepared(prepared: Prepared) -> None:
    loaded = load_prepared(prepared.folder)
    assert loaded.meta == prepared.meta
    assert np.array_equal(loaded.split("val").images, prepared.split("val").images)


def test_a_split_without_a_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split train: no image of class '"):
        prepare(PrepareConfig(image_size=8, limit=9), 0, tmp_path / "prepared")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fraction", [0.0001, 0.1, 0.3])
def test_the_seed_draws_the_same_share_of_each_class(tmp_path: Path, fraction: float) -> None:
    config = PrepareConfig(image_size=8, val_fraction=fraction)
    prepared = prepare(config, 0, tmp_path / "prepared")
    counts = {name: np.bincount(prepared.split(name).labels) for name in SPLITS}
    of_rest = counts["val"] / (counts["val"] + counts["train"])
    assert counts["val"].min() >= 1
    assert of_rest == pytest.approx(np.full(10, max(fraction, 10 / 1438)), abs=0.005)


@pytest.mark.parametrize("kept", [0, 5, 200])
@pytest.mark.parametrize("name", ["val_images.npy", "val_labels.npy"])
def test_a_truncated_array_is_named_with_its_split(
    prepared: Prepared, name: str, kept: int
) -> None:
    path = prepared.folder / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"split val cannot be read .*; run: pbkd prepare"):
        prepared.split("val")


def test_a_missing_array_is_named_with_its_split(prepared: Prepared) -> None:
    (prepared.folder / "test_images.npy").unlink()
    with pytest.raises(ArtifactError, match="split test cannot be read"):
        prepared.split("test")


def test_a_description_of_another_version_is_refused(prepared: Prepared) -> None:
    (prepared.folder / "meta.json").write_text('{"class_names": ["a"]}')
    with pytest.raises(ArtifactError, match=r"meta\.json is not of this version"):
        load_prepared(prepared.folder)
