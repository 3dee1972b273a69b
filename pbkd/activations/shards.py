"""Shards: files of dense rows, one per image of the split, so that a reader can fetch single rows.

A shard is a safetensors file with one tensor. The shards of unfinished items of the store lie in a
parts folder beside the item:

    store/activations/KEY/          item.json (the marker), shard-00000.safetensors, ...
    store/activations/KEY.parts/    shard-00000.json (the sidecar of a finished shard), parts.json
    store/activations/KEY.parts/item/    what becomes the item
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pbkd.artifacts import (
    FILE_HASH,
    MARKER,
    Store,
    read_json,
    sweep,
    temporary_path,
    write_json,
)
from pbkd.errors import ArtifactError

KIND = "activations"

_NUM_SHARDS = 16
_ROWS_PER_SHARD = 2048
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class ShardGrid:
    """How the rows of a split are spread over shards, each of whole chunks of the stream."""

    num_rows: int
    chunk: int

    @property
    def rows_per_shard(self) -> int:
        """Rows of every shard but the last: about 16 shards, of 2048 rows or a chunk at most."""
        num_chunks = -(-self.num_rows // self.chunk)
        chunks = min(-(-num_chunks // _NUM_SHARDS), _ROWS_PER_SHARD // self.chunk)
        return max(1, chunks) * self.chunk

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def rows(self, shard: int) -> Tensor:
        """(R,) int64: positions in the split of a shard's rows."""
        start = shard * self.rows_per_shard
        return torch.arange(start, min(start + self.rows_per_shard, self.num_rows))


def shard_name(index: int) -> str:
    """File of one shard."""
    return f"shard-{index:05d}.safetensors"


def to_rows(x: Tensor) -> Tensor:
    """A batch as it is stored, dense: (B, C, H, W) as (B, H, W, C), others as they are."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).contiguous()


def from_rows(rows: Tensor) -> Tensor:
    """What ``to_rows`` was given; (B, C, H, W) in channels-last strides."""
    return rows.permute(0, 3, 1, 2) if rows.dim() == 4 else rows


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of its rows.

    Attributes:
        shape: (R, H, W, C) or (R, ...): as stored.
        start: where the rows begin in the file, bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize

    @classmethod
    def read(cls, path: Path) -> ShardHeader:
        """Of a whole shard."""
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(size))["rows"]
        return cls(_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size)


def _encoded(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """Head of a safetensors file with one tensor, ``rows``, which follows it."""
    name = next(name for name, known in _DTYPES.items() if known == dtype)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    header = {
        "__metadata__": {"layout": "nhwc" if len(shape) == 4 else "as captured"},
        "rows": {"dtype": name, "shape": shape, "data_offsets": [0, num_bytes]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensors to 8 bytes
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Appends rows to a shard under a temporary name, and hashes them on the way."""

    def __init__(self, parts: Parts, index: int, num_rows: int) -> None:
        self._parts, self._index, self._num_rows = parts, index, num_rows
        self._temporary = temporary_path(parts.shard(index))
        self._hasher = hashlib.new(FILE_HASH)  # as markers have it
        self._size_bytes = 0

    def append(self, x: Tensor) -> None:
        """Write (B, ...) activations; the file is closed in between, as there may be hundreds."""
        rows = to_rows(x).cpu()
        with self._temporary.open("ab" if self._size_bytes else "wb") as file:
            pieces = [rows.reshape(-1).view(torch.uint8).numpy().data]
            if self._size_bytes == 0:
                shape = (self._num_rows, *rows.shape[1:])
                pieces.insert(0, memoryview(_encoded(rows.dtype, shape)))
            for piece in pieces:
                file.write(piece)
                self._hasher.update(piece)
                self._size_bytes += len(piece)

    def finish(self) -> None:
        """Give the shard its name; its sidecar goes last."""
        self._temporary.replace(self._parts.shard(self._index))
        self._parts.add(self._index, self._size_bytes, self._hasher.hexdigest())

    def discard(self) -> None:
        """Remove what is not finished."""
        self._temporary.unlink(missing_ok=True)


class Parts:
    """The parts folder of one item: finished shards, each with a sidecar that goes last."""

    def __init__(self, store: Store, key: str) -> None:
        self._key, self._target = key, store.path(KIND, key)
        self._folder = self._target.with_name(f"{key}.parts")
        self._item = self._folder / "item"

    def prepare(self, num_shards: int) -> None:
        """Make the folder; remove what killed writers left half-written."""
        self._item.mkdir(parents=True, exist_ok=True)
        sweep(self._item)
        sweep(self._folder)
        write_json(self._folder / "parts.json", {"num_shards": num_shards})

    def shard(self, index: int) -> Path:
        return self._item / shard_name(index)

    def add(self, index: int, size_bytes: int, digest: str) -> None:
        """Declare a shard finished."""
        write_json(self._sidecar(index), {"size": size_bytes, "digest": digest})

    def has(self, index: int) -> bool:
        """Whether a shard is finished, and there at its size."""
        try:
            size: int = read_json(self._sidecar(index))["size"]
            return self.shard(index).stat().st_size == size
        except (ArtifactError, OSError):
            return False

    def missing(self) -> str:
        """What stands in the way of the item; empty where nothing does."""
        try:
            num_shards: int = read_json(self._folder / "parts.json")["num_shards"]
        except ArtifactError:
            return "all shards"
        indices = [str(index) for index in range(num_shards) if not self.has(index)]
        first = ", ".join(indices[:5]) + (", ..." if len(indices) > 5 else "")
        return f"{len(indices)} of {num_shards} shards (number {first})" if indices else ""

    def publish(self) -> None:
        """Turn the shards into the item; the marker takes their digests from the sidecars."""
        num_shards = read_json(self._folder / "parts.json")["num_shards"]
        files = {shard_name(i): read_json(self._sidecar(i)) for i in range(num_shards)}
        write_json(self._item / MARKER, {"key": self._key, "files": files})
        shutil.rmtree(self._target, ignore_errors=True)
        self._item.replace(self._target)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def size_bytes(self) -> int:
        """Of the finished shards."""
        sizes = (path.stat().st_size for path in self._item.glob("shard-*.safetensors"))
        return sum(sizes)

    def _sidecar(self, index: int) -> Path:
        return self._folder / Path(shard_name(index)).with_suffix(".json")


def parts_bytes(store: Store, keys: Iterable[str]) -> int:
    """What finished shards of unfinished items take on the disk already."""
    return sum(Parts(store, key).size_bytes() for key in set(keys))


def remove_parts(store: Store) -> None:
    """Remove all finished shards of unfinished items: nobody fills, and nobody wants them."""
    for folder in (store.root / KIND).glob("*.parts"):
        shutil.rmtree(folder, ignore_errors=True)
