"""Stage `activations`: settle where activations come from, and fill the cache if there is one.

The work in the middle, filling, is split into jobs; what maps them onto workers is the caller's.
"""

from __future__ import annotations

import logging
import shutil
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pbkd.activations import FillJob, Side, both_sides, finish_fill, run_fill, side_bytes
from pbkd.activations.shards import KIND, parts_bytes, remove_parts
from pbkd.artifacts import (
    Workspace,
    atomic_dir,
    check_free_space,
    link_tree,
    read_json,
    write_json,
)
from pbkd.config import ActivationsConfig
from pbkd.distill import Profile
from pbkd.stages.context import StageContext
from pbkd.stages.planning import Subject, plan_of, profiled_here

_log = logging.getLogger(__name__)

_CAPTURE_BATCH = 128  # where nothing was measured
_SHARE_OF_DISK = 0.8


class Settled(BaseModel):
    """What ``activations.json`` says: the sides that are cached; what later stages share.

    Attributes:
        source: "relay": nothing is cached; "cache": both sides of every block; "mixed": some.
        sides: (block, side) of the cache; "cut" is the exact input with which a relay begins.
        cuts: block to the module whose input that is.
        size_bytes: of the cache's tensors.
    """

    model_config = ConfigDict(frozen=True)

    source: Literal["cache", "relay", "mixed"]
    sides: tuple[tuple[str, Side], ...]
    cuts: dict[str, str]
    config: ActivationsConfig
    seed: int
    size_bytes: int


def run(context: StageContext) -> None:
    """Write ``artifacts/activations/`` in this process, without an orchestrator."""
    subject = start(context)
    profile = None
    if context.params.activations.source == "auto":
        profile = profiled_here(context.workspace, subject)
    settled = settle(context, subject, profile, num_workers=1)
    for fill in fill_jobs(context, subject, settled, profile, num_parts=1):
        run_fill(fill)
    finish(context, subject, settled)


def start(context: StageContext) -> Subject:
    """Import what the old output holds, and read what is to be planned.

    Raises:
        ArtifactError: an earlier stage has not run.
    """
    workspace, params = context.workspace, context.params
    adopt_cache(workspace)
    return Subject.of(workspace, params.activations, params.distill, params.seed)


def adopt_cache(workspace: Workspace) -> None:
    """Import the cache's items from the output, for the store may be new."""
    for folder in workspace.artifacts("activations").glob("*/*/*"):
        workspace.store.adopt(KIND, folder)


def settle(
    context: StageContext, subject: Subject, profile: Profile | None, num_workers: int
) -> Settled:
    """Choose what is cached: as the parameters say, or, with `auto`, for the shortest plan.

    Args:
        profile: the measured costs; only `auto` needs it.
    """
    config = context.params.activations
    cuts = profile.cuts if profile is not None else {}
    everything = both_sides(block.path for block in subject.discovery.blocks)
    sides: list[tuple[str, Side]] = []
    if config.source == "cache":
        sides = everything
    elif config.source == "auto":
        assert profile is not None
        store = context.workspace.store
        plan = plan_of(
            subject,
            profile,
            num_workers,
            todo=subject.untrained(store),
            held=subject.held(store, cuts),
            disk_bytes=allowed_bytes(context.workspace, config),
        )
        sides = list(plan.cached)
    source: Literal["cache", "relay", "mixed"] = "mixed"
    if not sides:
        source = "relay"
    elif set(sides) == set(everything):
        source = "cache"
    size = _size(subject, sides)
    _log.info("source %s; the cache takes %.1f MB", source, size / 1e6)
    return Settled(
        source=source,
        sides=tuple(sides),
        cuts={path: cuts[path] for path, side in sides if side == "cut"},
        config=config,
        seed=subject.seed,
        size_bytes=size,
    )


def allowed_bytes(workspace: Workspace, config: ActivationsConfig) -> float:
    """What `auto` may put on the disk: as the parameters say, and what the disk has room for."""
    store = workspace.store.root
    store.mkdir(parents=True, exist_ok=True)
    parts = (store / KIND).glob("*.parts/item/shard-*")
    free_bytes = shutil.disk_usage(store).free + sum(p.stat().st_size for p in parts)
    if _is_copied(workspace):
        free_bytes = min(free_bytes, shutil.disk_usage(workspace.root).free)
    return min(config.max_cache_gb * 1e9, _SHARE_OF_DISK * free_bytes)


def _is_copied(workspace: Workspace) -> bool:
    """Whether the output cannot be hard links into the store, which lies on another disk."""
    return workspace.store.root.stat().st_dev != workspace.root.stat().st_dev


def fill_jobs(
    context: StageContext,
    subject: Subject,
    settled: Settled,
    profile: Profile | None,
    num_parts: int,
) -> list[FillJob]:
    """The jobs that write what the store does not hold yet; none if it holds all.

    Raises:
        ArtifactError: the disk has no room for it.
    """
    workspace, store = context.workspace, context.workspace.store
    missing = [s for s in settled.sides if not subject.holds(store, s, settled.cuts)]
    if not missing:
        return []
    there = parts_bytes(store, subject.keys(missing, settled.cuts).values())
    what = "the cache of activations"
    check_free_space(store.root, _size(subject, missing) - there, what)
    if _is_copied(workspace):
        check_free_space(workspace.root, settled.size_bytes, what)
    return [
        FillJob(
            sides=tuple(missing),
            cuts=settled.cuts,
            activations=subject.cached,
            seed=settled.seed,
            capture_batch=profile.capture_batch if profile else _CAPTURE_BATCH,
            teacher=workspace.artifacts("teacher"),
            prepared=workspace.prepared,
            store=store.root,
            part=part,
            num_parts=num_parts,
        )
        for part in range(num_parts)
    ]


def finish(context: StageContext, subject: Subject, settled: Settled) -> None:
    """Write ``artifacts/activations/``: what was settled and, by hard links, the cache's items."""
    store, keys = context.workspace.store, subject.keys(settled.sides, settled.cuts)
    finish_fill(store, keys)
    remove_parts(store)
    with atomic_dir(context.workspace.artifacts("activations")) as folder:
        for (path, side, view), key in keys.items():
            target = folder / path / side / f"view-{view}"
            target.parent.mkdir(parents=True, exist_ok=True)
            link_tree(store.path(KIND, key), target)
        write_json(folder / "activations.json", settled)


def read_settled(workspace: Workspace) -> Settled:
    """What the stage wrote."""
    return Settled.model_validate(
        read_json(workspace.artifacts("activations") / "activations.json")
    )


def _size(subject: Subject, sides: list[tuple[str, Side]]) -> int:
    blocks = {block.path: block for block in subject.discovery.blocks}
    return sum(
        side_bytes(blocks[path], side, subject.activations, subject.num_stored)
        for path, side in sides
    )
