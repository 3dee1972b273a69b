"""The cache on disk: its layout, and filling that is shared out, interrupted, resumed."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pbkd.activations import both_sides, cache_keys, finish_fill, side_bytes
from pbkd.activations.cache import VAL
from pbkd.activations.shards import KIND, ShardGrid
from pbkd.artifacts import MARKER, Store, link_tree, load_tensors
from pbkd.blocks import find_blocks
from pbkd.config import ActivationsConfig, AugmentConfig, BlocksConfig
from pbkd.errors import ArtifactError
from tests.activations.cached import (
    CARD,
    CONFIG,
    NUM_TRAIN,
    NUM_VAL,
    VGG_PATHS,
    Setup,
    assert_same_source,
    vgg,
)

PER_IMAGE = {
    "features.3": (4 * 64, 4 * 64),
    "features.14": (8 * 4, 16 * 4),
    "features.7": (4 * 16, 8 * 16),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------- layout


def test_the_cache_is_as_large_as_predicted(setup: Setup) -> None:
    setup.fill()
    config = BlocksConfig(select="paths", paths=tuple(setup.paths))
    blocks = find_blocks(setup.teacher.net, config, torch.rand(1, 1, 8, 8)).blocks
    num_images = 2 * NUM_TRAIN + NUM_VAL
    for block in blocks:
        for side, elements in zip(("input", "output"), PER_IMAGE[block.path], strict=True):
            on_disk = sum(
                load_tensors(shard)["rows"].nbytes
                for view in (0, 1, VAL)
                for shard in setup.item(block.path, side, view).glob("*.safetensors")
            )
            assert on_disk == 2 * elements * num_images
            assert side_bytes(block, side, CONFIG, num_images) == on_disk


def test_a_shard_is_a_safetensors_file_of_rows_with_the_channels_last(setup: Setup) -> None:
    setup.fill()
    images = setup.train.view(1, torch.arange(7, 14))
    expected = setup.capture(images, ["features.7"], fill_to=8)["features.7"].output
    with safe_open(setup.shard("features.7", "output", 1, 1), "pt") as file:
        assert file.metadata() == {"layout": "nhwc"}
        assert list(file.keys()) == ["rows"]
        assert torch.equal(file.get_tensor("rows"), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("num_rows", "chunk", "rows_per_shard"),
    [
        (26, 7, 7),  # a shard per chunk
        (26, 1, 2),  # 26 chunks in 16 shards at most
        (50_000, 512, 2048),  # 98 chunks: 2048 rows, fewer than 7 chunks
        (50_000, 4096, 4096),  # a chunk at least
        (10, 512, 512),
        (1_200_000, 100, 2000),  # whole chunks
    ],
)
def test_a_shard_holds_whole_chunks(num_rows: int, chunk: int, rows_per_shard: int) -> None:
    grid = ShardGrid(num_rows, chunk)
    assert grid.rows_per_shard == rows_per_shard
    assert torch.equal(
        torch.cat([grid.rows(index) for index in range(grid.num_shards)]), torch.arange(num_rows)
    )
    assert all(len(grid.rows(index)) for index in range(grid.num_shards))


def test_an_item_is_whole_for_the_store(setup: Setup, tmp_path: Path) -> None:
    setup.fill()
    other = Store(tmp_path / "other")
    for name, key in setup.keys.items():
        setup.store.verify(KIND, key)
        item = setup.item(*name)
        assert {path.name for path in item.iterdir() if path.suffix != ".safetensors"} == {MARKER}
        output = tmp_path / "artifacts" / key
        link_tree(item, output)
        assert other.adopt(KIND, output)
        assert contents(other.path(KIND, key)) == contents(item)
    items = {path.name for path in (setup.store.root / KIND).iterdir()}
    assert items == set(setup.keys.values())  # no parts folder stays


# ---------------------------------------------------------------- what is missing


def test_what_is_there_is_not_made_again(setup: Setup) -> None:
    setup.fill()
    passes = setup.passes()
    setup.fill()
    assert passes == []


def test_only_what_is_missing_is_made(setup: Setup) -> None:
    setup.fill()
    markers = {key: setup.item(*key) / MARKER for key in setup.keys}
    before = {key: marker.stat().st_ino for key, marker in markers.items()}
    setup.shard("features.3", "output", 1, 0).unlink()
    passes = setup.passes()
    setup.fill()
    assert passes == [8] * 4  # 26 images in shards of 7, each one pass of the capture batch
    after = {key: marker.stat().st_ino for key, marker in markers.items()}
    assert {key for key in before if before[key] != after[key]} == {("features.3", "output", 1)}
    assert_same_source(setup)


def test_one_pass_feeds_all_sides_and_sides_can_be_cached_alone(setup: Setup) -> None:
    setup.keys = cache_keys(CARD, CONFIG, 0, [("features.3", "output"), ("features.14", "input")])
    setup.cut_at("features.7")
    passes = setup.passes()
    setup.fill()
    assert passes == [8] * (4 + 4 + 2)
    assert len(list((setup.store.root / KIND).iterdir())) == 3 * 3
    cuts = setup.cache().val_cut("features.7")
    for x_nchw, batch in zip(cuts, setup.relay().val(["features.7"]), strict=True):
        assert torch.equal(x_nchw.half(), batch["features.7"].input)


def test_views_that_are_one_are_made_once(tmp_path: Path) -> None:
    setup = Setup(tmp_path, vgg(), VGG_PATHS, augment=AugmentConfig())
    passes = setup.passes()
    setup.fill()
    assert passes == [8] * (4 + 2)
    assert_same_source(setup)


# ---------------------------------------------------------------- parallel, interrupted


@pytest.mark.parametrize("num_parts", [2, 3, 9])
def test_parts_give_what_one_filling_gives_and_share_the_work(
    tmp_path: Path, num_parts: int
) -> None:
    whole, shared = (Setup(tmp_path / name, vgg(), VGG_PATHS) for name in ("whole", "shared"))
    whole.fill()
    passes = shared.passes()
    for part in reversed(range(num_parts)):
        shared.fill_part(part, num_parts)
    assert passes == [8] * (4 + 4 + 2)  # as one filling: no shard twice
    finish_fill(shared.store, shared.keys)
    assert contents(shared.store.root) == contents(whole.store.root)


def test_a_part_writes_its_shards_alone(setup: Setup) -> None:
    setup.fill_part(1, 3)
    written = {path.name for path in setup.store.root.rglob("shard-*.safetensors")}
    # number 1 of the first view, 0 and 3 of the second
    assert written == {f"shard-{number:05d}.safetensors" for number in (0, 1, 3)}


def test_unfinished_parts_are_named(setup: Setup) -> None:
    with pytest.raises(ArtifactError, match=r"features\.3 input view 0: all shards; .* 15 more"):
        finish_fill(setup.store, setup.keys)
    setup.fill_part(0, 2)
    with pytest.raises(ArtifactError) as caught:
        finish_fill(setup.store, setup.keys)
    assert "features.3 input view 0: 2 of 4 shards (number 1, 3)" in str(caught.value)
    assert str(caught.value).endswith("run again to fill it")
    assert not any(setup.store.has(KIND, key) for key in setup.keys.values())
    setup.fill_part(1, 2)
    finish_fill(setup.store, setup.keys)
    assert_same_source(setup)


def fail_at(batch: int) -> Callable[[], None]:
    """To be called after each batch: raises at one of them."""
    count = 0

    def after_batch() -> None:
        nonlocal count
        count += 1
        if count == batch:
            raise KeyboardInterrupt

    return after_batch


@pytest.mark.parametrize(
    ("capture_batch", "failing", "num_left"),
    [
        (3, 16, 13),  # passes of a view of the training split: 3 + 3 + 3 + 2
        (8, 6, 5),
    ],
)
def test_an_interrupted_filling_loses_the_shards_in_work_alone(
    tmp_path: Path, capture_batch: int, failing: int, num_left: int
) -> None:
    whole, setup = (
        Setup(tmp_path / name, vgg(), VGG_PATHS, capture_batch=capture_batch)
        for name in ("whole", "interrupted")
    )
    whole.fill()
    passes = setup.passes()
    with pytest.raises(KeyboardInterrupt):
        setup.fill_part(after_batch=fail_at(failing))
    written = sorted(setup.store.root.rglob("shard-*.safetensors"))
    assert len(written) == 5 * len(setup.paths) * 2
    assert list(setup.store.root.rglob(".*")) == []
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in written}
    passes.clear()
    setup.fill_part()
    assert len(passes) == num_left
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in written}
    finish_fill(setup.store, setup.keys)
    assert contents(setup.store.root) == contents(whole.store.root)


def test_what_a_killed_filling_left_is_swept(setup: Setup) -> None:
    with pytest.raises(KeyboardInterrupt):
        setup.fill_part(after_batch=fail_at(1))
    shard = next(setup.store.root.rglob("item")) / "shard-00000.safetensors"
    left = shard.with_name(f".{shard.name}.{socket.gethostname()}-999999999-1.tmp")
    left.write_bytes(b"half a shard")
    shard.write_bytes(b"renamed, but its sidecar was never written")
    setup.fill()
    assert list(setup.store.root.rglob(".*")) == []
    assert_same_source(setup)


def test_a_finish_that_was_killed_is_finished_by_the_next(setup: Setup, tmp_path: Path) -> None:
    whole = Setup(tmp_path / "whole", vgg(), VGG_PATHS)
    whole.fill()
    setup.fill_part()
    for item in (setup.store.root / KIND).glob("*.parts/item"):
        (item / MARKER).write_text("{}")  # as if killed before the rename
    finish_fill(setup.store, setup.keys)
    assert contents(setup.store.root) == contents(whole.store.root)


def test_more_epochs_of_views_are_added_to_what_is_there(setup: Setup) -> None:
    setup.fill()
    passes = setup.passes()
    config = ActivationsConfig(views=3, chunk=7)
    setup.keys = cache_keys(CARD, config, 0, both_sides(setup.paths))
    setup.fill()
    assert passes == [8] * 4
