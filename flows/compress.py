"""The whole pipeline as one Prefect flow: a task per stage, and the block phase as a sub-flow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from flows.activations import activations
from flows.distill import distill
from flows.dvc_gate import gate, hold_pipeline
from flows.pool import WorkerPool, make_pool
from flows.retry import is_worth_a_retry
from flows.slots import whole_machine_slot
from pbkd.artifacts import Workspace
from pbkd.locks import workspace_lock
from pbkd.stages import STAGES, StageContext, run_stage
from pbkd.stages.preflight import preflight
from pbkd.stages.register import is_registered
from pbkd.tracking import PipelineRun

_IN_FLOW = ("register",)
"""Stages that use no device and talk to the tracking server: they run in the flow's own process."""

_FAN_OUT: dict[str, Any] = {"activations": activations, "distill": distill}
"""Stages that are sub-flows of their own: all workers share their work."""


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
        with make_pool([whole_machine_slot(context.settings)], context.settings) as pool:
            try:
                for name in STAGES:
                    _run(name, workspace, pool, context.settings.retries)
            except BaseException:
                run.end(failed=True)
                raise
        run.end()


def _run(name: str, workspace: Workspace, pool: WorkerPool, retries: int) -> None:
    if name not in _FAN_OUT:
        named: Any = stage.with_options(
            name=name, task_run_name=name, retries=retries, retry_delay_seconds=1
        )
        named(name, _Place(workspace, pool))
        return
    # a sub-flow cannot run inside a task, so the gate is held here
    with gate(name, workspace) as decision:
        if decision.up_to_date:
            named = skipped.with_options(name=name, task_run_name=name)
            named(decision.reason)
        else:
            _FAN_OUT[name](str(workspace.root), str(workspace.state), str(decision.params))


class _Place:
    """Workspace and pool; a plain class, so that Prefect does not look inside."""

    def __init__(self, workspace: Workspace, pool: WorkerPool) -> None:
        self.workspace = workspace
        self.pool = pool


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=is_worth_a_retry)
def stage(name: str, place: _Place) -> Any:
    """Run one stage in the worker pool unless DVC says that it is up to date."""
    workspace, pool = place.workspace, place.pool
    still_valid = (lambda: is_registered(workspace)) if name == "register" else (lambda: True)
    with gate(name, workspace, still_valid) as decision:
        if decision.up_to_date:
            return skipped.fn(decision.reason)
        get_run_logger().info("%s: %s", name, decision.reason)
        context = StageContext.load(workspace, decision.params)
        if name in _IN_FLOW:
            run_stage(name, context)
        else:
            pool.run(run_stage, name, context)
    return name


@task(cache_policy=NO_CACHE, persist_result=False)
def skipped(reason: str) -> Any:
    """Say in Prefect that a stage had nothing to do."""
    return Completed(name="Skipped", message=reason, data=reason)
