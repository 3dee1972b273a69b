"""The whole pipeline as one Prefect flow: a task per stage, and the block phase as a sub-flow."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import deployment, flow_run
from prefect.states import Completed

from flows.activations import activations
from flows.artifacts import publish_results
from flows.distill import distill
from flows.dvc_gate import gate, hold_pipeline
from flows.overrides import write_overrides
from flows.pools import Pools, pools
from flows.retry import is_worth_a_retry
from flows.status import RunStatus, event, the_status
from flows.students import finetune_students, shrink_students, stitch_students
from pbkd.artifacts import Workspace
from pbkd.config import Params
from pbkd.errors import WorkspaceBusyError
from pbkd.locks import workspace_lock
from pbkd.stages import STAGES, StageContext, run_stage
from pbkd.stages.preflight import preflight
from pbkd.stages.register import is_registered
from pbkd.tracking import PipelineRun

_IN_FLOW = ("register",)
"""Stages that use no device and talk to the tracking server: they run in the flow's own process."""
_OF_STUDENTS = {
    "stitch": stitch_students,
    "finetune": finetune_students,
    "shrink": shrink_students,
}
_WAIT_S = 1.0
"""How often a run that waits for another one looks whether it has ended."""
_TRACKED = ("distill", "register")
"""Stages that log into the run in MLflow; before it has begun they would begin another."""


@flow(name="compress", validate_parameters=False)
def compress(
    root: str = ".",
    state: str | None = None,
    overrides: dict[str, Any] | None = None,
    if_busy: Literal["fail", "wait"] = "fail",
) -> None:
    """Compress the teacher of a workspace: every stage that is not up to date.

    Args:
        root: The workspace's folder, absolute.
        state: Its state folder. Empty: `.pbkd` in the workspace.
        overrides: Parameters to set in params.yaml before the run, by dotted name:
            `{"distill.epochs": 20}`. They stay in the file, for later runs, too.
        if_busy: What to do while another run holds the workspace: `fail` with its pid, or `wait`.

    Raises:
        ConfigError: params.yaml is not valid, or would not be with the overrides.
        WorkspaceBusyError: another run holds the workspace, and `if_busy` is not `wait`.
        PbkdError: a stage failed; what earlier stages finished is kept.
    """
    workspace = Workspace.find(Path(root), Path(state) if state else None)
    if deployment.id:
        _log_to_prefect()
    with _held(workspace, wait=if_busy == "wait"):
        for change in write_overrides(workspace.params, overrides or {}):
            event(f"params.yaml: {change}")
        context = StageContext.load(workspace)
        preflight(context)
        with pools(context.settings) as opened:
            run = _begin(workspace, context.params, opened)
            status = the_status()
            status.list_stages(STAGES)
            try:
                for name in STAGES:
                    if name in _TRACKED:
                        run.result()
                    with status.stage(name):
                        _run(name, _Place(workspace, opened, status), context.settings.retries)
            except BaseException as error:
                if isinstance(error, Exception) or run.done():  # Ctrl-C does not wait for MLflow
                    run.result().end(failed=True)
                raise
        run.result().end()
        publish_results(workspace, run.result())


@contextmanager
def _held(workspace: Workspace, *, wait: bool) -> Iterator[None]:
    """Hold the workspace, and the files of its stages against a ``dvc repro``."""
    lock = partial(workspace_lock, workspace.root, workspace.state, command=_of_a_deployment())
    locks: list[Callable[[], AbstractContextManager[None]]]
    locks = [lock, partial(hold_pipeline, workspace)]
    if wait:
        # a stage of `dvc repro` must not find the workspace taken by one who only looks
        locks.reverse()
    said = ""
    while True:
        with ExitStack() as held:
            try:
                for take in locks:
                    held.enter_context(take())
            except WorkspaceBusyError as error:
                if not wait:
                    raise
                if said != str(error):
                    event(f"waiting: {error}")
                said = str(error)
            else:
                yield
                return
        time.sleep(_WAIT_S)


def _log_to_prefect() -> None:
    """Send what the library logs to the flow run's page; under a worker nobody else does."""
    handlers = {
        *logging.getLogger("prefect.extra").handlers,
        *logging.getLogger("prefect").handlers,
    }
    for name in ("pbkd", "flows"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        for handler in handlers.difference(logger.handlers):
            logger.addHandler(handler)


def _of_a_deployment() -> str | None:
    """What to call this run where a worker runs it, whose command line says nothing."""
    return f"Prefect's flow run {flow_run.name}" if deployment.id else None


def _begin(workspace: Workspace, params: Params, opened: Pools) -> Future[PipelineRun]:
    """Begin the run in MLflow, which takes seconds: in a thread, while the first stages run."""
    begun: Future[PipelineRun] = Future()

    def begin() -> None:
        try:
            begun.set_result(PipelineRun.current(workspace, params))
        except BaseException as error:  # noqa: BLE001  whoever asks for the run gets it
            begun.set_exception(error)
            opened.close()  # or the flow would hear of it after a long stage

    # a daemon: the interpreter would wait at its end for one of an executor
    threading.Thread(target=begin, daemon=True).start()
    return begun


def _run(name: str, place: _Place, retries: int) -> None:
    if name != "distill":
        named: Any = stage.with_options(
            name=name, task_run_name=name, retries=retries, retry_delay_seconds=1
        )
        named(name, place)
        return
    workspace = place.workspace
    # a sub-flow cannot run inside a task, so the gate is held here
    with gate(name, workspace) as decision:
        if decision.up_to_date:
            place.status.skip(name)
            named = skipped.with_options(name=name, task_run_name=name)
            named(decision.reason)
        else:
            event(f"{name}: {decision.reason}")
            distill(str(workspace.root), str(workspace.state), str(decision.params))


class _Place:
    """What a stage needs; a plain class, so that Prefect does not look inside."""

    def __init__(self, workspace: Workspace, opened: Pools, status: RunStatus) -> None:
        self.workspace = workspace
        self.pools = opened
        self.status = status


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=is_worth_a_retry)
def stage(name: str, place: _Place) -> Any:
    """Run one stage in the worker pool unless DVC says that it is up to date."""
    workspace, pools = place.workspace, place.pools
    still_valid = (lambda: is_registered(workspace)) if name == "register" else (lambda: True)
    with gate(name, workspace, still_valid) as decision:
        if decision.up_to_date:
            place.status.skip(name)
            return skipped.fn(decision.reason)
        event(f"{name}: {decision.reason}")
        context = StageContext.load(workspace, decision.params)
        if name in _IN_FLOW:
            run_stage(name, context)
        elif name == "activations":
            activations(context, pools.workers)
        elif name in _OF_STUDENTS:
            _OF_STUDENTS[name](context, pools.whole, pools.workers)
        else:
            pools.whole.run(run_stage, name, context)
    return name


@task(cache_policy=NO_CACHE, persist_result=False)
def skipped(reason: str) -> Any:
    """Say in Prefect that a stage had nothing to do."""
    return Completed(name="Skipped", message=reason, data=reason)
