"""The job that fills a part of the cache: paths and plain values in, shards in the store out."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from pbkd.activations.cache import Side, cache_keys, fill_cache
from pbkd.activations.capture import Capture
from pbkd.activations.source import activation_stream
from pbkd.artifacts import Store
from pbkd.config import ActivationsConfig
from pbkd.data import load_prepared
from pbkd.devices import best_device, enough_memory
from pbkd.errors import disk_errors_explained
from pbkd.models import load_teacher


class FillJob(BaseModel):
    """Sides to cache in every view, and which part of their shards.

    Attributes:
        sides: (block, side).
        cuts: block to the module whose input its side "cut" is.
        capture_batch: images per pass of the teacher.
        part, num_parts: shards whose number is ``part`` modulo ``num_parts``.
    """

    model_config = ConfigDict(frozen=True)

    sides: tuple[tuple[str, Side], ...]
    cuts: dict[str, str]
    activations: ActivationsConfig
    seed: int
    capture_batch: int
    teacher: Path
    prepared: Path
    store: Path
    part: int = 0
    num_parts: int = 1


def run_fill(job: FillJob) -> None:
    """Write the shards of one part that are not there yet.

    Raises:
        PbkdError: the teacher or the data cannot be read, or the disk is full.
    """
    device = best_device()
    teacher, card = load_teacher(job.teacher, allow_code=True)
    teacher.to(device)
    prepared = load_prepared(job.prepared)
    train, val = (
        activation_stream(prepared.split(name), card, job.activations, job.seed, device)
        for name in ("train", "val")
    )
    sample = val.plain(torch.arange(min(job.capture_batch, len(val))))
    paths = list(dict.fromkeys(path for path, _ in job.sides))
    capture = Capture(teacher, paths, sample, getattr(torch, job.activations.dtype))
    keys = cache_keys(card, job.activations, job.seed, job.sides, job.cuts)
    what = f"batches of {job.capture_batch} images for the activations of {len(paths)} blocks"
    with disk_errors_explained(), enough_memory(what, "set `activations.source: relay`"):
        fill_cache(
            Store(job.store),
            capture,
            keys,
            train,
            val,
            job.capture_batch,
            job.part,
            job.num_parts,
            cuts=job.cuts,
        )
