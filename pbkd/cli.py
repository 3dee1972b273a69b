"""The command line: a verb per stage, and what drives or shows the whole.

Heavy libraries are imported by the verb that needs them, so that ``--help`` is quick.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table as RichTable

from pbkd._version import __version__
from pbkd.allocator import keep_freed_memory
from pbkd.errors import BudgetError, ConfigError, PbkdError, disk_errors_explained
from pbkd.locks import workspace_lock

if TYPE_CHECKING:
    from flows.pools import Pools
    from pbkd.artifacts import Workspace
    from pbkd.report import Table

_EXIT_ERROR = 1
_EXIT_USAGE = 2
_EXIT_BUG = 70
_EXIT_INTERRUPTED = 130
_INTERRUPT_GRACE_S = 6.0
_LEFT_OVERS = ("checkpoints", "labels")  # of the state folder, beside the store
_MAX_JOBS = 20  # that `plan` lists; its page has them all

# Prefect without a server starts a temporary one; it should be quiet, local, and in no hurry.
_PREFECT_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pbkd,flows",
}

app = typer.Typer(
    name="pbkd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress a trained CNN by parallel blockwise knowledge distillation.\n\n"
    "`dvc repro` or `pbkd run` goes through all stages; each stage is a verb, too. "
    "Parameters come from params.yaml, settings of this machine from PBKD_ variables.\n\n"
    "Examples: `pbkd inspect` · `pbkd run` · `PBKD_WORKERS=4 pbkd distill` · `pbkd report`",
)
_debug = False


def main() -> None:
    """Entry point: errors of ours become one line and an exit code."""
    keep_freed_memory()
    try:
        with disk_errors_explained():
            app()
    except PbkdError as error:
        if _debug:
            traceback.print_exc()
        else:
            Console(stderr=True).print(f"[bold red]error:[/] {_plain(error)}", soft_wrap=True)
        sys.exit(_EXIT_USAGE if isinstance(error, ConfigError) else _EXIT_ERROR)
    except Exception as error:
        if _debug:
            raise
        name = type(error).__name__
        print(
            f"unexpected {name}: {error}\nrun it again with --debug to see where", file=sys.stderr
        )
        sys.exit(_EXIT_BUG)


def _plain(error: PbkdError) -> str:
    return str(error).replace("[", r"\[")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pbkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Stack traces and detailed logs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings only.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    global _debug
    _debug = debug
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    handler = RichHandler(
        console=Console(stderr=True), show_path=debug, show_level=debug, log_time_format="%H:%M:%S"
    )
    for name in ("pbkd", "flows"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False


# ---------------------------------------------------------------- stages


def _stage(name: str) -> None:
    _use_device()
    from pbkd.stages import StageContext, run_stage
    from pbkd.stages.preflight import preflight

    workspace = _workspace()
    with workspace_lock(workspace.root, workspace.state):
        context = StageContext.load(workspace)
        if name == "prepare":  # the first of `dvc repro`: what a later stage lacks is known now
            preflight(context)
        run_stage(name, context)


def _students(name: str, *, remeasure: bool = False) -> None:
    """A stage whose students are jobs; a single one runs in this process."""
    _use_device()
    from flows.students import ThisProcess, finetune_students, shrink_students, stitch_students
    from pbkd.stages import StageContext
    from pbkd.students.latency_table import forget_latencies

    workspace = _workspace()
    with workspace_lock(workspace.root, workspace.state), _pools() as opened:
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
    with _pools() as opened:
        opened.workers.preload()
        from flows.activations import activations as fill
        from pbkd.stages import StageContext

        workspace = _workspace()
        with workspace_lock(workspace.root, workspace.state):
            fill(StageContext.load(workspace), opened.workers)


@app.command(rich_help_panel="Stages")
def distill() -> None:
    """Train every candidate of every block in parallel (a Prefect flow), and score its damage."""
    _use_prefect()
    from flows.server import temporary_server

    server = temporary_server()
    with _pools() as opened:
        opened.workers.preload()
        from flows.distill import distill as flow

        server.wait()
        workspace = _workspace()
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
    _use_device()
    from pbkd.stages import StageContext, run_stage
    from pbkd.stages.evaluate import forget_measurements

    workspace = _workspace()
    with workspace_lock(workspace.root, workspace.state):
        if remeasure:
            forget_measurements(workspace)
        run_stage("evaluate", StageContext.load(workspace))


@app.command(rich_help_panel="Stages")
def register() -> None:
    """Put teacher and students into the MLflow registry."""
    _stage("register")


# ---------------------------------------------------------------- drivers and views


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
    print(f"workspace {_shown(params.parent)}: preset {preset}, images in {path}")
    if data is None and preset != "digits":
        print(f"put your images into {_shown(params.parent / path)}, then: dvc add")
    print(f"next: cd {_shown(params.parent)}; look at params.yaml; pbkd run")


@app.command()
def run() -> None:
    """Run the whole pipeline as one Prefect flow, skipping what DVC knows to be up to date.

    Uses the server that PREFECT_API_URL names, else a temporary one.

    Example: `PBKD_WORKERS=2 pbkd run`
    """
    _use_prefect()
    from flows.server import temporary_server

    server = temporary_server()
    with _pools() as opened:
        opened.whole.preload()
        from flows.compress import compress

        server.wait()
        workspace = _workspace()
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

    for table in discovery_tables(preview(StageContext.load(_workspace()))):
        _print_table(table)


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
    workspace = _workspace()
    context = StageContext.load(workspace)
    params, config = context.params, context.params.activations
    subject = Subject.of(workspace, config, params.distill, params.seed)
    if remeasure:
        forget_profiles(workspace)
    with _pools() as opened:
        here = len(opened.workers.slots)
        profile = profile_workers(context, subject, opened.workers)
    limit = allowed_bytes(workspace, config) if config.source == "auto" else float("inf")
    plans = report_plan.Plans(
        network=subject.card.network.name,
        by_workers=plans_of(subject, profile, {*numbers, 1, here}, config.source, limit),
        here=here,
        profile=profile,
    )
    _print_table(report_plan.workers_table(plans))
    for sentence in report_plan.bottleneck_sentences(plans):
        print(sentence)
    print()
    _print_table(report_plan.planned_jobs_table(plans, max_rows=_MAX_JOBS))
    print(report_plan.plan_sentence(plans))
    print(report_plan.basis_sentences(plans))
    path = workspace.state / report_plan.PLAN
    with atomic_path(path) as temporary:
        temporary.write_text(report_plan.render_plan(plans))
    print(f"\nPicture:   {_shown(path)} (open it in a browser)")


def _numbers_of_workers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--workers: got `{text}`, expected numbers from 1 on, like 1,2,4")
    return numbers


@app.command()
def report() -> None:
    """Print the final table, and where the report and the registry are."""
    _print_report(_workspace())


@app.command()
def pick(
    max_bytes: Annotated[str | None, typer.Option(help="Of the file: 1MB, or 25%.")] = None,
    min_accuracy: Annotated[
        str | None, typer.Option(help="On the validation split: 0.9, or 90%.")
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="Per batch, measured on this machine: 5ms, or 50%.")
    ] = None,
    max_parameters: Annotated[str | None, typer.Option(help="500k, or 25%.")] = None,
    max_macs: Annotated[str | None, typer.Option(help="Of one image: 40M, or 25%.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Of the latency. [default: the smallest measured]")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of the latency. [default: on a GPU, else the fewest measured]"
        ),
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="Of the latency: pytorch, onnxruntime or onnxruntime-int8.")
    ] = "pytorch",
    alias: Annotated[str | None, typer.Option(help="Alias to move to the choice.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="New folder for the choice's files, for `pbkd.load`.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Model in the registry. [default: register.name]")
    ] = None,
    uri: Annotated[
        str | None, typer.Option(help="Of the registry. [default: MLFLOW_TRACKING_URI, or here]")
    ] = None,
) -> None:
    """Choose among the registered students, and say why it is this one.

    The most accurate on the validation split within all limits; with --min-accuracy alone, the
    smallest file. Shares (25%) are of the teacher's figures. The test accuracy is shown beside.

    Example: `pbkd pick --max-bytes 1MB --min-accuracy 0.9 --max-latency 5ms --export exported`
    """
    from pbkd import exporting, picking

    if uri is not None:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    wanted = picking.wanted_from(
        {
            "parameters": max_parameters,
            "macs": max_macs,
            "bytes": max_bytes,
            "latency": max_latency,
        },
        min_accuracy,
        batch_size,
        threads,
        runtime,
    )
    picking.check_alias(alias)
    if export is not None:
        exporting.check_free(export)
    workspace = _workspace()
    answer = picking.pick(workspace, picking.model_name(workspace, name), wanted)
    _print_table(answer.table)
    if answer.version is None:
        for note in answer.sentences[1:]:
            print(note)
        raise BudgetError(answer.sentences[0])
    for sentence in answer.sentences:
        print(sentence)
    if alias is not None:
        picking.move_alias(workspace, answer.version, alias)
        print(f"Alias {alias} is now version {answer.version.number}.")
    if export is not None:
        exporting.export(workspace, answer.version, export)
        print(f'Exported to {_shown(export)}; load it: pbkd.load("{_shown(export)}")')
    else:
        print(f'Load it: pbkd.load("{answer.version.uri}")')


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A student's name, a folder, or models:/NAME/VERSION.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder. [default: exported/MODEL]")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="onnx, or pt2 (torch.export).")] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Write an int8 ONNX file, too; needs the prepared data.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option(help="Import the function that builds a network of your own.")
    ] = False,
) -> None:
    """Write a model as ONNX or torch.export, and compare it with the model itself.

    Example: `pbkd export half --int8 -o half-onnx`
    """
    from pbkd.export_model import default_folder, export_model, format_of
    from pbkd.loading import load

    written_as = format_of(format_, int8=int8)
    folder = output if output is not None else default_folder(model)
    loaded = load(model, allow_code=allow_code)
    exported = export_model(_workspace(), loaded, folder, written_as, int8=int8)
    for sentence in exported.sentences:
        print(sentence)
    print(f"Exported to {_shown(folder)}")


@app.command()
def pack(
    model: Annotated[str, typer.Argument(help="A folder with model.json, or a student's name.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write, or to replace.")
    ] = Path("model.pbkd"),
) -> None:
    """Write a model as one small file, entropy-coded and exact; docs/format.md.

    Example: `pbkd pack half -o half.pbkd`
    """
    from pbkd.packing import pack_folder
    from pbkd.report.numbers import size_text

    packed = pack_folder(model, output)
    bits = 8 * packed.size_bytes / packed.num_numbers
    print(
        f"{_shown(packed.path)}: {size_text(packed.size_bytes)}, {bits:.2f} bits per number; "
        f"model.safetensors has {size_text(packed.weights_bytes)}"
    )
    print(f'Load it: pbkd.load("{_shown(packed.path)}")')


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="Of `pbkd pack`.")],
    folder: Annotated[Path, typer.Argument(help="New folder for model.json and its weights.")],
) -> None:
    """Write a .pbkd file as a folder again, bit for bit.

    Example: `pbkd unpack half.pbkd half`
    """
    from pbkd.packing import unpack_file

    unpack_file(file, folder)
    print(f'Unpacked to {_shown(folder)}; load it: pbkd.load("{_shown(folder)}")')


@app.command()
def teachers(
    *, watch: Annotated[bool, typer.Option(help="Again every second, until Ctrl-C.")] = False
) -> None:
    """Show the elastic teachers of a run: rates, queue, and who waits for whom."""
    from pbkd.elastic.status import FILE, read_status
    from pbkd.report.teachers import teacher_lines, teacher_table

    path = _workspace().state / FILE
    while True:
        status = read_status(path)
        if status is None:
            print("No elastic teachers are at work here.")
        else:
            _print_table(teacher_table(status))
            print("\n".join(teacher_lines(status)))
        if not watch:
            return
        time.sleep(1)


@app.command()
def gc() -> None:
    """Empty the store of finished items, checkpoints, and labels of views; outputs stay."""
    workspace = _workspace()
    with workspace_lock(workspace.root, workspace.state):
        for folder in (workspace.store.root, *map(workspace.state.joinpath, _LEFT_OVERS)):
            shutil.rmtree(folder, ignore_errors=True)
    print(f"emptied {workspace.store.root}")


# ---------------------------------------------------------------- what verbs share


def _use_device() -> None:
    """Obey PBKD_DEVICE in this process; before torch is imported."""
    from pbkd.settings import Settings

    settings = Settings.from_env()
    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif settings.device == "cuda":
        from flows.slots import whole_machine_slot

        whole_machine_slot(settings)


def _pools() -> AbstractContextManager[Pools]:
    """The pools; a verb lets their processes load while it imports what it needs itself."""
    from flows.pools import pools
    from pbkd.settings import Settings

    return pools(Settings.from_env())


def _workspace() -> Workspace:
    from pbkd.artifacts import Workspace
    from pbkd.settings import Settings

    return Workspace.find(state=Settings.from_env().state_dir)


def _use_prefect() -> None:
    for name, value in _PREFECT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # what went wrong is said once, by main(); Prefect would print a stack trace for it
    level = "ERROR" if _debug else "CRITICAL"
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", level)
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: object) -> None:
    """Ctrl-C ends Prefect's temporary server, too; Prefect would wait long for its answers.

    Whatever is cut off here is safe: workers end with their parent, locks with their holder.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("interrupted; what is finished is kept", file=sys.stderr)
    timer = threading.Timer(_INTERRUPT_GRACE_S, os._exit, (_EXIT_INTERRUPTED,))
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _print_table(table: Table) -> None:
    shown = RichTable(title=table.title, title_justify="left", title_style="bold")
    for index, head in enumerate(table.heads):
        shown.add_column(head, justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(shown)


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

    metrics, measured = read_metrics(workspace.results), read_measured(workspace.results)
    # evaluate wrote its own record, and register's came, after measured.json was closed
    measured = measured.model_copy(update={"stages": stage_figures(workspace) or measured.stages})
    _print_table(final_table(metrics, measured))
    if shrinking := shrink_table(metrics, measured):
        _print_table(shrinking)
    if runtimes := runtime_table(metrics, measured):
        _print_table(runtimes)
    if exports := export_table(metrics, measured):
        _print_table(exports)
    _print_table(stage_table(measured))
    print(block_phase_sentence(measured))
    print(summary_sentence(metrics, measured))
    print(f"\nReport:    {_shown(workspace.results / REPORT)} (open it in a browser)")
    if not (workspace.results / REGISTERED).is_file():
        print("Registry:  nothing is registered yet; run: pbkd register")
        return
    receipt = read_json(workspace.results / REGISTERED)
    print(f"Registry:  {receipt['name']}, champion: version {receipt['champion'] or 'none'}")
    store = receipt["tracking_uri"]
    is_server = store.startswith("http")
    print(f"           open it: {'' if is_server else 'mlflow server --backend-store-uri '}{store}")
    if receipt["champion"] is not None:
        uri = f"models:/{receipt['name']}@champion"
        print(f"           load it: MLFLOW_TRACKING_URI={store} python -c \\")
        print(f"             \"import mlflow; print(mlflow.pytorch.load_model('{uri}'))\"")


def _shown(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


if __name__ == "__main__":
    main()
