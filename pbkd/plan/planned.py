"""The records of a finished plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pbkd.plan.placement import Placement

CachedItem = tuple[str, Literal["cut", "input", "output"]]
"""A block's path and what a cache holds of it; "cut": the exact input that a relay goes on from."""


@dataclass(frozen=True)
class PlannedJob:
    """Trainees that one worker trains in one go with one source.

    Attributes:
        job_id: "job-000" is dispatched first.
        trainees: names, in the order of their blocks.
        blocks: paths of their blocks, in the teacher's order.
        source: "relay": the teacher runs up to the last block; "cache": both sides of every block
            are read.
        start: path of the block whose cached exact input the relay begins with; None: the images.
        cost_s: seconds on a worker of speed 1, the source included.
        memory_bytes: of all its trainees.
    """

    job_id: str
    trainees: tuple[str, ...]
    blocks: tuple[str, ...]
    source: Literal["cache", "relay"]
    start: str | None
    cost_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Work:
    """What the seconds at speed 1 of a plan go into; they add up to its ``work_s``."""

    own_s: float
    teacher_s: float
    read_s: float
    fill_s: float
    jobs_s: float


@dataclass(frozen=True)
class Plan:
    """The jobs of the block phase and what they are predicted to take.

    Attributes:
        jobs: in the order in which a pool should start them.
        cached: items that the cache must hold, in the teacher's order: new ones and those that are
            there already and are read.
        disk_bytes: of the new ones.
        memory_bytes: of the job that takes most.
        fill_s: wall time of filling the cache, shared by all workers by speed.
        placement: its indices are those of ``jobs``.
        wall_s: ``fill_s`` and the makespan.
        work_s: all jobs and the filling on one worker of speed 1.
        bound_s: no placement of these jobs makes the phase shorter.
        work: what ``work_s`` is made of.
        bottleneck: one sentence: what limits the plan, and whether more workers help.
        too_large: trainees above the limit of memory.
    """

    jobs: tuple[PlannedJob, ...]
    cached: tuple[CachedItem, ...]
    disk_bytes: int
    memory_bytes: int
    fill_s: float
    placement: Placement
    wall_s: float
    work_s: float
    bound_s: float
    work: Work
    bottleneck: str
    too_large: tuple[str, ...]
