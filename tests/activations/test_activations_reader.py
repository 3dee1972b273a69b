"""The reader: damage is found and removed, threads end, memory is bounded."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pbkd.activations import CacheSource
from pbkd.activations import reader as reader_module
from pbkd.activations.cache import VAL, Side, View
from pbkd.activations.reader import CachedSide
from pbkd.errors import ArtifactError
from tests.activations.cached import NUM_VAL, Setup, assert_equal, assert_same_source


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "pbkd-shard-reader"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert readers() == []


def batches_of(source: CacheSource, setup: Setup, view: View) -> Iterator[object]:
    return source.val(setup.paths) if view == VAL else source.epoch(int(view), setup.paths)


# ---------------------------------------------------------------- damage


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_a_byte, "checksum differs"),
        (_truncate, r"has \d+ bytes, expected \d+"),
        (_remove, r"cannot be read \(No such file or directory\)"),
    ],
)
@pytest.mark.parametrize(
    ("side", "view", "shard"), [("input", 0, 0), ("output", 1, 3), ("input", VAL, 1)]
)
def test_a_damaged_shard_is_found_and_the_cache_can_be_refilled(
    setup: Setup,
    damage: Callable[[Path], None],
    message: str,
    side: Side,
    view: View,
    shard: int,
    resident: bool,
) -> None:
    setup.fill()
    path = setup.shard("features.14", side, view, shard)
    damage(path)
    source = setup.cache(resident=resident)
    advice = "the cached block is removed, run again to refill it"
    with pytest.raises(ArtifactError, match=f"{path.name}: {message}; {advice}"):
        list(batches_of(source, setup, view))
    present = {key for key in setup.keys if setup.item(*key).exists()}
    assert present == set(setup.keys) - {("features.14", side, view)}
    setup.fill()
    assert_same_source(setup, resident=resident)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_truncate, r"ends before row \d"), (_remove, r"cannot be read \(No such file")],
)
def test_damage_after_the_first_touch_is_found(
    setup: Setup, damage: Callable[[Path], None], message: str
) -> None:
    setup.fill()
    source = setup.cache()
    assert len(list(source.epoch(0, setup.paths))) == 5
    path = setup.shard("features.14", "output", 0, 0)
    damage(path)
    with pytest.raises(ArtifactError, match=f"{path.name}: {message}"):
        list(source.epoch(2, setup.paths))
    assert not path.parent.exists()


def test_batches_before_the_damage_are_handed_out(setup: Setup) -> None:
    setup.fill()
    order = torch.cat(list(setup.train.rows(0, 5)))
    shard = int(order[-1]) // 7
    first = int((order // 7 == shard).nonzero()[0]) // 5  # the first batch that needs it
    assert first > 0
    _flip_a_byte(setup.shard("features.7", "input", 0, shard))
    epoch = setup.cache().epoch(0, setup.paths)
    assert len([next(epoch) for _ in range(first)]) == first
    with pytest.raises(ArtifactError, match="checksum differs"):
        next(epoch)


def test_an_item_without_its_marker_is_an_error(setup: Setup) -> None:
    setup.fill()
    (setup.item("features.3", "output", 0) / "item.json").unlink()
    with pytest.raises(ArtifactError, match=r"item\.json is missing"):
        next(setup.cache().epoch(0, setup.paths))
    assert not setup.item("features.3", "output", 0).exists()
    setup.fill()
    assert_same_source(setup)


def test_a_shard_is_verified_once(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.fill()
    digested: list[str] = []
    whole = reader_module.file_digest

    def digest(path: Path) -> str:
        digested.append(str(path))
        return whole(path)

    monkeypatch.setattr(reader_module, "file_digest", digest)
    source = setup.cache()
    for epoch in (0, 2, 4):
        list(source.epoch(epoch, ["features.3"]))
    assert len(digested) == len(set(digested)) == 2 * 4
    list(source.val(["features.3"]))
    assert len(digested) == 2 * 4 + 2 * 2


# ---------------------------------------------------------------- the thread and its queue


def test_the_thread_ends_where_an_epoch_is_given_up(setup: Setup) -> None:
    setup.fill()
    source = setup.cache(limit_bytes=1)
    epoch = source.epoch(0, setup.paths)
    next(epoch)
    assert len(readers()) == 1
    epoch.close()
    assert readers() == []
    next(source.val(setup.paths))  # dropped
    assert readers() == []


def test_the_thread_ends_where_a_step_fails(setup: Setup) -> None:
    setup.fill()

    def train() -> None:
        for _ in setup.cache(limit_bytes=1).epoch(0, setup.paths):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert readers() == []


def test_an_epoch_that_is_not_begun_starts_no_thread(setup: Setup) -> None:
    setup.fill()
    epoch = setup.cache().epoch(0, setup.paths)
    assert readers() == []
    epoch.close()


def test_a_slow_consumer_bounds_what_is_read_ahead(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.fill()
    batch_bytes = 2 * 2 * 4 * 64 * 5
    read: list[int] = []
    rows_of = CachedSide.read

    def count(side: CachedSide, rows: torch.Tensor, *, pin_memory: bool) -> torch.Tensor:
        read.append(len(rows))
        return rows_of(side, rows, pin_memory=pin_memory)

    monkeypatch.setattr(CachedSide, "read", count)
    for limit_bytes, ahead in ((1, 1), (3 * batch_bytes - 1, 2), (3 * batch_bytes, 3)):
        read.clear()
        with closing(setup.cache(limit_bytes=limit_bytes).epoch(0, ["features.3"])) as epoch:
            next(epoch)
            deadline = time.monotonic() + 5
            while len(read) < 2 * (1 + ahead) and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.05)
            assert len(read) == 2 * (1 + ahead)  # an input and an output each
            assert len(list(epoch)) == 4


@pytest.mark.parametrize("limit_bytes", [1, 10_000, 1 << 28])
def test_the_limit_changes_no_value(setup: Setup, limit_bytes: int) -> None:
    setup.fill()
    cache, relay = setup.cache(limit_bytes=limit_bytes), setup.relay()
    assert assert_equal(cache.epoch(1, setup.paths), relay.epoch(1, setup.paths)) == 25
    assert assert_equal(cache.val(setup.paths), relay.val(setup.paths)) == NUM_VAL


def test_two_epochs_can_be_read_at_once(setup: Setup) -> None:
    setup.fill()
    source, relay = setup.cache(limit_bytes=1), setup.relay()
    both = zip(source.epoch(0, setup.paths), source.epoch(1, setup.paths), strict=True)
    expected = zip(relay.epoch(0, setup.paths), relay.epoch(1, setup.paths), strict=True)
    for (a, b), (x, y) in zip(both, expected, strict=True):
        assert_equal(iter([a, b]), iter([x, y]))


LEFT_OPEN = """
import sys
from pathlib import Path
from tests.activations.cached import VGG_PATHS, Setup, vgg
setup = Setup(Path(sys.argv[1]), vgg(), VGG_PATHS)
epoch = setup.cache(limit_bytes=1).epoch(0, setup.paths)
next(epoch)
if sys.argv[2] == "cycle":
    cycle = [epoch]
    cycle.append(cycle)
    del epoch, cycle
