"""The cache on disk: activations written once by the teacher, read by every trainee.

An item of the store holds one side (input or output) of one block in one view. Its shards are
safetensors files of dense rows, one row per image of the split, so that a reader can fetch single
rows. The shards of unfinished items lie in a parts folder beside the item:

    store/activations/KEY/          item.json (the marker), shard-00000.safetensors, ...
    store/activations/KEY.parts/    shard-00000.json (the sidecar of a finished shard), parts.json
    store/activations/KEY.parts/item/    what becomes the item
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pbkd.activations.capture import Capture
from pbkd.activations.resume import exact_inputs
from pbkd.artifacts import (
    FILE_HASH,
    MARKER,
    Store,
    digest_of,
    read_json,
    sweep,
    temporary_path,
    write_json,
)
from pbkd.blocks import BlockFacts
from pbkd.config import ActivationsConfig, AugmentConfig
from pbkd.data.batches import Stream
from pbkd.errors import ArtifactError
from pbkd.models import ModelCard

_log = logging.getLogger(__name__)

KIND = "activations"
VAL = "val"
"""The view that holds the validation split, not augmented."""

Side = Literal["input", "output", "cut"]
"""A cut is the exact float32 input of the module from which a relay goes on (``resume``)."""
View = int | str
SideKeys = dict[tuple[str, Side, View], str]
"""(block path, side, view) to the key of the item."""

_ALGORITHM = 2
_NUM_SHARDS = 16
_NO_CUTS: Mapping[str, str] = {}
_ROWS_PER_SHARD = 2048
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


# ---------------------------------------------------------------- keys and sizes


def both_sides(paths: Iterable[str]) -> list[tuple[str, Side]]:
    """(block path, side) of every input and output."""
    sides: tuple[Side, ...] = ("input", "output")
    return [(path, side) for path in paths for side in sides]


def cache_views(config: ActivationsConfig) -> list[View]:
    """All views that a cache holds."""
    return [*range(config.views), VAL]


def cache_key(
    card: ModelCard, config: ActivationsConfig, seed: int, path: str, side: Side, view: View
) -> str:
    """Key of one side of one block in one view: all that its contents depend on."""
    augment = None if view == VAL or card.augment == AugmentConfig() else card.augment
    if view != VAL and augment is None:
        view = 0  # without augmentation all views are one
    return digest_of(
        {
            "algorithm": _ALGORITHM,
            "teacher": card.digest,
            "data": card.data_digest,
            "augment": augment,
            "seed": seed if augment else 0,
            "block": path,
            "side": side,
            "view": view,
            "dtype": _dtype_of(side, config),
            "chunk": config.chunk,
        }
    )


def cache_keys(
    card: ModelCard,
    config: ActivationsConfig,
    seed: int,
    sides: Iterable[tuple[str, Side]],
    cuts: Mapping[str, str] = _NO_CUTS,
) -> SideKeys:
    """Keys of some sides in every view that a cache holds.

    Args:
        cuts: block to the module whose input its side "cut" is.
    """

    def module(path: str, side: Side) -> str:
        return cuts[path] if side == "cut" else path

    return {
        (path, side, view): cache_key(card, config, seed, module(path, side), side, view)
        for path, side in sides
        for view in cache_views(config)
    }


def side_bytes(
    block: BlockFacts, side: Side, config: ActivationsConfig, num_train: int, num_val: int
) -> int:
    """Size of one side's tensors on disk, all views together."""
    shape = block.output_shape if side == "output" else block.input_shape
    dtype: torch.dtype = getattr(torch, _dtype_of(side, config))
    return torch.Size(shape).numel() * dtype.itemsize * (num_train * config.views + num_val)


def _dtype_of(side: Side, config: ActivationsConfig) -> str:
    return "float32" if side == "cut" else config.dtype


def cache_bytes(
    blocks: Iterable[BlockFacts], config: ActivationsConfig, num_train: int, num_val: int
) -> int:
    """Size on disk of the tensors of both sides of some blocks, all views together."""
    return sum(
        side_bytes(block, "input", config, num_train, num_val)
        + side_bytes(block, "output", config, num_train, num_val)
        for block in blocks
    )


