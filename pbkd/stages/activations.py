"""Stage `activations`: settle where activations come from, and fill the cache if there is one."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from pbkd.activations import Capture, cache_bytes, cache_keys, fill_cache
from pbkd.activations.cache import KIND
from pbkd.artifacts import (
    Workspace,
    atomic_dir,
    check_free_space,
    link_tree,
    read_json,
    write_json,
)
from pbkd.blocks import Discovery
from pbkd.config import ActivationsConfig
from pbkd.data import Prepared, Stream
from pbkd.devices import best_device
from pbkd.models import Classifier, ModelCard
from pbkd.stages.blocks import read_blocks
from pbkd.stages.context import StageContext
from pbkd.stages.teacher import read_teacher

_log = logging.getLogger(__name__)

_CAPTURE_BATCH = 128


class Settled(BaseModel):
    """What ``activations.json`` says: the source, and the settings that later stages share.

    Attributes:
        size_bytes: of the cache's tensors, whether or not it was made.
    """

    model_config = ConfigDict(frozen=True)

    source: Literal["cache", "relay"]
    config: ActivationsConfig
    seed: int
    size_bytes: int


def run(context: StageContext) -> None:
    """Write ``artifacts/activations/``: the settled source and, for `cache`, its shards."""
    workspace, config = context.workspace, context.params.activations
    output = workspace.artifacts("activations")
    for folder in output.glob("*/*") if output.is_dir() else ():
        workspace.store.adopt(KIND, folder)
    discovery = read_blocks(workspace)
    teacher, card, prepared = read_teacher(workspace)
    num = prepared.meta.num_images
    size = cache_bytes(discovery.blocks, config, num["train"], num["val"])
    source = config.source
    if source == "auto":
        source = "cache" if size <= config.max_cache_gb * 1e9 else "relay"
    _log.info("source %s; a cache takes %.1f MB", source, size / 1e6)
    keys: dict[tuple[str, int | str], str] = {}
    if source == "cache":
        keys = _fill(context, discovery, teacher, card, prepared)
    settled = Settled(source=source, config=config, seed=context.params.seed, size_bytes=size)
    _write(workspace, settled, keys)


def read_settled(workspace: Workspace) -> Settled:
    """What the stage wrote."""
    return Settled.model_validate(
        read_json(workspace.artifacts("activations") / "activations.json")
    )


def _fill(
    context: StageContext,
    discovery: Discovery,
    teacher: Classifier,
    card: ModelCard,
    prepared: Prepared,
) -> dict[tuple[str, int | str], str]:
    config, seed, device = context.params.activations, context.params.seed, best_device()
    teacher.to(device)
    paths = [block.path for block in discovery.blocks]
    keys = cache_keys(card, config, seed, paths)
    store = context.workspace.store
    missing = [name for name, key in keys.items() if not store.has(KIND, key)]
    if not missing:
        return keys
    num = prepared.meta.num_images
    size = cache_bytes(discovery.blocks, config, num["train"], num["val"])
    size = size * len(missing) // len(keys)
    check_free_space(store.root, size, "the cache of activations")
    train, val = (
        Stream(
            prepared.split(name),
            seed=seed,
            augment=card.augment,
            views=config.views,
            chunk=config.chunk,
            device=device,
        )
        for name in ("train", "val")
    )
    sample = val.plain(torch.arange(min(_CAPTURE_BATCH, len(val))))
    capture = Capture(teacher, paths, sample, getattr(torch, config.dtype))
    fill_cache(store, capture, keys, train, val, _CAPTURE_BATCH)
    return keys


def _write(workspace: Workspace, settled: Settled, keys: dict[tuple[str, int | str], str]) -> None:
    with atomic_dir(workspace.artifacts("activations")) as folder:
        for (path, view), key in keys.items():
            target = folder / path / f"view-{view}"
            target.parent.mkdir(exist_ok=True)
            link_tree(workspace.store.path(KIND, key), target)
        write_json(folder / "activations.json", settled)
