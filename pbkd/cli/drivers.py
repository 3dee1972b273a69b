"""Verbs that make a workspace, run it, and look at what it will do or has done."""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pbkd.cli.app import app
from pbkd.cli.common import (
    live_display,
    open_pools,
    print_table,
    shown,
    this_workspace,
    use_prefect,
)
from pbkd.errors import ArtifactError, ConfigError
from pbkd.locks import workspace_lock

if TYPE_CHECKING:
    from pbkd.artifacts import Workspace

_LEFT_OVERS = ("checkpoints", "labels")  # of the state folder, beside the store
_MAX_JOBS = 20  # that `plan` lists; its page has them all


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the workspace; made if missing.")],
    preset: Annotated[
        str, typer.Option(help="digits, cifar10-vgg16, cifar10-resnet20 or image-folder.")
    ] = "image-folder",
    data: Annotated[
        Path | None, typer.Option(help="Folder, .tar.gz or .zip of images, to be tracked by DVC.")
    ] = None,
) -> None:
    """Make a workspace of your own: params.yaml, dvc.yaml, git and DVC.

    Example: `pbkd init flowers --preset image-folder --data ~/flowers.zip`
    """
    from pbkd.config import load_params
    from pbkd.workspace_init import init_workspace

    params = init_workspace(folder, preset, data)
    path = load_params(params).prepare.path
    print(f"workspace {shown(params.parent)}: preset {preset}, images in {path}")
    if data is None and preset != "digits":
        print(f"put your images into {shown(params.parent / path)}, then: dvc add")
    print(f"next: cd {shown(params.parent)}; look at params.yaml; pbkd run")


@app.command()
def run() -> None:
    """Run the whole pipeline as one Prefect flow, skipping what DVC knows to be up to date.

    Uses the server that PREFECT_API_URL names, else a temporary one.

    Example: `PBKD_WORKERS=2 pbkd run`
    """
    use_prefect()
    from flows.server import temporary_server

    server = temporary_server()
    with live_display("pbkd run"), open_pools() as opened:
        opened.whole.preload()
        from flows.compress import compress

        server.wait()
        workspace = this_workspace()
        compress(str(workspace.root), str(workspace.state))
    _print_report(workspace)


@app.command()
def inspect() -> None:
    """Show the teacher's blocks: shapes, parameters, MACs, share, candidates or why not.

    Looks at the network of params.yaml; it need not be trained yet.
    """
    from pbkd.report.tables import discovery_tables
    from pbkd.stages import StageContext
    from pbkd.stages.preview import preview

    for table in discovery_tables(preview(StageContext.load(this_workspace()))):
        print_table(table)


@app.command()
def plan(
    workers: Annotated[
        str, typer.Option(help="Numbers of workers to compare, separated by commas.")
    ] = "1,2,4,8",
    remeasure: Annotated[bool, typer.Option(help="Measure the costs anew.")] = False,
) -> None:
    """Predict what the block phase takes, and what more workers gain; needs `blocks`.

    Costs are measured once per machine, by as many workers as a run has. One worker and as many as
    this machine has are always shown. Example: `pbkd plan --workers 1,2,4,8,64`
    """
    from flows.profile import profile_workers
    from pbkd.artifacts import atomic_path
    from pbkd.report import plan as report_plan
    from pbkd.stages import StageContext
    from pbkd.stages.activations import allowed_bytes
    from pbkd.stages.planning import Subject, forget_profiles, plans_of

    numbers = _numbers_of_workers(workers)
    workspace = this_workspace()
    context = StageContext.load(workspace)
    params, config = context.params, context.params.activations
    subject = Subject.of(workspace, config, params.distill, params.seed)
    if remeasure:
        forget_profiles(workspace)
    with open_pools() as opened:
        here = len(opened.workers.slots)
        profile = profile_workers(context, subject, opened.workers)
    limit = allowed_bytes(workspace, config) if config.source == "auto" else float("inf")
    plans = report_plan.Plans(
        network=subject.card.network.name,
        by_workers=plans_of(subject, profile, {*numbers, 1, here}, config.source, limit),
        here=here,
        profile=profile,
    )
    print_table(report_plan.workers_table(plans))
    for sentence in report_plan.bottleneck_sentences(plans):
        print(sentence)
    print()
    print_table(report_plan.planned_jobs_table(plans, max_rows=_MAX_JOBS))
    print(report_plan.plan_sentence(plans))
    print(report_plan.basis_sentences(plans))
    path = workspace.state / report_plan.PLAN
    with atomic_path(path) as temporary:
        temporary.write_text(report_plan.render_plan(plans))
    print(f"\nPicture:   {shown(path)} (open it in a browser)")


def _numbers_of_workers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--workers: got `{text}`, expected numbers from 1 on, like 1,2,4")
    return numbers


@app.command()
def report(
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="RUN_A RUN_B", help="Two runs side by side instead."),
    ] = None,
) -> None:
    """Print the final table, and where the report and the registry are.

    A run is a workspace's folder, a commit, branch or tag, or an experiment of DVC. Example:
    `pbkd report --compare HEAD~1 .`
    """
    workspace = this_workspace()
    if compare is None:
        _print_report(workspace)
    else:
        _print_comparison(workspace, compare)


