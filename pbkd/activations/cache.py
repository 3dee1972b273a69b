"""The cache on disk: activations written once by the teacher, read by every trainee.

An item of the store holds one side of one block in one view, in shards (``shards``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from pbkd.activations.capture import Capture
from pbkd.activations.resume import exact_inputs
from pbkd.activations.shards import KIND, Parts, ShardGrid, ShardWriter
from pbkd.artifacts import Store, digest_of
from pbkd.blocks import BlockFacts
from pbkd.config import ActivationsConfig, AugmentConfig
from pbkd.data.batches import Stream
from pbkd.errors import ArtifactError
from pbkd.models import ModelCard

_log = logging.getLogger(__name__)

VAL = "val"
"""The view that holds the validation split, not augmented."""

Side = Literal["input", "output", "cut"]
"""A cut is the exact float32 input of the module from which a relay goes on (``resume``)."""
View = int | str
SideKeys = dict[tuple[str, Side, View], str]
"""(block path, side, view) to the key of the item."""

_ALGORITHM = 2
_NO_CUTS: Mapping[str, str] = {}


# ---------------------------------------------------------------- keys and sizes


def both_sides(paths: Iterable[str]) -> list[tuple[str, Side]]:
    """(block path, side) of every input and output."""
    sides: tuple[Side, ...] = ("input", "output")
    return [(path, side) for path in paths for side in sides]


def cache_views(config: ActivationsConfig) -> list[View]:
    """All views that a cache holds."""
    return [*range(config.views), VAL]


def as_shown(config: ActivationsConfig, epochs: int) -> ActivationsConfig:
    """The settings with no more views than so many epochs show: the same stream, less to cache."""
    return config.model_copy(update={"views": min(config.views, epochs)})


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


def side_bytes(block: BlockFacts, side: Side, config: ActivationsConfig, num_rows: int) -> int:
    """Size of one side's tensors on disk, for so many images of all views together."""
    shape = block.output_shape if side == "output" else block.input_shape
    dtype: torch.dtype = getattr(torch, _dtype_of(side, config))
    return torch.Size(shape).numel() * dtype.itemsize * num_rows


def _dtype_of(side: Side, config: ActivationsConfig) -> str:
    return "float32" if side == "cut" else config.dtype


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
        part: which shards this call writes: number k over all views, for k mod num_parts == part.
        after_batch: called after every pass of the teacher.
        cuts: block to the module whose input its side "cut" is.
    """
    number = 0  # of the shard, over all views
    begun: set[str] = set()
    for view in dict.fromkeys(view for _, _, view in keys):
        stream = val if view == VAL else train
        grid = ShardGrid(len(stream), stream.chunk)
        unfinished = {
            (path, side): Parts(store, key)
            for (path, side, key_view), key in keys.items()
            # without augmentation all views have one key
            if key_view == view and key not in begun and not store.has(KIND, key)
        }
        begun |= {keys[path, side, view] for path, side in unfinished}
        if not unfinished:
            continue
        _log.info("caching view %s, %d inputs and outputs", view, len(unfinished))
        for parts in unfinished.values():
            parts.prepare(grid.num_shards)
        for index in range(grid.num_shards):
            is_mine = number % num_parts == part
            number += 1
            if not is_mine:
                continue
            missing = {name: parts for name, parts in unfinished.items() if not parts.has(index)}
            if missing:
                writers = {
                    name: ShardWriter(parts, index, len(grid.rows(index)))
                    for name, parts in missing.items()
                }
                batches = torch.split(grid.rows(index), batch_size)
                _fill_shard(writers, capture, cuts, stream, view, batches, batch_size, after_batch)


def _fill_shard(
    writers: dict[tuple[str, Side], ShardWriter],
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
        parts = Parts(store, key)
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
