"""Stage `activations` on the worker pool: all workers measure, and fill the cache together."""

from __future__ import annotations

from functools import partial

from flows.pool import WorkerPool, run_all
from flows.profile import profile_workers
from pbkd.activations import FillJob, run_fill
from pbkd.errors import disk_errors_explained
from pbkd.stages import StageContext
from pbkd.stages.activations import fill_jobs, finish, settle, start
from pbkd.stages.context import recorded


def activations(context: StageContext, pool: WorkerPool) -> None:
    """Settle the source and fill the cache.

    Raises:
        PbkdError: a part could not be filled; finished shards are kept.
    """
    with disk_errors_explained(), recorded("activations", context.workspace):
        context.workspace.sweep()
        num_workers = len(pool.slots)
        subject = start(context)
        profile = None
        if context.params.activations.source == "auto":
            profile = profile_workers(context, subject, pool)
        settled = settle(context, subject, profile, num_workers)
        jobs = fill_jobs(context, subject, settled, profile, num_workers)
        run_all(pool, [partial(_fill, job) for job in jobs])
        finish(context, subject, settled)


def _fill(job: FillJob, pool: WorkerPool) -> None:
    pool.run(run_fill, job)