def _print_comparison(workspace: Workspace, names: tuple[str, str]) -> None:
    from pbkd.artifacts import atomic_path
    from pbkd.report import comparison
    from pbkd.report.runs import read_run

    before, after = (read_run(name, workspace.root) for name in names)
    print_table(comparison.comparison_table(before, after))
    settings = comparison.settings_table(before, after)
    if settings is not None and settings.rows:
        print_table(settings)
    for note in comparison.notes(before, after):
        print(note)
    path = workspace.state / comparison.COMPARISON
    with atomic_path(path) as temporary:
        temporary.write_text(comparison.render_comparison(before, after))
    print(f"\nPage:      {shown(path)} (open it in a browser)")


@app.command()
def teachers(
    *, watch: Annotated[bool, typer.Option(help="Again every second, until Ctrl-C.")] = False
) -> None:
    """Show the elastic teachers of a run: rates, queue, and who waits for whom."""
    from pbkd.elastic.status import FILE, read_status
    from pbkd.report.teachers import teacher_lines, teacher_table

    path = this_workspace().state / FILE
    while True:
        status = read_status(path)
        if status is None:
            print("No elastic teachers are at work here.")
        else:
            print_table(teacher_table(status))
            print("\n".join(teacher_lines(status)))
        if not watch:
            return
        time.sleep(1)


@app.command()
def gc(
    versions: Annotated[
        bool, typer.Option("--versions", help="Old versions in the registry instead.")
    ] = False,
    keep: Annotated[int, typer.Option(min=1, help="Newest versions of each student to keep.")] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --versions: only say which would go.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Model in the registry. [default: register.name]")
    ] = None,
) -> None:
    """Empty the store of finished items, checkpoints, and labels of views; outputs stay.

    With --versions the store stays, and the registry loses versions that no alias names, that are
    not among the newest of their student, and that no student which stays has for its teacher.

    Example: `pbkd gc --versions --keep 2 --dry-run`
    """
    workspace = this_workspace()
    left: list[str] = []
    with workspace_lock(workspace.root, workspace.state):
        if versions:
            _delete_old_versions(workspace, keep, name, dry_run=dry_run)
            return
        for folder in (workspace.store.root, *map(workspace.state.joinpath, _LEFT_OVERS)):
            left += _empty(folder)
    if left:
        raise ArtifactError(
            f"{len(left)} files and folders could not be removed, the first is {left[0]}; change "
            "their owner or mode, then: pbkd gc"
        )
    print(f"emptied {workspace.store.root}")


def _empty(folder: Path) -> list[str]:
    """Remove a folder, or what the target of a link holds; returns what stays."""
    left: list[str] = []
    for path in list(folder.glob("*")) if folder.is_symlink() else [folder]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=lambda _, name, __: left.append(name))
        else:
            path.unlink(missing_ok=True)
    return left


def _delete_old_versions(
    workspace: Workspace, keep: int, name: str | None, *, dry_run: bool
) -> None:
    from pbkd.picking import model_name
    from pbkd.stages.register import registered_numbers
    from pbkd.tracking.fetch import open_registry
    from pbkd.tracking.old_versions import delete_versions, old_versions

    client = open_registry(workspace)
    model = model_name(workspace, name)
    old = old_versions(client, model, keep, registered_numbers(workspace, model))
    for version in old:
        print(f"{'would delete' if dry_run else 'deleting'} {version.uri} ({version.student})")
    if not old:
        print(f"{model} has no version that may go")
    elif not dry_run:
        delete_versions(client, old)
        print(f"deleted {len(old)}; their files go with: mlflow gc")


def _print_report(workspace: Workspace) -> None:
    from pbkd.artifacts import read_json
    from pbkd.report import (
        REGISTERED,
        REPORT,
        block_phase_sentence,
        export_table,
        final_table,
        read_measured,
        read_metrics,
        runtime_table,
        shrink_table,
        stage_table,
        summary_sentence,
    )
    from pbkd.stages.evaluate import stage_figures
    from pbkd.tracking.registry import reachable_uri

    metrics, measured = read_metrics(workspace.results), read_measured(workspace.results)
    # evaluate wrote its own record, and register's came, after measured.json was closed
    measured = measured.model_copy(update={"stages": stage_figures(workspace) or measured.stages})
    print_table(final_table(metrics, measured))
    if shrinking := shrink_table(metrics, measured):
        print_table(shrinking)
    if runtimes := runtime_table(metrics, measured):
        print_table(runtimes)
    if exports := export_table(metrics, measured):
        print_table(exports)
    print_table(stage_table(measured))
    print(block_phase_sentence(measured))
    print(summary_sentence(metrics, measured))
    print(f"\nReport:    {shown(workspace.results / REPORT)} (open it in a browser)")
    if not (workspace.results / REGISTERED).is_file():
        print("Registry:  nothing is registered yet; run: pbkd register")
        return
    receipt = read_json(workspace.results / REGISTERED)
    print(f"Registry:  {receipt['name']}, champion: version {receipt['champion'] or 'none'}")
    uri = reachable_uri(receipt["tracking_uri"], workspace)
    if uri is None:
        print(f"           in {receipt['tracking_uri']}; set MLFLOW_TRACKING_URI to where that is")
        return
    store = shlex.quote(uri)
    command = f"mlflow server --backend-store-uri {store}"
    print(f"           open it: {uri if uri.startswith('http') else command}")
    if receipt["champion"] is not None:
        model = f"models:/{receipt['name']}@champion"
        print(f"           load it: MLFLOW_TRACKING_URI={store} python -c \\")
        print(f"             \"import mlflow; print(mlflow.pytorch.load_model('{model}'))\"")
