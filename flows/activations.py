"""The sub-flow that settles the source of activations and lets all workers fill the cache."""

from __future__ import annotations

from pathlib import Path

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner

from flows.pool import WorkerPool, make_pool
from flows.profile import profile_workers
from flows.retry import is_worth_a_retry
from flows.slots import worker_slots
from pbkd.activations import FillJob, run_fill
from pbkd.artifacts import Workspace
from pbkd.stages import StageContext
from pbkd.stages.activations import fill_jobs, finish, settle, start
from pbkd.stages.context import recorded


class _Filling:
    """The pool and the jobs; a plain class, so that Prefect does not look inside."""

    def __init__(self, pool: WorkerPool, jobs: list[FillJob]) -> None:
        self.pool = pool
        self.jobs = jobs


@task(
    name="fill",
    task_run_name="fill-{part}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=is_worth_a_retry,
)
def fill(part: int, filling: _Filling) -> None:
    """Write one part of the cache's shards; those that are there stay."""
    filling.pool.run(run_fill, filling.jobs[part])


@flow(
    name="activations",
    flow_run_name="activations",
    validate_parameters=False,
    task_runner=ThreadPoolTaskRunner(max_workers=4096),  # type: ignore[arg-type]
)
def activations(root: str, state: str, params: str) -> None:
    """Run stage `activations` of a workspace.

    Args:
        root: the workspace's folder.
        state: its state folder.
        params: the params.yaml to read.

    Raises:
        PbkdError: a part could not be filled; finished shards are kept.
    """
    context = StageContext.load(Workspace(Path(root), Path(state)), Path(params))
    settings, workspace = context.settings, context.workspace
    with recorded("activations", workspace):
        workspace.sweep()
        slots = worker_slots(settings)
        subject = start(context)
        with make_pool(slots, settings) as pool:
            profile = None
            if context.params.activations.source == "auto":
                profile = profile_workers(context, subject, pool)
            settled = settle(context, subject, profile, len(slots))
            jobs = fill_jobs(context, subject, settled, profile, len(slots))
            parts = fill.with_options(retries=settings.retries, retry_delay_seconds=1)
            futures = parts.map(range(len(jobs)), unmapped(_Filling(pool, jobs)))
            wait(list(futures))
            for future in futures:
                future.result()
        finish(context, subject, settled)
