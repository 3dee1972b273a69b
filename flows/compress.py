"""The whole pipeline as one Prefect flow: a task per stage, and the block phase as a sub-flow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from flows.activations import activations
from flows.distill import distill, shared_workers
from flows.dvc_gate import gate, hold_pipeline
from flows.pool import WorkerPool, make_pool
from flows.retry import is_worth_a_retry
from flows.slots import whole_machine_slot, worker_slots
from pbkd.artifacts import Workspace
from pbkd.locks import workspace_lock
from pbkd.settings import Settings
from pbkd.stages import STAGES, StageContext, run_stage
from pbkd.stages.preflight import preflight
from pbkd.stages.register import is_registered
from pbkd.tracking import PipelineRun

_IN_FLOW = ("register",)
"""Stages that use no device and talk to the tracking server: they run in the flow's own process."""


@flow(name="compress", validate_parameters=False)
def compress(root: str = ".", state: str | None = None) -> None:
    """Compress the teacher of a workspace: every stage that is not up to date.

    Args:
        root: the workspace's folder.
        state: its state folder; default: .pbkd beside the DVC root.

    Raises:
        WorkspaceBusyError: another run holds the workspace.
        PbkdError: a stage failed; what earlier stages finished is kept.
    """
    workspace = Workspace.find(Path(root), Path(state) if state else None)
    with workspace_lock(workspace.root, workspace.state), hold_pipeline(workspace):
        context = StageContext.load(workspace)
        preflight(context)
        run = PipelineRun.current(workspace, context.params)
        with _pools(context.settings) as pools:
            try:
                for name in STAGES:
                    _run(name, workspace, pools, context.settings.retries)
            except BaseException:
                run.end(failed=True)
                raise
        run.end()


@dataclass(frozen=True)
class _Pools:
    """Where stages run: those that are one job, and those that all workers share."""

    whole: WorkerPool
    workers: WorkerPool


@contextmanager
def _pools(settings: Settings) -> Iterator[_Pools]:
    """Two pools, or one where the only worker is the whole machine; processes start when needed."""
    whole, slots = whole_machine_slot(settings), worker_slots(settings)
    with ExitStack() as stack:
        one = stack.enter_context(make_pool([whole], settings))
        many = one if slots == [whole] else stack.enter_context(make_pool(slots, settings))
        yield _Pools(one, many)


def _run(name: str, workspace: Workspace, pools: _Pools, retries: int) -> None:
    if name != "distill":
        named: Any = stage.with_options(
            name=name, task_run_name=name, retries=retries, retry_delay_seconds=1
        )
        named(name, _Place(workspace, pools))
        return
    # a sub-flow cannot run inside a task, so the gate is held here
    with gate(name, workspace) as decision:
        if decision.up_to_date:
            named = skipped.with_options(name=name, task_run_name=name)
            named(decision.reason)
        else:
            with shared_workers(pools.workers):
                distill(str(workspace.root), str(workspace.state), str(decision.params))


class _Place:
    """Workspace and pools; a plain class, so that Prefect does not look inside."""

    def __init__(self, workspace: Workspace, pools: _Pools) -> None:
        self.workspace = workspace
        self.pools = pools


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=is_worth_a_retry)
def stage(name: str, place: _Place) -> Any:
    """Run one stage in the worker pool unless DVC says that it is up to date."""
    workspace, pools = place.workspace, place.pools
    still_valid = (lambda: is_registered(workspace)) if name == "register" else (lambda: True)
    with gate(name, workspace, still_valid) as decision:
        if decision.up_to_date:
            return skipped.fn(decision.reason)
        get_run_logger().info("%s: %s", name, decision.reason)
        context = StageContext.load(workspace, decision.params)
        if name in _IN_FLOW:
            run_stage(name, context)
        elif name == "activations":
            activations(context, pools.workers)
        else:
            pools.whole.run(run_stage, name, context)
    return name


@task(cache_policy=NO_CACHE, persist_result=False)
def skipped(reason: str) -> Any:
    """Say in Prefect that a stage had nothing to do."""
    return Completed(name="Skipped", message=reason, data=reason)
