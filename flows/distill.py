"""The sub-flow of the block phase: one Prefect task per block, mapped over the worker pool."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prefect import flow, get_run_logger, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.artifacts import Artifact, Bar, Feed, job_number, mlflow_artifact, plan_markdown
from flows.pool import WorkerPool
from flows.pools import pools
from flows.profile import profile_workers
from flows.progress import Monitor, candidates_of, log_figures
from flows.retry import is_worth_a_retry
from flows.slots import Slot
from flows.status import RunStatus, the_status
from pbkd.artifacts import Workspace, write_json
from pbkd.distill import JobReport, JobSpec, Profile, run_job
from pbkd.errors import JobError, PoolClosedError
from pbkd.measure import (
    EnergyMeter,
    EnergyReading,
    EnergyWindow,
    device_info,
    device_is_shared,
    job_energy_j,
)
from pbkd.report import BlockPhase, JobFigures
from pbkd.stages import StageContext
from pbkd.stages.context import energy_meter, recorded
from pbkd.stages.distill import (
    DistillPlan,
    finish_distill,
    plan_distill,
    start,
)
from pbkd.stages.planning import Subject, is_done
from pbkd.tracking import PipelineRun

_POLL_S = 0.2
_MAX_TASKS = 4096


@task(
    name="block",
    task_run_name="{block}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=is_worth_a_retry,
)
def distill_block(block: str, fan_out: FanOut) -> Any:
    """Train and score the candidates of one block; at once where the store holds them."""
    if fan_out.is_done(block):
        return Completed(name="Skipped", message="taken from the store", data=block)
    fan_out.build(block)
    return block


class _Measuring:
    """What the task below needs; a plain class, so that Prefect does not look inside."""

    def __init__(self, context: StageContext, subject: Subject, pool: WorkerPool) -> None:
        self.context = context
        self.subject = subject
        self.pool = pool


@task(
    name="profile",
    task_run_name="profile",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=is_worth_a_retry,
)
def measure_costs(measuring: _Measuring) -> Profile:
    """Measure what the candidates cost on these workers, unless this machine knows it."""
    return profile_workers(measuring.context, measuring.subject, measuring.pool)


@flow(
    name="distill",
    flow_run_name="distill",
    validate_parameters=False,
    task_runner=ThreadPoolTaskRunner(max_workers=_MAX_TASKS),  # type: ignore[arg-type]
)
def distill(root: str, state: str, params: str) -> None:
    """Run stage `distill` of a workspace.

    Args:
        root: the workspace's folder.
        state: its state folder.
        params: the params.yaml to read.

    Raises:
        JobError: some blocks failed; what is finished is kept, and a rerun builds only the others.
    """
    context = StageContext.load(Workspace(Path(root), Path(state)), Path(params))
    settings, workspace = context.settings, context.workspace
    status = the_status()
    with Feed() as feed, recorded("distill", workspace), status.stage("distill"):
        workspace.sweep()
        run = PipelineRun.current(workspace, context.params)
        feed.show("mlflow-run", mlflow_artifact(workspace, run))
        subject = start(context)
        todo = subject.left_to_do(context.workspace.store)
        plan = DistillPlan(tuple(subject.trainees))
        profile: Profile | None = None
        meter = energy_meter(settings)
        with pools(settings) as opened:
            pool = opened.workers
            num_workers = len(pool.slots)
            if todo:
                measure = measure_costs.with_options(
                    retries=settings.retries, retry_delay_seconds=1
                )
                profile = measure(_Measuring(context, subject, pool))
                plan = plan_distill(context, subject, todo, profile, num_workers)
                feed.show("plan", _plan_artifact(plan, profile))
            candidates = candidates_of(list(plan.trainees), workspace.store)
            status.begin_phase(candidates, context.params.distill.epochs, plan.wall_s)
            fan_out = FanOut(pool, plan, context, meter, status)
            blocks = distill_block.with_options(retries=settings.retries, retry_delay_seconds=1)
            progress = workspace.state / "progress"
            with (
                Monitor(todo, progress, workspace.store, run, status, feed),
                meter.window("blocks") as window,
            ):
                futures = blocks.map(plan.blocks, unmapped(fan_out))
                try:
                    wait(list(futures))
                except BaseException:  # Ctrl-C, SIGTERM: the tasks would wait for their jobs
                    opened.close()
                    raise
        if profile is not None:
            feed.show("plan", _plan_artifact(plan, profile, fan_out.jobs))
        log_figures(list(plan.trainees), workspace.store, run)
        _raise_failures(plan.blocks, [future.state for future in futures])
        status.end_phase()
        finish_distill(context, plan, [job.report for job in fan_out.jobs])
        if fan_out.jobs:
            phase = _block_phase(fan_out.jobs, plan, num_workers, window.result)
            write_json(workspace.state / "block_phase.json", phase)


@dataclass(frozen=True)
class _FinishedJob:
    """A job's report, where it ran, and its device's joules if it had the device alone."""

    report: JobReport
    slot: Slot
    energy_j: float | None


class FanOut:
    """Lets the blocks of one job share one submission; each block is done when its items are there.

    A plain class, so that Prefect passes it to the tasks without looking inside.
    """

    def __init__(
        self,
        pool: WorkerPool,
        plan: DistillPlan,
        context: StageContext,
        meter: EnergyMeter,
        status: RunStatus,
    ) -> None:
        self.jobs: list[_FinishedJob] = []
        self._pool = pool
        self._status = status
        self._meter = meter
        self._plan = plan
        self._store = context.workspace.store
        self._jobs_of: dict[str, list[JobSpec]] = {block: [] for block in plan.blocks}
        for job in plan.jobs:
            for block in dict.fromkeys(trainee.block for trainee in job.trainees):
                self._jobs_of[block].append(job)
        self._rank = {job.job_id: index for index, job in enumerate(plan.jobs)}
        self._futures: dict[str, Future[JobReport]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(plan.jobs)))

    def is_done(self, block: str) -> bool:
        """Whether the store holds all of a block's candidates, scored."""
        return all(is_done(self._store, trainee) for trainee in self._plan.of_block(block))

    def build(self, block: str) -> None:
        """Wait for the block, submitting its jobs unless they are under way.

        Raises:
            PbkdError: a job failed before the block was done.
        """
        futures = [self._submitted(job) for job in self._jobs_of[block]]
        while not all(future.done() for future in futures) and not self.is_done(block):
            time.sleep(_POLL_S)
        if not self.is_done(block):
            for future in futures:
                future.result()
            raise JobError(f"block {block}: its job ended without a result; run it again")
        get_run_logger().info("block %s is done", block)

    def _submitted(self, job: JobSpec) -> Future[JobReport]:
        with self._lock:
            future = self._futures.get(job.job_id)
            if future is None or (future.done() and future.exception() is not None):
                run = contextvars.copy_context().run  # Prefect's, for what the job logs
                future = self._threads.submit(run, self._run, job)
                self._futures[job.job_id] = future
            return future

    def _run(self, job: JobSpec) -> JobReport:
        priority = -float(self._rank[job.job_id])
        names = [trainee.name for trainee in job.trainees]
        ran_on: list[Slot] = []
        with ExitStack() as measuring:
            windows: list[EnergyWindow] = []

            def begin(slot: Slot) -> None:
                ran_on.append(slot)
                self._status.start_job(names, slot.name)
                windows.append(measuring.enter_context(self._meter.window(job.job_id)))

            try:
                report = self._pool.run(
                    run_job, job, priority=priority, heartbeat=job.heartbeat, on_start=begin
                )
            except PoolClosedError:  # the run is at its end
                raise
            except Exception as error:
                self._status.fail_job(names, str(error))
                raise
            counter = gpu_alone(ran_on[0])
        energy_j = None
        if counter is not None:
            energy_j = job_energy_j(windows[0].result, counter, exclusive=True)
        self.jobs.append(_FinishedJob(report, ran_on[0], energy_j))
        return report


