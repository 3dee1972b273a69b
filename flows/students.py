"""Stages `stitch`, `finetune` and `shrink` on the worker pool: students are jobs side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from flows.pool import WorkerPool, run_all
from flows.slots import Slot
from pbkd.elastic.label_plan import LABELS
from pbkd.elastic.status import TeachersStatus
from pbkd.errors import disk_errors_explained
from pbkd.settings import Settings
from pbkd.shrink import SHRUNK
from pbkd.stages import StageContext, finetune, shrink, stitch
from pbkd.stages.baselines import BASELINES
from pbkd.stages.context import recorded
from pbkd.stages.labels import needs_teachers, teachers_of
from pbkd.stages.repair_job import REPAIRED
from pbkd.stages.student_job import FINETUNED

T = TypeVar("T")


class ThisProcess:
    """A ``WorkerPool`` without processes: for a verb, whose own process may use the device."""

    slots: Sequence[Slot] = ()

    def run(
        self,
        function: Callable[..., T],
        *args: object,
        priority: float = 0.0,
        heartbeat: Path | None = None,
        on_start: Callable[[Slot], None] | None = None,
    ) -> T:
        """Call the function."""
        return function(*args)

    def leave_room(self, cpus: int) -> int:
        """One job at a time."""
        return 1

    def close(self) -> None:
        """Nothing to end."""


class StudentJob(Protocol):
    """What the pool must know of a student's job."""

    @property
    def key(self) -> str:
        """Of the item that it puts into the store."""
        ...

    @property
    def heartbeat(self) -> Path:
        """A file that the job touches while it is alive."""
        ...


J = TypeVar("J", bound=StudentJob)


def stitch_students(context: StageContext, whole: WorkerPool, workers: WorkerPool) -> None:
    """Choose the students, then stitch and repair them.

    Args:
        whole: for the choice, and for a single student or worker.
        workers: for several students.

    Raises:
        PbkdError: a budget cannot be met, or a job failed; finished students are kept.
    """
    with disk_errors_explained(), recorded("stitch", context.workspace):
        context.workspace.sweep()
        jobs = whole.run(stitch.start, context)
        pools = _Pools(context, whole, workers)
        pools.run(stitch.run_repair, REPAIRED, jobs)
        stitch.finish(context, jobs)


def finetune_students(context: StageContext, whole: WorkerPool, workers: WorkerPool) -> None:
    """Label views where labels are kept, fine-tune, train baselines; arguments, errors as above."""
    with disk_errors_explained(), recorded("finetune", context.workspace):
        context.workspace.sweep()
        jobs = whole.run(finetune.start, context)
        pools = _Pools(context, whole, workers)
        pools.run(finetune.run_labels, LABELS, finetune.start_labels(context, jobs))
        settings = Settings.from_env()
        at_once = None
        if settings.runner == "ray" and needs_teachers(context, jobs):
            at_once = workers.leave_room(max(1, settings.min_teachers))
        with teachers_of(context, jobs, settings, _artifact()) as ready:
            pools.run(finetune.run_finetune, FINETUNED, ready, at_once)
        baselines = finetune.start_baselines(context, jobs)
        pools.run(finetune.run_baseline, BASELINES, baselines)
        finetune.finish(context, jobs, baselines)


def _artifact() -> Callable[[TeachersStatus], None]:
    if "prefect" not in sys.modules:  # a verb of its own: nothing to show it in
        return lambda _: None
    from flows.progress import teachers_artifact

    return teachers_artifact()


def shrink_students(context: StageContext, whole: WorkerPool, workers: WorkerPool) -> None:
    """Take the students through their recipes; arguments and errors as above."""
    with disk_errors_explained(), recorded("shrink", context.workspace):
        context.workspace.sweep()
        jobs = shrink.start(context)
        _Pools(context, whole, workers).run(shrink.run_shrink, SHRUNK, jobs)
        shrink.finish(context, jobs)


class _Pools:
    def __init__(self, context: StageContext, whole: WorkerPool, workers: WorkerPool) -> None:
        self._store = context.workspace.store
        self._whole, self._workers = whole, workers
        # a second must be worth the same for a student's blocks, for itself, and for its baselines
        self._is_timed = bool(context.params.finetune.baselines)

    def run(
        self,
        function: Callable[[J], None],
        kind: str,
        jobs: Sequence[J],
        at_once: int | None = None,
    ) -> None:
        """What the store lacks: side by side, or a single one on the whole machine.

        Args:
            at_once: jobs side by side, always, and so many at most.
        """
        left = [job for job in jobs if not self._store.has(kind, job.key)]
        fewest = 0 if self._is_timed or at_once else 1
        many = len(left) > fewest and len(self._workers.slots) > 1
        pool = self._workers if many else self._whole
        if pool.slots:
            run_all(pool, [partial(_one, function, job) for job in left], at_once)
        else:
            for job in left:  # no threads in this process: Ctrl-C would wait for them
                function(job)


def _one(function: Callable[[J], None], job: J, pool: WorkerPool) -> None:
    pool.run(function, job, heartbeat=job.heartbeat)
