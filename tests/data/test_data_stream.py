"""The one stream: order and augmentation as functions of (seed, epoch, sample) alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pbkd.config import AugmentConfig
from pbkd.data import Split, Stream
from pbkd.testing import random_split

NUM = 23
PLAIN = AugmentConfig()
BOTH = AugmentConfig(pad=2, flip=True)


def _stream(
    *,
    num: int = NUM,
    seed: int = 0,
    augment: AugmentConfig = BOTH,
    views: int | None = None,
    chunk: int | None = None,
) -> Stream:
    split = random_split(num, channels=2, size=8)
    return Stream(split, seed=seed, augment=augment, views=views, chunk=chunk)


def _by_row(stream: Stream, epoch: int, batch_size: int) -> dict[int, Tensor]:
    return {
        int(row): image
        for batch in stream.epoch(epoch, batch_size)
        for row, image in zip(batch.rows, batch.images_nchw, strict=True)
    }


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, NUM - 1, NUM, 100])
def test_an_epoch_is_a_permutation_that_keeps_chunks_together(chunk: int | None) -> None:
    order = _stream(chunk=chunk).order(3)
    assert sorted(order.tolist()) == list(range(NUM))
    chunk_of = order // (chunk or NUM)
    changes = int((chunk_of[1:] != chunk_of[:-1]).sum())
    assert changes == len(chunk_of.unique()) - 1


def test_chunks_and_the_images_within_them_are_shuffled() -> None:
    order = _stream(num=400, chunk=20).order(0)
    chunk_of = (order // 20).view(20, 20)[:, 0]
    assert chunk_of.tolist() != sorted(chunk_of.tolist())
    within = (order % 20).view(20, 20)
    assert all(row.tolist() != sorted(row.tolist()) for row in within)
    assert len({tuple(row.tolist()) for row in within}) == 20


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    order = _stream(chunk=5).order(2)
    other = _stream(chunk=5, augment=PLAIN, views=3)
    list(other.epoch(0, 4))
    torch.manual_seed(1)
    assert torch.equal(other.order(2), order)
    assert not torch.equal(_stream(chunk=5, seed=1).order(2), order)
    assert not torch.equal(_stream(chunk=5).order(3), order)


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(8, [8, 8]), (23, [23]), (100, [23]), (1, [1] * 23)]
)
def test_a_last_smaller_batch_is_left_out_of_training_unless_alone(
    batch_size: int, sizes: list[int]
) -> None:
    stream = _stream(chunk=5)
    batches = list(stream.epoch(1, batch_size))
    assert [len(batch.labels_n) for batch in batches] == sizes
    rows = torch.cat([batch.rows for batch in batches])
    assert torch.equal(rows, stream.order(1)[: sum(sizes)])
    assert torch.equal(rows, torch.cat(list(stream.rows(1, batch_size))))


@pytest.mark.parametrize("skip", [0, 1, 5, 9])
def test_skipped_batches_change_no_other(skip: int) -> None:
    stream = _stream(chunk=5)
    whole = list(stream.epoch(1, 4))[skip:]
    for batch, expected in zip(stream.epoch(1, 4, skip), whole, strict=True):
        assert torch.equal(batch.rows, expected.rows)
        assert torch.equal(batch.images_nchw, expected.images_nchw)


def test_labels_belong_to_their_images() -> None:
    split = random_split(NUM, channels=2, size=8)
    for batch in _stream(augment=PLAIN).epoch(0, 4):
        rows = batch.rows.numpy()
        assert np.array_equal(batch.labels_n.numpy(), split.labels[rows])
        expected = torch.from_numpy(split.images[rows]).float() / 255
        assert torch.equal(batch.images_nchw, expected)


@pytest.mark.parametrize(("limit", "num"), [(None, NUM), (10, 10), (8, 8), (100, NUM)])
def test_in_order_gives_all_images_without_augmentation(limit: int | None, num: int) -> None:
    split = random_split(NUM, channels=2, size=8)
    batches = list(_stream().in_order(8, limit))
    assert torch.cat([batch.rows for batch in batches]).tolist() == list(range(num))
    assert [len(batch.rows) for batch in batches[:-1]] == [8] * (len(batches) - 1)
    expected = torch.from_numpy(split.images[:num]).float() / 255
    assert torch.equal(torch.cat([batch.images_nchw for batch in batches]), expected)


# ---------------------------------------------------------------- augmentation


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(pad=1),
        AugmentConfig(pad=3),
        AugmentConfig(flip=True),
        BOTH,
        AugmentConfig(erase=1),
        AugmentConfig(pad=2, flip=True, erase=5),
    ],
)
def test_augmentation_equals_a_loop_by_hand(augment: AugmentConfig) -> None:
    split = random_split(NUM, channels=2, size=8)
    stream = _stream(augment=augment)
    draws = stream._draw(4)
    shifts, flips, holes = draws.shifts, draws.flips, draws.holes
    seen = _by_row(stream, 4, NUM)
    assert len(seen) == NUM
    for row, image in seen.items():
        expected = np.zeros((2, 8, 8), np.float32)
        top, left = (0, 0) if shifts is None else (shifts[row] - augment.pad).tolist()
        for y in range(8):
            for x in range(8):
                if 0 <= y + top < 8 and 0 <= x + left < 8:
                    expected[:, y, x] = split.images[row, :, y + top, x + left]
        if flips is not None and flips[row]:
            expected = expected[:, :, ::-1].copy()
        if holes is not None:
            top, left = (holes[row] - augment.erase // 2).tolist()
            for y in range(max(top, 0), min(top + augment.erase, 8)):
                for x in range(max(left, 0), min(left + augment.erase, 8)):
                    expected[:, y, x] = 128
        assert torch.equal(image, torch.from_numpy(expected) / 255)


def test_every_shift_and_both_mirrorings_occur_about_equally_often() -> None:
    draws = _stream(num=2000, augment=AugmentConfig(pad=1, flip=True))._draw(0)
    shifts, flips = draws.shifts, draws.flips
    assert draws.holes is None
    assert shifts is not None
    assert flips is not None
    counts = torch.bincount(shifts[:, 0] * 3 + shifts[:, 1])
    assert len(counts) == 9
    assert counts.min() > 2000 / 9 * 0.7
    assert 0.45 < flips.float().mean() < 0.55


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [PLAIN, AugmentConfig(pad=1), AugmentConfig(erase=3), BOTH])
def test_the_memory_layout_is_always_the_same(augment: AugmentConfig, channels: int) -> None:
    # another layout runs other kernels, whose last bits differ
    stream = Stream(random_split(9, channels=channels, size=8), seed=0, augment=augment)
    for images in (next(stream.epoch(0, 4)).images_nchw, next(stream.in_order(4)).images_nchw):
        assert images.stride() == (channels * 64, 1, channels * 8, channels)


def test_an_image_looks_the_same_in_every_batch() -> None:
    stream = _stream(views=2, chunk=5)
    seen = _by_row(stream, 3, 23)
    for batch_size in (1, 4, 7):
        for row, image in _by_row(stream, 3, batch_size).items():
            assert torch.equal(image, seen[row])
    for row, image in seen.items():
        assert torch.equal(stream.view(1, torch.tensor([row]))[0], image)


def test_an_image_looks_the_same_whatever_the_chunks() -> None:
    seen = _by_row(_stream(chunk=5), 3, 23)
    for row, image in _by_row(_stream(chunk=None), 3, 23).items():
        assert torch.equal(image, seen[row])


@pytest.mark.parametrize(
    "augment", [AugmentConfig(pad=1), AugmentConfig(flip=True), AugmentConfig(erase=3)]
)
def test_views_repeat_and_differ(augment: AugmentConfig) -> None:
    rows = torch.arange(NUM)
    stream = _stream(augment=augment, views=3)
    views = [stream.view(view, rows) for view in range(3)]
    for epoch in range(7):
        assert stream.view_of(epoch) == epoch % 3
        for row, image in _by_row(stream, epoch, 4).items():
            assert torch.equal(image, views[epoch % 3][row])
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[1], views[2])


def test_without_a_number_of_views_every_epoch_is_new() -> None:
    stream = _stream(views=None)
    assert stream.view_of(5) == 5
    first, sixth = _by_row(stream, 0, NUM), _by_row(stream, 5, NUM)
    assert any(not torch.equal(first[row], sixth[row]) for row in first)


def test_the_seed_decides_the_views() -> None:
    rows = torch.arange(NUM)
    assert torch.equal(_stream().view(0, rows), _stream().view(0, rows))
    assert not torch.equal(_stream().view(0, rows), _stream(seed=1).view(0, rows))


LARGER_THAN_MEMORY = """
import resource, sys
import numpy as np
import torch
from pbkd.config import AugmentConfig
from pbkd.data import Split, Stream

torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**30, used + 2**30))
images = np.load(sys.argv[1], mmap_mode="r")
assert images.nbytes > 3 * 2**30
stream = Stream(
    Split(images, np.zeros(len(images), np.int64)), seed=0, augment=AugmentConfig(pad=4, flip=True)
)
batch = next(stream.epoch(0, 64))
assert batch.images_nchw.shape == (64, 3, 64, 64)
assert batch.images_nchw.sum() == 0
"""


def test_a_split_may_be_larger_than_memory(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    shape = (300_000, 3, 64, 64)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)  # sparse: no bytes
    subprocess.run([sys.executable, "-c", LARGER_THAN_MEMORY, str(path)], check=True)


@pytest.mark.parametrize(("side", "size"), [(8, 256), (128, 256), (224, 83), (3000, 2)])
def test_a_pass_has_fewer_large_images(side: int, size: int) -> None:
    images = np.broadcast_to(np.uint8(0), (1000, 3, side, side))
    stream = Stream(Split(images, np.zeros(1000, np.int64)), seed=0, augment=PLAIN)
    assert stream.pass_size(256) == size
    assert stream.pass_size(1) == 1