def gpu_alone(slot: Slot) -> str | None:
    """The energy counter of a slot's GPU if no other process computes there now, else None.

    A share of the cores is never alone on its processor.
    """
    own = [child.pid for child in psutil.Process().children(recursive=True)]
    for gpu in device_info():
        if f"gpu-{gpu.uuid}" in slot.locks:
            index = int(gpu.name.removeprefix("gpu-"))  # a lost GPU before it is not listed
            return gpu.name if device_is_shared(index, own) is False else None
    return None


def _plan_artifact(
    plan: DistillPlan, profile: Profile, jobs: Sequence[_FinishedJob] = ()
) -> Artifact:
    assert plan.predicted is not None, "a plan goes with a profile"
    started = min((job.report.started_at for job in jobs), default=0.0)
    ran: dict[str, list[Bar]] = {}
    for job in jobs:
        start_s, duration_s = job.report.started_at - started, job.report.duration_s
        bar = Bar(job_number(job.report.job_id), start_s, duration_s)
        ran.setdefault(job.slot.name, []).append(bar)
    num_workers = len(plan.predicted.placement.workers)
    measured = profile.speeds
    speeds = measured if len(measured) == num_workers else (1.0,) * num_workers
    return plan_markdown(plan.predicted, speeds, plan.wall_s, ran)


def _raise_failures(blocks: list[str], states: list[Any]) -> None:
    failed = {
        block: state.result(raise_on_failure=False)
        for block, state in zip(blocks, states, strict=True)
        if not state.is_completed()
    }
    if failed:
        reasons = "; ".join(f"{block}: {error}" for block, error in failed.items())
        raise JobError(
            f"distill: {len(failed)} of {len(blocks)} blocks failed: {reasons}; the others are "
            "kept, run again to build the missing ones"
        )


def _block_phase(
    jobs: list[_FinishedJob], plan: DistillPlan, num_workers: int, energy: EnergyReading
) -> BlockPhase:
    predicted_s = {job.job_id: job.cost_s for job in plan.predicted.jobs} if plan.predicted else {}
    started = min(job.report.started_at for job in jobs)
    wall_s = max(job.report.started_at + job.report.duration_s for job in jobs) - started
    jobs_s = sum(job.report.duration_s for job in jobs)
    return BlockPhase(
        num_workers=num_workers,
        num_jobs=len(jobs),
        wall_s=wall_s,
        predicted_s=plan.wall_s,
        jobs_s=jobs_s,
        speedup=jobs_s / wall_s,
        score_s=sum(job.report.score_s for job in jobs),
        energy_j=energy.total_j,
        jobs=tuple(
            JobFigures(
                job_id=job.report.job_id,
                worker=job.slot.name,
                trained=job.report.trained,
                started_s=job.report.started_at - started,
                duration_s=job.report.duration_s,
                predicted_s=predicted_s.get(job.report.job_id),
                energy_j=job.energy_j,
            )
            for job in jobs
        ),
    )