if sys.argv[2] == "error":
    raise SystemExit("the script failed")
"""


@pytest.mark.parametrize("how", ["held", "cycle", "error"])
def test_an_epoch_left_open_does_not_hold_up_the_interpreter(setup: Setup, how: str) -> None:
    setup.fill()
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, str(setup.store.root.parent), how],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ("the script failed\n" if how == "error" else "")
    assert done.returncode == (how == "error")


# ---------------------------------------------------------------- residence


def test_what_is_resident_is_read_once(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.fill()
    source = setup.cache(resident=True)
    first = list(source.epoch(0, setup.paths))
    list(source.epoch(1, setup.paths)), list(source.val(setup.paths))
    monkeypatch.delattr(CachedSide, "read")
    assert assert_equal(source.epoch(0, setup.paths), iter(first)) == 25
    assert_equal(source.epoch(3, setup.paths), setup.relay().epoch(3, setup.paths))


def test_nothing_is_resident_on_the_cpu_unless_asked_for(setup: Setup) -> None:
    setup.fill()
    source = setup.cache()
    next(source.epoch(0, setup.paths))
    assert source._whole == {}
    source = setup.cache(resident=True)
    next(source.epoch(0, setup.paths))
    assert len(source._whole) == 2 * len(setup.paths)


@pytest.mark.parametrize(("free_bytes", "resident"), [(10, False), (10**9, True)])
def test_a_gpu_holds_what_takes_a_part_of_its_free_memory(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, free_bytes: int, resident: bool
) -> None:
    setup.fill()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_bytes, 2 * free_bytes))
    source = setup.cache()
    assert not source._is_resident()
    source = setup.cache()
    source.device = torch.device("cuda")
    assert source._is_resident() == resident


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("resident", [False, True])
def test_batches_on_a_gpu_are_those_of_the_cpu(setup: Setup, resident: bool) -> None:
    setup.fill()
    on_gpu = CacheSource(setup.store, setup.keys, setup.train, NUM_VAL, 5, "cuda", resident, 1)
    expected = setup.cache()
    for epoch in range(3):
        for a, b in zip(
            on_gpu.epoch(epoch, setup.paths), expected.epoch(epoch, setup.paths), strict=True
        ):
            for path in setup.paths:
                assert a[path].input.device.type == "cuda"
                assert torch.equal(a[path].input.cpu(), b[path].input)
                assert torch.equal(a[path].output.cpu(), b[path].output)
