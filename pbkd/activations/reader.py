"""The source `cache`: reads the rows that a batch needs, ahead of who consumes them.

A thread reads; a queue bounded by bytes hands over. So memory does not grow with the cache: nothing
is mapped, and no shard is ever held whole, unless all of them live on the device (`resident`).
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import closing, suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbkd.activations.cache import VAL, Side, SideKeys, View, both_sides
from pbkd.activations.capture import Activation
from pbkd.activations.shards import KIND, ShardGrid, ShardHeader, from_rows, shard_name, to_rows
from pbkd.artifacts import MARKER, Store, file_digest, read_json
from pbkd.data.batches import Stream
from pbkd.errors import ArtifactError

QUEUE_BYTES = 256 * 2**20
_POLL_S = 0.2
_SHARE_OF_GPU = 0.5

Name = tuple[str, Side]


class CachedSide:
    """One item of the store: one side of one block in one view.

    Every method raises ArtifactError, and removes the item, where it finds damage.
    """

    def __init__(self, folder: Path, grid: ShardGrid) -> None:
        self._folder, self._grid = folder, grid
        self._headers: dict[int, ShardHeader] = {}  # of the shards that were verified

    @property
    def size_bytes(self) -> int:
        """Size of the item's shards."""
        return sum(entry["size"] for entry in self._files.values())

    def header(self, shard: int) -> ShardHeader:
        """Header of a shard; the first call compares the shard with the marker's digest."""
        if shard not in self._headers:
            path = self._folder / shard_name(shard)
            try:
                size, digest = path.stat().st_size, file_digest(path)
            except OSError as error:
                raise self._damaged(path, f"cannot be read ({error.strerror})") from error
            entry = self._files.get(path.name, {"size": "no such file", "digest": ""})
            if size != entry["size"]:
                raise self._damaged(path, f"has {size} bytes, expected {entry['size']}")
            if digest != entry["digest"]:
                raise self._damaged(path, "checksum differs")
            self._headers[shard] = ShardHeader.read(path)
        return self._headers[shard]

    def verify(self, rows: Tensor) -> int:
        """Check the shards that hold some rows; returns the bytes of the rows."""
        row_bytes = 0
        for shard in torch.unique(rows // self._grid.rows_per_shard).tolist():
            row_bytes = self.header(shard).row_bytes
        return len(rows) * row_bytes

    def read(self, rows: Tensor, *, pin_memory: bool) -> Tensor:
        """(B, ...) rows as stored, for (B,) positions in the split."""
        positions: dict[int, list[tuple[int, int]]] = {}
        for position, row in enumerate(rows.tolist()):
            shard, local = divmod(row, self._grid.rows_per_shard)
            positions.setdefault(shard, []).append((position, local))
        header = self.header(next(iter(positions)))
        shape = (len(rows), *header.shape[1:])
        out = torch.empty(shape, dtype=header.dtype, pin_memory=pin_memory)
        buffer = out.view(-1).view(torch.uint8).numpy().data
        for shard, pairs in positions.items():
            self._read_shard(shard, pairs, buffer)
        return out

    def _read_shard(self, shard: int, pairs: list[tuple[int, int]], buffer: memoryview) -> None:
        """Put rows of one shard at their positions in the buffer."""
        path, header = self._folder / shard_name(shard), self.header(shard)
        size = header.row_bytes
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._damaged(path, f"cannot be read ({error.strerror})") from error
        try:
            for position, local in pairs:
                target = buffer[position * size : (position + 1) * size]
                if os.preadv(file, [target], header.start + local * size) != size:
                    raise self._damaged(path, f"ends before row {local}")
        except OSError as error:
            raise self._damaged(path, f"cannot be read ({error.strerror})") from error
        finally:
            os.close(file)

    def advise(self, chunk: int) -> None:
        """Let the system fetch what a chunk will need: its rows, or a shard yet to be verified."""
        shard, row = divmod(chunk * self._grid.chunk, self._grid.rows_per_shard)
        start = size = 0  # the whole file
        if header := self._headers.get(shard):
            start = header.start + row * header.row_bytes
            size = self._grid.chunk * header.row_bytes
        with suppress(OSError, AttributeError):  # reading tells of damage; macOS cannot be advised
            file = os.open(self._folder / shard_name(shard), os.O_RDONLY)
            try:
                os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    @cached_property
    def _files(self) -> dict[str, dict[str, Any]]:
        try:
            files: dict[str, dict[str, Any]] = read_json(self._folder / MARKER)["files"]
        except ArtifactError:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return files

    def _damaged(self, path: Path, what: str) -> ArtifactError:
        shutil.rmtree(self._folder, ignore_errors=True)
        return ArtifactError(f"{path}: {what}; the cached block is removed, run again to refill it")


class _Queue:
    """Batches on their way to the consumer, in order, bounded by their bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._consumer = threading.current_thread()
        self._items: deque[tuple[dict[Name, Tensor] | Exception, int]] = deque()
        self._size_bytes = 0
        self.closed = False

    def reserve(self, size_bytes: int) -> bool:
        """Wait for room, or for an empty queue; False where nobody consumes any more."""
        with self._changed:
            while self._size_bytes and self._size_bytes + size_bytes > self._limit_bytes:
                # a consumer that is not closed when the interpreter exits would block the exit
                if self.closed or not self._consumer.is_alive():
                    return False
                self._changed.wait(_POLL_S)
            self._size_bytes += size_bytes
            return not self.closed

    def put(self, item: dict[Name, Tensor] | Exception, size_bytes: int = 0) -> None:
        with self._changed:
            self._items.append((item, size_bytes))
            self._changed.notify_all()

    def get(self) -> dict[Name, Tensor]:
        """The next batch; raises what the reading thread raised."""
        with self._changed:
            self._consumer = threading.current_thread()
            while not self._items:
                self._changed.wait()
            item, size_bytes = self._items.popleft()
            self._size_bytes -= size_bytes
            self._changed.notify_all()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._items.clear()
            self._changed.notify_all()


class ShardReader:
    """Reads some sides of one split batch by batch.

    Args:
        batches: (B,) positions in the split, each.
        limit_bytes: of the batches read ahead; at least one is, whatever its size.
    """

    def __init__(
        self,
        sides: dict[Name, CachedSide],
        grid: ShardGrid,
        batches: list[Tensor],
        device: torch.device,
        limit_bytes: int = QUEUE_BYTES,
    ) -> None:
        self._sides, self._grid, self._batches = sides, grid, batches
        self._device, self._limit_bytes = device, limit_bytes

    def batches(self) -> Generator[dict[Name, Tensor]]:
        """(B, ...) activations on the device, in the order of the batches.

        Closing the generator ends the thread that reads.

        Raises:
            ArtifactError: a shard is damaged; its item is removed from the store.
        """
        if not self._batches:
            return
        queue = _Queue(self._limit_bytes)
        thread = threading.Thread(target=self._run, args=(queue,), name="pbkd-shard-reader")
        thread.start()
        try:
            for _ in self._batches:
                yield self._to_device(queue.get())
        finally:
            queue.close()
            thread.join()

    def _to_device(self, batch: dict[Name, Tensor]) -> dict[Name, Tensor]:
        return {
            name: from_rows(rows.to(self._device, non_blocking=True))
            for name, rows in batch.items()
        }

    def _run(self, queue: _Queue) -> None:
        try:
            self._read_all(queue)
        except Exception as error:  # noqa: BLE001 - the consumer raises it
            queue.put(error)

    def _read_all(self, queue: _Queue) -> None:
        chunks = torch.unique_consecutive(torch.cat(self._batches) // self._grid.chunk).tolist()
        next_chunk = dict(pairwise(chunks))
        pin_memory = self._device.type == "cuda"
        for rows in self._batches:
            size_bytes = 0
            for side in self._sides.values():
                if queue.closed:
                    return
                size_bytes += side.verify(rows)
            if not queue.reserve(size_bytes):
                return
            batch = {
                name: side.read(rows, pin_memory=pin_memory) for name, side in self._sides.items()
            }
            queue.put(batch, size_bytes)
            for chunk in torch.unique(rows // self._grid.chunk).tolist():
                if (following := next_chunk.pop(chunk, None)) is not None:
                    for side in self._sides.values():
                        side.advise(following)


class CacheSource:
    """Reads the activations of some blocks from the store.

    Args:
        keys: (block path, side, view) to key; all are in the store.
        train: the stream that gives the order; its images are not touched.
        num_val: images of the validation split.
        resident: keep on the device, whole, what is read; None: if the device is a GPU and all of
            ``keys`` takes less than half of its free memory.
        limit_bytes: of the batches read ahead, where nothing is resident.
    """

    def __init__(
        self,
        store: Store,
        keys: SideKeys,
        train: Stream,
        num_val: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        resident: bool | None = None,
        limit_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.train_stream = train
        self.num_val = num_val
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._keys = keys
        self._resident = resident
        self._limit_bytes = limit_bytes
        self._train_grid = ShardGrid(len(train), train.chunk)
        self._val_grid = ShardGrid(num_val, train.chunk)
        self._items = {
            key: CachedSide(store.path(KIND, key), self._grid(view))
            for (_, _, view), key in keys.items()
        }
        self._whole: dict[str, Tensor] = {}

    def epoch(
        self, epoch: int, paths: Iterable[str], skip: int = 0
    ) -> Generator[dict[str, Activation]]:
        """Training batches of one epoch, without the first ``skip``."""
        view = self.train_stream.view_of(epoch)
        return self._pairs(tuple(paths), view, self._train_batches(epoch, skip))

    def val(self, paths: Iterable[str]) -> Generator[dict[str, Activation]]:
        """The validation split, in order."""
        return self._pairs(tuple(paths), VAL, self._val_batches())

    def cut(self, epoch: int, path: str, skip: int = 0) -> Generator[Tensor]:
        """The exact inputs, (B, ...) float32, with which a relay begins: one epoch's batches."""
        view = self.train_stream.view_of(epoch)
        return self._cut(path, view, self._train_batches(epoch, skip))

    def val_cut(self, path: str) -> Generator[Tensor]:
        """The same for the validation split, in order."""
        return self._cut(path, VAL, self._val_batches())

    def _train_batches(self, epoch: int, skip: int) -> list[Tensor]:
        return list(self.train_stream.rows(epoch, self.batch_size))[skip:]

    def _val_batches(self) -> list[Tensor]:
        return list(torch.split(torch.arange(self.num_val), self.batch_size))

    def _pairs(
        self, paths: tuple[str, ...], view: View, batches: list[Tensor]
    ) -> Generator[dict[str, Activation]]:
        with closing(self._read(both_sides(paths), view, batches)) as reader:
            for batch in reader:
                yield {
                    path: Activation(batch[path, "input"], batch[path, "output"]) for path in paths
                }

    def _cut(self, path: str, view: View, batches: list[Tensor]) -> Generator[Tensor]:
        with closing(self._read([(path, "cut")], view, batches)) as reader:
            for batch in reader:
                yield batch[path, "cut"]

    def _read(
        self, names: list[Name], view: View, batches: list[Tensor]
    ) -> Generator[dict[Name, Tensor]]:
        if self._is_resident():
            return self._select(names, view, batches)
        return self._stream(names, view, batches)

    def _stream(
        self, names: list[Name], view: View, batches: list[Tensor]
    ) -> Generator[dict[Name, Tensor]]:
        sides = {name: self._items[self._keys[*name, view]] for name in names}
        reader = ShardReader(sides, self._grid(view), batches, self.device, self._limit_bytes)
        return reader.batches()

    def _select(
        self, names: list[Name], view: View, batches: list[Tensor]
    ) -> Generator[dict[Name, Tensor]]:
        if not batches:
            return
        missing = [name for name in names if self._keys[*name, view] not in self._whole]
        if missing:
            self._load(missing, view)
        whole = {name: self._whole[self._keys[*name, view]] for name in names}
        # one copy to the device for all batches
        for rows in torch.split(torch.cat(batches).to(self.device), len(batches[0])):
            yield {name: from_rows(x.index_select(0, rows)) for name, x in whole.items()}

    def _load(self, names: list[Name], view: View) -> None:
        """Put items on the device, as rows."""
        num_rows = self._grid(view).num_rows
        whole: dict[Name, Tensor] = {}
        positions = list(torch.split(torch.arange(num_rows), self.batch_size))
        with closing(self._stream(names, view, positions)) as reader:
            for part, batch in zip(positions, reader, strict=True):
                for name, x in batch.items():
                    rows = to_rows(x)
                    if name not in whole:
                        whole[name] = rows.new_empty((num_rows, *rows.shape[1:]))
                    whole[name][part[0] : part[-1] + 1] = rows
        self._whole |= {self._keys[*name, view]: rows for name, rows in whole.items()}

    def _is_resident(self) -> bool:
        if self._resident is None:
            self._resident = self.device.type == "cuda" and self._fits()
        return self._resident

    def _fits(self) -> bool:
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        size_bytes = sum(side.size_bytes for side in self._items.values())
        return size_bytes < _SHARE_OF_GPU * free_bytes

    def _grid(self, view: View) -> ShardGrid:
        return self._val_grid if view == VAL else self._train_grid
