"""Stages `stitch` and `finetune` on the worker pool: a job per student, all at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from flows.pool import WorkerPool, run_all
from flows.slots import Slot
from pbkd.errors import disk_errors_explained
from pbkd.stages import StageContext, finetune, stitch
from pbkd.stages.context import recorded

T = TypeVar("T")


class ThisProcess:
    """A ``WorkerPool`` without processes: for a verb, whose own process may use the device."""

    slots: Sequence[Slot] = ()

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()

    def run(
        self,
        function: Callable[..., T],
        *args: object,
        priority: float = 0.0,
        heartbeat: Path | None = None,
        on_start: Callable[[Slot], None] | None = None,
    ) -> T:
        """Call the function, when no other one runs."""
        with self._one_at_a_time:
            return function(*args)

    def close(self) -> None:
        """Nothing to end."""


class StudentJob(Protocol):
    """What the pool must know of a student's job."""

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
        _run(stitch.run_repair, jobs, whole, workers)
        stitch.finish(context, jobs)


def finetune_students(context: StageContext, whole: WorkerPool, workers: WorkerPool) -> None:
    """Fine-tune the students, then train their baselines; arguments and errors as above."""
    with disk_errors_explained(), recorded("finetune", context.workspace):
        context.workspace.sweep()
        jobs = whole.run(finetune.start, context)
        _run(finetune.run_finetune, jobs, whole, workers)
        baselines = finetune.start_baselines(context, jobs)
        _run(finetune.run_baseline, baselines, whole, workers)
        finetune.finish(context, jobs, baselines)


def _run(
    function: Callable[[J], None], jobs: Sequence[J], whole: WorkerPool, workers: WorkerPool
) -> None:
    """All jobs side by side, if there are several workers; a single one has the whole machine."""
    pool = workers if min(len(jobs), len(workers.slots)) > 1 else whole
    run_all(pool, [partial(_one, function, job) for job in jobs])


def _one(function: Callable[[J], None], job: J, pool: WorkerPool) -> None:
    pool.run(function, job, heartbeat=job.heartbeat)
