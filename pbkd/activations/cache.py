"""The source `cache`: a block's activations on disk, written once, read by every trainee.

An item of the store holds one block in one view: a shard per chunk of the stream, so that reading
in the stream's order touches one shard after the other.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pbkd.activations.capture import Activation, Capture
from pbkd.artifacts import (
    MARKER,
    Store,
    digest_of,
    file_digest,
    load_tensors,
    read_json,
    save_tensors,
    temporary_path,
    write_marker,
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

_ALGORITHM = 1


def cache_key(
    card: ModelCard, config: ActivationsConfig, seed: int, path: str, view: int | str
) -> str:
    """Key of one block in one view: all that its contents depend on."""
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
            "view": view,
            "dtype": config.dtype,
            "chunk": config.chunk,
        }
    )


def cache_views(config: ActivationsConfig) -> list[int | str]:
    """All views that a cache holds."""
    return [*range(config.views), VAL]


def cache_keys(
    card: ModelCard, config: ActivationsConfig, seed: int, paths: list[str]
) -> dict[tuple[str, int | str], str]:
    """(block path, view) to key, for every view that a cache holds."""
    return {
        (path, view): cache_key(card, config, seed, path, view)
        for path in paths
        for view in cache_views(config)
    }


def cache_bytes(
    blocks: Iterable[BlockFacts], config: ActivationsConfig, num_train: int, num_val: int
) -> int:
    """Size of the cache's tensors on disk."""
    element = torch.empty(0, dtype=getattr(torch, config.dtype)).element_size()
    per_image = sum(block.elements_per_image for block in blocks) * element
    return per_image * (num_train * config.views + num_val)


def fill_cache(
    store: Store,
    capture: Capture,
    keys: dict[tuple[str, int | str], str],
    train: Stream,
    val: Stream,
    batch_size: int,
) -> None:
    """Write what the store does not hold yet; one teacher pass per view feeds all blocks.

    Args:
        keys: (block path, view) to key.
        batch_size: of the teacher's passes; the last one is filled up, so that every pass runs the
            same kernels and gives what `relay` gives, bit for bit.
    """
    for view in dict.fromkeys(view for _, view in keys):
        missing = {
            path: key
            for (path, key_view), key in keys.items()
            if key_view == view and not store.has(KIND, key)
        }
        if missing:
            _log.info("caching view %s of %d blocks", view, len(missing))
            stream = val if view == VAL else train
            _fill_view(store, capture, missing, stream, view, batch_size)


def _fill_view(
    store: Store,
    capture: Capture,
    missing: dict[str, str],
    stream: Stream,
    view: int | str,
    batch_size: int,
) -> None:
    folders = {path: temporary_path(store.path(KIND, key)) for path, key in missing.items()}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        for index, start in enumerate(range(0, len(stream), stream.chunk)):
            rows = torch.arange(start, min(start + stream.chunk, len(stream)))
            shard = _capture_rows(capture, tuple(missing), stream, rows, view, batch_size)
            for path, activation in shard.items():
                _write_shard(folders[path], index, activation)
        for path, key in missing.items():
            write_marker(folders[path], key)
            target = store.path(KIND, key)
            shutil.rmtree(target, ignore_errors=True)
            folders[path].replace(target)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def _capture_rows(
    capture: Capture,
    paths: tuple[str, ...],
    stream: Stream,
    rows: Tensor,
    view: int | str,
    batch_size: int,
) -> dict[str, Activation]:
    parts: dict[str, list[Activation]] = {path: [] for path in paths}
    for part in torch.split(rows, batch_size):
        images = stream.plain(part) if isinstance(view, str) else stream.view(view, part)
        for path, activation in capture(images, paths, fill_to=batch_size).items():
            parts[path].append(activation)
    return {
        path: Activation(
            torch.cat([part.input for part in group]), torch.cat([part.output for part in group])
        )
        for path, group in parts.items()
    }


def _write_shard(folder: Path, index: int, activation: Activation) -> None:
    save_tensors(
        folder / _shard_name(index), {"input": activation.input, "output": activation.output}
    )


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


@dataclass
class _View:
    """One block in one view; holds the shards that the current batch needs, no others."""

    folder: Path
    device: torch.device

    def __post_init__(self) -> None:
        self._digests = {
            name: entry["digest"]
            for name, entry in read_json(self.folder / MARKER)["files"].items()
        }
        self._checked: set[str] = set()
        self._open: dict[int, dict[str, Tensor]] = {}

    def gather(self, rows: Tensor, chunk: int) -> Activation:
        shard_of_row = rows // chunk
        needed = torch.unique(shard_of_row).tolist()
        self._open = {
            index: self._open[index] if index in self._open else self._load(index)
            for index in needed
        }
        if len(needed) == 1:
            shard = self._open[needed[0]]
            local = rows % chunk
            return self._pair(shard["input"][local], shard["output"][local])
        order = torch.cat([(shard_of_row == index).nonzero()[:, 0] for index in needed])
        sides = []
        for side in ("input", "output"):
            parts = [
                self._open[index][side][rows[shard_of_row == index] % chunk] for index in needed
            ]
            joined = torch.cat(parts)
            sides.append(torch.empty_like(joined).index_copy_(0, order, joined))
        return self._pair(*sides)

    def _pair(self, x: Tensor, y: Tensor) -> Activation:
        return Activation(x.to(self.device), y.to(self.device))

    def _load(self, index: int) -> dict[str, Tensor]:
        name = _shard_name(index)
        path = self.folder / name
        if name not in self._checked:
            if not path.is_file() or file_digest(path) != self._digests.get(name):
                raise ArtifactError(
                    f"{path}: checksum differs; the cached block is removed, run again to refill it"
                )
            self._checked.add(name)
        return load_tensors(path)


class CacheSource:
    """Reads the activations of some blocks from the store.

    Args:
        keys: (block path, view) to key; all are in the store.
        train: the stream that gives the order; its images are not touched.
        num_val: images of the validation split.
    """

    def __init__(
        self,
        store: Store,
        keys: dict[tuple[str, int | str], str],
        train: Stream,
        num_val: int,
        batch_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.store = store
        self.keys = keys
        self.train_stream = train
        self.num_val = num_val
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._views: dict[str, _View] = {}

    def epoch(self, epoch: int, paths: Iterable[str]) -> Iterator[dict[str, Activation]]:
        """Training batches of one epoch."""
        wanted = tuple(paths)
        view = self.train_stream.view_of(epoch)
        for rows in self.train_stream.rows(epoch, self.batch_size):
            yield {path: self._gather(path, view, rows) for path in wanted}

    def val(self, paths: Iterable[str]) -> Iterator[dict[str, Activation]]:
        """The validation split, in order."""
        wanted = tuple(paths)
        for rows in torch.split(torch.arange(self.num_val), self.batch_size):
            yield {path: self._gather(path, VAL, rows) for path in wanted}

    def _gather(self, path: str, view: int | str, rows: Tensor) -> Activation:
        key = self.keys[path, view]
        if key not in self._views:
            self._views[key] = _View(self.store.path(KIND, key), self.device)
        try:
            return self._views[key].gather(rows, self.train_stream.chunk)
        except ArtifactError:
            shutil.rmtree(self.store.path(KIND, key), ignore_errors=True)
            raise
