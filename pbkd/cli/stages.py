"""A verb per stage."""

from __future__ import annotations

from typing import Annotated

import typer

from pbkd.cli.app import app
from pbkd.cli.common import live_display, open_pools, this_workspace, use_device, use_prefect
from pbkd.locks import workspace_lock


def _stage(name: str) -> None:
    use_device()
    from pbkd.stages import StageContext, run_stage
    from pbkd.stages.preflight import preflight

    workspace = this_workspace()
    with workspace_lock(workspace.root, workspace.state):
        context = StageContext.load(workspace)
        if name == "prepare":  # the first of `dvc repro`: what a later stage lacks is known now
            preflight(context)
        run_stage(name, context)


def _students(name: str, *, remeasure: bool = False) -> None:
    """A stage whose students are jobs; a single one runs in this process."""
    use_device()
    from flows.students import ThisProcess, finetune_students, shrink_students, stitch_students
    from pbkd.stages import StageContext
    from pbkd.students.latency_table import forget_latencies

    workspace = this_workspace()
    with workspace_lock(workspace.root, workspace.state), open_pools() as opened:
        if remeasure:
            forget_latencies(workspace)
        run_stage = {
            "stitch": stitch_students,
            "finetune": finetune_students,
            "shrink": shrink_students,
        }[name]
        run_stage(StageContext.load(workspace), ThisProcess(), opened.workers)


@app.command(rich_help_panel="Stages")
def prepare() -> None:
    """Decode the images once into data/prepared/."""
    _stage("prepare")


@app.command(rich_help_panel="Stages")
def teacher() -> None:
    """Train the teacher, and stop if it is too weak."""
    _stage("teacher")


@app.command(rich_help_panel="Stages")
def blocks() -> None:
    """Find the teacher's blocks and list their candidates."""
    _stage("blocks")


@app.command(rich_help_panel="Stages")
def activations() -> None:
    """Settle the source of activations; fill the cache in parallel if there is one."""
    with open_pools() as opened:
        opened.workers.preload()
        from flows.activations import activations as fill
        from pbkd.stages import StageContext

        workspace = this_workspace()
        with workspace_lock(workspace.root, workspace.state):
            fill(StageContext.load(workspace), opened.workers)


@app.command(rich_help_panel="Stages")
def distill() -> None:
    """Train every candidate of every block in parallel (a Prefect flow), and score its damage."""
    use_prefect()
    from flows.server import temporary_server

    server = temporary_server()
    with live_display("pbkd distill"), open_pools() as opened:
        opened.workers.preload()
        from flows.distill import distill as flow

        server.wait()
        workspace = this_workspace()
        with workspace_lock(workspace.root, workspace.state):
            flow(str(workspace.root), str(workspace.state), str(workspace.params))


@app.command(rich_help_panel="Stages")
def stitch(
    remeasure: Annotated[
        bool, typer.Option(help="Measure anew what blocks and candidates take on this machine.")
    ] = False,
) -> None:
    """Choose candidates for every budget; stitch and repair the students."""
    _students("stitch", remeasure=remeasure)


@app.command(rich_help_panel="Stages")
def finetune() -> None:
    """Distill each student end to end; train baselines."""
    _students("finetune")


@app.command(rich_help_panel="Stages")
def shrink() -> None:
    """Prune, factorize, quantize and code the students; an empty recipe passes them through."""
    _students("shrink")


@app.command(rich_help_panel="Stages")
def evaluate(
    remeasure: Annotated[bool, typer.Option(help="Measure latency anew on this machine.")] = False,
) -> None:
    """Measure teacher and students, write results/."""
    use_device()
    from pbkd.stages import StageContext, run_stage
    from pbkd.stages.evaluate import forget_measurements

    workspace = this_workspace()
    with workspace_lock(workspace.root, workspace.state):
        if remeasure:
            forget_measurements(workspace)
        run_stage("evaluate", StageContext.load(workspace))


@app.command(rich_help_panel="Stages")
def register() -> None:
    """Put teacher and students into the MLflow registry."""
    _stage("register")