# ---------------------------------------------------------------- shards


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


def _encode_header(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
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


class _ShardWriter:
    """Appends rows to a shard under a temporary name, and hashes them on the way."""

    def __init__(self, parts: _Parts, index: int, num_rows: int) -> None:
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
                pieces.insert(0, memoryview(_encode_header(rows.dtype, shape)))
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


class _Parts:
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

    def _sidecar(self, index: int) -> Path:
        return self._folder / Path(shard_name(index)).with_suffix(".json")


# ---------------------------------------------------------------- filling


def fill_cache(
    store: Store,
    capture: Capture,
    keys: SideKeys,
    train: Stream,
    val: Stream,
    batch_size: int,
    part: int = 0,
    num_parts: int = 1,
    after_batch: Callable[[], None] = lambda: None,
    cuts: Mapping[str, str] = _NO_CUTS,
) -> None:
    """Write the shards that are missing; one teacher pass per batch feeds all sides of a shard.

    Several processes may fill one cache, each its own part; a part that was killed goes on after
    its last finished shard. ``finish_fill`` then makes the items.

    Args:
        batch_size: of the teacher's passes; the last one is filled up, so that every pass runs the
            same kernels and gives what `relay` gives, bit for bit.
        part: which shards this call writes: number k of each view, for k mod num_parts == part.
        after_batch: called after every pass of the teacher.
        cuts: block to the module whose input its side "cut" is.
    """
    for view in dict.fromkeys(view for _, _, view in keys):
        stream = val if view == VAL else train
        grid = ShardGrid(len(stream), stream.chunk)
        unfinished = {
            (path, side): _Parts(store, key)
            for (path, side, key_view), key in keys.items()
            if key_view == view and not store.has(KIND, key)
        }
        if unfinished:
            _log.info("caching view %s, %d inputs and outputs", view, len(unfinished))
        for parts in unfinished.values():
            parts.prepare(grid.num_shards)
        for index in range(part, grid.num_shards, num_parts):
            missing = {name: parts for name, parts in unfinished.items() if not parts.has(index)}
            if missing:
                writers = {
                    name: _ShardWriter(parts, index, len(grid.rows(index)))
                    for name, parts in missing.items()
                }
                batches = torch.split(grid.rows(index), batch_size)
                _fill_shard(writers, capture, cuts, stream, view, batches, batch_size, after_batch)


def _fill_shard(
    writers: dict[tuple[str, Side], _ShardWriter],
    capture: Capture,
    cuts: Mapping[str, str],
    stream: Stream,
    view: View,
    batches: Iterable[Tensor],
    batch_size: int,
    after_batch: Callable[[], None],
) -> None:
    paths = tuple(dict.fromkeys(path for path, _ in writers))
    starts = [cuts[path] for path, side in writers if side == "cut"]
    try:
        for rows in batches:
            images = stream.plain(rows) if isinstance(view, str) else stream.view(view, rows)
            with exact_inputs(capture, starts) as exact:
                activations = capture(images, paths, fill_to=batch_size)
            for (path, side), writer in writers.items():
                if side == "cut":
                    writer.append(exact[cuts[path]][: len(rows)])
                else:
                    writer.append(getattr(activations[path], side))
            after_batch()
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.discard()


def finish_fill(store: Store, keys: SideKeys) -> None:
    """Turn the finished shards into items of the store.

    Raises:
        ArtifactError: shards are missing; what is complete becomes an item all the same.
    """
    problems = []
    for (path, side, view), key in keys.items():
        parts = _Parts(store, key)
        if not store.has(KIND, key):
            if missing := parts.missing():
                problems.append(f"{path} {side} view {view}: {missing}")
                continue
            parts.publish()
        parts.remove()
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ArtifactError(
            f"the cache of activations lacks {'; '.join(problems[:3])}{more}; run again to fill it"
        )
