"""Cache and relay give the same activations, bit for bit; what a key of the cache depends on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from pbkd.activations import Resume, ResumedSource, Side, Source, cache_key
from pbkd.activations.cache import VAL, View, cache_views
from pbkd.activations.reader import CachedSide
from pbkd.config import ActivationsConfig, AugmentConfig
from pbkd.models import ModelCard
from pbkd.testing import OverwritingNet
from tests.activations.cached import (
    CARD,
    CONFIG,
    VGG_PATHS,
    Setup,
    TokenNet,
    assert_equal,
    assert_same_source,
    vgg,
)

OWN_PATHS = ["stem", "branch", "entry", "tail"]


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- equivalence


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(
    ("dtype", "views", "chunk", "batch_size", "capture_batch"),
    [
        ("float16", 1, 100, 5, 8),  # one shard
        ("float16", 2, 7, 5, 8),  # nothing divides anything; a last validation batch of one
        ("bfloat16", 2, 7, 5, 8),
        ("float32", 2, 7, 5, 8),
        ("float32", 3, 3, 8, 5),  # a batch needs several shards
        ("float32", 2, 13, 13, 26),  # all divide
        ("float32", 1, 1, 10, 2),  # shards of two chunks of one image
    ],
)
def test_cache_equals_relay(
    tmp_path: Path,
    dtype: Literal["float16", "bfloat16", "float32"],
    views: int,
    chunk: int,
    batch_size: int,
    capture_batch: int,
    resident: bool,
) -> None:
    config = ActivationsConfig(views=views, chunk=chunk, dtype=dtype)
    setup = Setup(
        tmp_path, vgg(), VGG_PATHS, config, batch_size=batch_size, capture_batch=capture_batch
    )
    setup.fill()
    assert_same_source(setup, resident=resident)


@pytest.mark.parametrize("resident", [False, True])
def test_cache_equals_relay_where_activations_are_no_images(tmp_path: Path, resident: bool) -> None:
    torch.manual_seed(0)
    setup = Setup(tmp_path, TokenNet(), ["mix", "head"])
    setup.fill()
    batch = next(setup.cache().val(setup.paths))
    assert batch["mix"].input.shape[1:] == (64, 3)
    assert batch["head"].input.shape[1:] == (5,)
    assert_same_source(setup, resident=resident)


def test_cache_equals_relay_where_activations_are_overwritten(tmp_path: Path) -> None:
    torch.manual_seed(0)
    setup = Setup(tmp_path, OverwritingNet(), OWN_PATHS)
    assert len(setup.capture.overwritten) == 3
    setup.fill()
    assert_same_source(setup)


def test_cache_equals_relay_without_augmentation(tmp_path: Path) -> None:
    setup = Setup(tmp_path, vgg(), VGG_PATHS, augment=AugmentConfig())
    setup.fill()
    assert_same_source(setup)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("writing", [1, 2])
@pytest.mark.parametrize("reading", [1, 2])
def test_cache_equals_relay_with_any_number_of_threads(
    setup: Setup, writing: int, reading: int
) -> None:
    torch.set_num_threads(writing)
    setup.fill()
    torch.set_num_threads(reading)
    assert_same_source(setup)


@pytest.mark.parametrize("resident", [False, True])
def test_a_cut_is_the_exact_input(setup: Setup, resident: bool) -> None:
    setup.cut_at("features.7")
    setup.fill()
    source, relay = setup.cache(resident=resident), setup.relay()
    for alone, pairs in (
        (source.cut(1, "features.7"), relay.epoch(1, ["features.7"])),
        (source.val_cut("features.7"), relay.val(["features.7"])),
    ):
        for x_nchw, batch in zip(alone, pairs, strict=True):
            assert x_nchw.dtype == torch.float32
            assert not torch.equal(x_nchw.half().float(), x_nchw)
            assert torch.equal(x_nchw.half(), batch["features.7"].input)


@pytest.mark.parametrize("resident", [False, True])
def test_images_come_in_channels_last_strides(setup: Setup, resident: bool) -> None:
    setup.fill()
    for batch in setup.cache(resident=resident).epoch(0, setup.paths):
        for both in batch.values():
            for x in (both.input, both.output):
                _, channels, height, width = x.shape
                assert x.stride() == (height * width * channels, 1, width * channels, channels)


@pytest.mark.parametrize("kind", ["cache", "relay"])
def test_a_part_of_the_blocks_and_another_pass_give_the_same(setup: Setup, kind: str) -> None:
    setup.fill()
    source: Source = setup.cache() if kind == "cache" else setup.relay()
    whole = list(source.epoch(1, setup.paths))
    for path in setup.paths:
        alone = [{path: batch[path]} for batch in whole]
        assert assert_equal(source.epoch(1, [path]), iter(alone)) == 25
    assert assert_equal(source.epoch(1, setup.paths), iter(whole)) == 25


def _source(setup: Setup, kind: str) -> Source:
    if kind == "relay":
        return setup.relay()
    if kind in ("cache", "resident"):
        return setup.cache(resident=kind == "resident")
    images = setup.val.plain(torch.arange(4))
    return ResumedSource(Resume(setup.capture, "features.7", images), setup.cache(), "features.7")


@pytest.mark.parametrize("kind", ["relay", "cache", "resident", "cut"])
@pytest.mark.parametrize("skip", [0, 1, 4, 5, 9])
def test_batches_are_skipped_without_work(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, kind: str, skip: int
) -> None:
    setup.cut_at("features.7")
    setup.fill()
    source, paths = _source(setup, kind), ["features.7", "features.14"]
    whole = list(source.epoch(1, paths))
    assert len(whole) == 5
    passes = setup.passes()
    read: list[int] = []
    rows_of = CachedSide.read

    def count(side: CachedSide, rows: torch.Tensor, *, pin_memory: bool) -> torch.Tensor:
        read.append(len(rows))
        return rows_of(side, rows, pin_memory=pin_memory)

    monkeypatch.setattr(CachedSide, "read", count)
    num = assert_equal(source.epoch(1, paths, skip), iter(whole[skip:]))
    left = max(0, 5 - skip)
    assert num == 5 * left
    assert len(passes) == (left if kind in ("relay", "cut") else 0)
    assert len(read) == left * {"relay": 0, "cache": 4, "resident": 0, "cut": 1}[kind]


def test_views_differ_in_the_cache_and_return(setup: Setup) -> None:
    setup.fill()
    source, path = setup.cache(), setup.paths[0]
    by_row = []
    for epoch in (0, 1, 2):
        batches = list(source.epoch(epoch, [path]))
        rows = torch.cat(list(setup.train.rows(epoch, setup.batch_size)))
        inputs = torch.cat([batch[path].input for batch in batches])
        by_row.append(dict(zip(rows.tolist(), inputs, strict=True)))
    first, second, third = by_row
    assert all(torch.equal(first[row], third[row]) for row in first.keys() & third.keys())
    assert any(not torch.equal(first[row], second[row]) for row in first.keys() & second.keys())


# ---------------------------------------------------------------- keys


def _key(view: View = 0, side: Side = "input", **changes: object) -> str:
    card_changes = {name: changes.pop(name) for name in list(changes) if name in CARD_FIELDS}
    seed, path = changes.pop("seed", 0), changes.pop("path", "features.3")
    card = CARD.model_copy(update=card_changes)
    config = CONFIG.model_copy(update=changes)
    assert isinstance(seed, int)
    assert isinstance(path, str)
    return cache_key(card, config, seed, path, side, view)


CARD_FIELDS = set(ModelCard.model_fields)


@pytest.mark.parametrize("view", [0, VAL])
@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "other"},
        {"data_digest": "other"},
        {"dtype": "bfloat16"},
        {"chunk": 8},
        {"path": "features.7"},
    ],
    ids=str,
)
def test_a_key_changes_with_what_the_contents_depend_on(
    changes: dict[str, object], view: View
) -> None:
    assert _key(view, **changes) != _key(view)


AUGMENTATION = [
    {"augment": AugmentConfig(pad=2, flip=True)},
    {"augment": AugmentConfig()},
    {"seed": 1},
]


@pytest.mark.parametrize("changes", AUGMENTATION, ids=str)
def test_augmentation_changes_the_keys_of_the_training_split_alone(
    changes: dict[str, object],
) -> None:
    assert _key(0, **changes) != _key(0)
    assert _key(VAL, **changes) == _key(VAL)


@pytest.mark.parametrize("view", [0, VAL])
@pytest.mark.parametrize(
    "changes",
    [
        {"views": 5},
        {"max_cache_gb": 1.0},
        {"source": "relay"},
        {"class_names": ("x", "y", "z")},
    ],
    ids=str,
)
def test_a_key_changes_with_nothing_else(changes: dict[str, object], view: View) -> None:
    assert _key(view, **changes) == _key(view)


def test_every_view_has_a_key() -> None:
    assert cache_views(ActivationsConfig(views=3)) == [0, 1, 2, VAL]
    assert len({_key(view) for view in (0, 1, 2, VAL)}) == 4


def test_input_and_output_have_keys_of_their_own() -> None:
    for view in (0, VAL):
        assert _key(view, "input") != _key(view, "output")
