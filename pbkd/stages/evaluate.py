"""Stage `evaluate`: measure teacher, students and baselines; the only reader of the test split."""

from __future__ import annotations

import datetime
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pbkd.artifacts import Workspace, atomic_path, digest_of, read_json, write_json
from pbkd.config import AugmentConfig
from pbkd.data import Stream, load_prepared
from pbkd.devices import best_device
from pbkd.distill import TRAINEES
from pbkd.distill.trainee import HISTORY, read_history
from pbkd.export import runtime_version
from pbkd.measure import count_macs, num_parameters, this_machine
from pbkd.models import Classifier, ModelCard, predict, read_card
from pbkd.models.checkpoint import WEIGHTS
from pbkd.report import (
    MEASURED,
    METRICS,
    REPORT,
    BaselineSeconds,
    BlockPhase,
    MachineFigures,
    Measured,
    Metrics,
    ModelFigures,
    ReportInputs,
    StageFigures,
    StudentFigures,
    TraineeFigures,
    render,
)
from pbkd.report.results import BASELINES, MODELS, model_rows
from pbkd.shrink import FILE, ShrinkRecord, read_record, structures
from pbkd.shrink.figures import num_nonzero
from pbkd.stages.context import StageContext, stage_records, student_folders
from pbkd.stages.device_time import student_device_s
from pbkd.stages.distill import Distilled, read_distilled
from pbkd.stages.runtimes import measure_runtimes
from pbkd.stages.stitch import Stitched, read_stitched
from pbkd.students import load_model
from pbkd.students.baseline import Baseline
from pbkd.students.finetune import Finetuned


def run(context: StageContext) -> None:
    """Write ``results/``: ``metrics.json``, ``measured.json``, ``models.json``, ``report.html``."""
    workspace = context.workspace
    folders = model_folders(workspace)
    models = {name: load_model(folder, allow_code=True) for name, folder in folders.items()}
    finished = {
        name: FinishedStudent.read(workspace, name) for name in folders if name != "teacher"
    }
    metrics = _metrics(context, folders, models, finished)
    measured = _measured(context, models, finished)
    results = workspace.results
    write_json(results / METRICS, metrics)
    write_json(results / MEASURED, measured)
    write_json(results / MODELS, model_rows(metrics))
    with atomic_path(results / REPORT) as temporary:
        temporary.write_text(_report(context, metrics, measured, finished))


@dataclass(frozen=True)
class FinishedStudent:
    """What the earlier stages say of a student.

    Attributes:
        shrunk: the steps of its recipe.
        is_coded: whether it ended as a `.pbkd` file.
        structures: number of a step to the model after it, where a later one changed its structure.
        baselines: kind to record.
        folder: of the fine-tuned student; baselines are below it.
    """

    stitched: Stitched
    finetuned: Finetuned
    shrunk: ShrinkRecord
    is_coded: bool
    structures: dict[int, Path]
    baselines: dict[str, Baseline]
    folder: Path

    @classmethod
    def read(cls, workspace: Workspace, name: str) -> FinishedStudent:
        """ArtifactError where a record is missing."""
        folder = workspace.artifacts("finetune") / name
        shrunk = workspace.artifacts("shrink") / name
        paths = {kind: folder / f"baseline-{kind}" / "baseline.json" for kind in BASELINES}
        return cls(
            stitched=read_stitched(workspace, name),
            finetuned=Finetuned.model_validate(read_json(folder / "finetune.json")),
            shrunk=read_record(shrunk),
            is_coded=(shrunk / FILE).is_file(),
            structures=structures(shrunk),
            baselines={
                kind: Baseline.model_validate(read_json(path))
                for kind, path in paths.items()
                if path.is_file()
            },
            folder=folder,
        )


def model_folders(workspace: Workspace) -> dict[str, Path]:
    """The final models: ``teacher``, then the students by name."""
    shrunk = {path.name: path for path in student_folders(workspace, "shrink")}
    return {"teacher": workspace.artifacts("teacher")} | shrunk


def forget_measurements(workspace: Workspace) -> None:
    """Let the next evaluation measure anew."""
    shutil.rmtree(_kept(workspace), ignore_errors=True)


def _kept(workspace: Workspace) -> Path:
    return workspace.state / "measured"


# ---------------------------------------------------------------- metrics


def _metrics(
    context: StageContext,
    folders: dict[str, Path],
    models: dict[str, tuple[Classifier, ModelCard]],
    finished: dict[str, FinishedStudent],
) -> Metrics:
    figures = {name: _figures(context, model, folders[name]) for name, (model, _) in models.items()}
    teacher = figures.pop("teacher")
    return Metrics(
        teacher=teacher,
        students={
            name: _student_figures(finished[name], own, teacher) for name, own in figures.items()
        },
        baselines={
            name: _baselines(context, student)
            for name, student in finished.items()
            if student.baselines
        },
    )


def _figures(context: StageContext, model: Classifier, folder: Path) -> ModelFigures:
    prepared = load_prepared(context.workspace.prepared)
    device = best_device()
    model.to(device)
    accuracy = {}
    for name in ("val", "test"):
        stream = Stream(prepared.split(name), seed=0, augment=AugmentConfig(), device=device)
        batch_size = context.params.evaluate.batch_size
        accuracy[name] = predict(model, stream, batch_size=batch_size).accuracy
    model.cpu()
    return ModelFigures(
        val_accuracy=accuracy["val"],
        test_accuracy=accuracy["test"],
        num_parameters=num_parameters(model),
        macs=count_macs(model, torch.zeros(1, *prepared.image_shape)),
        file_bytes=_file(folder).stat().st_size,
        num_nonzero=num_nonzero(model),
    )


def _file(folder: Path) -> Path:
    """What a user of the model copies: its `.pbkd` file if it was coded, else its weights."""
    coded = folder / FILE
    return coded if coded.is_file() else folder / WEIGHTS


def _baselines(context: StageContext, student: FinishedStudent) -> dict[str, ModelFigures]:
    figures = {}
    for kind in student.baselines:
        folder = student.folder / f"baseline-{kind}"
        model, _ = load_model(folder, allow_code=True)
        figures[kind] = _figures(context, model, folder)
    return figures


def _student_figures(
    finished: FinishedStudent, own: ModelFigures, teacher: ModelFigures
) -> StudentFigures:
    stitched = finished.stitched
    return StudentFigures(
        **own.model_dump(),
        stitched_val_accuracy=stitched.stitched_val_accuracy,
        recalibrated_val_accuracy=stitched.recalibrated_val_accuracy,
        repaired_val_accuracy=stitched.repaired_val_accuracy,
        finetuned_val_accuracy=finished.finetuned.val_accuracy,
        limits=stitched.limits,
        predicted=stitched.predicted.model_dump(),
        # without the latency: what a clock says is no part of these figures
        stitched=stitched.measured.model_dump(exclude={"latency_ms"}),
        predicted_damage=stitched.predicted_damage,
        stitched_damage=stitched.damage,
        bytes_ratio=teacher.file_bytes / own.file_bytes,
        blocks_replaced=sum(choice.candidate is not None for choice in stitched.choices),
        blocks_total=len(stitched.choices),
        steps=finished.shrunk.steps,
        is_coded=finished.is_coded,
    )


# ---------------------------------------------------------------- measurements


def _measured(
    context: StageContext,
    models: dict[str, tuple[Classifier, ModelCard]],
    finished: dict[str, FinishedStudent],
) -> Measured:
    """Latency is kept by machine and models; the rest comes from this machine's records."""
    config, workspace = context.params.evaluate, context.workspace
    machine = this_machine()
    timed = models | _step_models(finished)
    digests = {name: card.digest for name, (_, card) in timed.items()}
    key = digest_of({"models": digests, "config": config, "onnxruntime": runtime_version()})
    kept = _kept(workspace) / machine.machine_id / f"{key}.json"
    if not kept.is_file():
        found = measure_runtimes(config, timed, load_prepared(workspace.prepared))
        write_json(kept, {"date": _today(), **found._asdict()})
    entry = read_json(kept)
    phase = workspace.state / "block_phase.json"
    return Measured(
        machine=MachineFigures(
            machine_id=machine.machine_id,
            **asdict(machine),
            onnxruntime=runtime_version() if entry["exports"] else None,
        ),
        date=entry["date"],
        latency={name: entry["latency"][name] for name in models},
        step_latency={
            name: {
                number: entry["latency"][_step_name(name, number)] for number in student.structures
            }
            for name, student in finished.items()
            if student.structures
        },
        exports={name: own for name, own in entry["exports"].items() if name in models},
        stages=stage_figures(workspace),
        block_phase=BlockPhase.model_validate(read_json(phase)) if phase.is_file() else None,
        device_s=_device_s(workspace, finished),
        baselines={
            name: {
                kind: BaselineSeconds(given_s=record.device_s, used_s=record.duration_s)
                for kind, record in student.baselines.items()
            }
            for name, student in finished.items()
            if student.baselines
        },
        stitched_latency_ms={
            name: latency_ms
            for name, student in finished.items()
            if (latency_ms := student.stitched.measured.latency_ms) is not None
        },
    )


def _step_models(
    finished: dict[str, FinishedStudent],
) -> dict[str, tuple[Classifier, ModelCard]]:
    """Students before a step changed their structure, which have a latency of their own."""
    return {
        _step_name(name, number): load_model(path, allow_code=True)
        for name, student in finished.items()
        for number, path in student.structures.items()
    }


def _step_name(student: str, number: int) -> str:
    return f"{student}/{number}"  # no student's name has a slash


def _device_s(workspace: Workspace, finished: dict[str, FinishedStudent]) -> dict[str, float]:
    """Student to its device seconds: those that its baselines were given, where it has any."""
    seconds = {}
    for name, student in finished.items():
        given = [record.device_s for record in student.baselines.values()]
        seconds[name] = (
            max(given) if given else student_device_s(workspace, name, student.finetuned.duration_s)
        )
    return seconds


def stage_figures(workspace: Workspace) -> dict[str, StageFigures]:
    """Wall time and energy of every stage that this machine has a record of, as of now."""
    return {
        name: StageFigures(duration_s=record.duration_s, energy_j=record.energy_j)
        for name, record in stage_records(workspace).items()
    }


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


# ---------------------------------------------------------------- report


def _report(
    context: StageContext,
    metrics: Metrics,
    measured: Measured,
    finished: dict[str, FinishedStudent],
) -> str:
    workspace = context.workspace
    stitched = {name: student.stitched for name, student in finished.items()}
    return render(
        ReportInputs(
            network=read_card(workspace.artifacts("teacher")).network.name,
            params=context.params,
            metrics=metrics,
            measured=measured,
            choices={name: record.choices for name, record in stitched.items()},
            trainees=[_trainee(workspace, item) for item in read_distilled(workspace)],
            max_damage=max(record.max_damage for record in stitched.values()),
        )
    )


def _trainee(workspace: Workspace, item: Distilled) -> TraineeFigures:
    history = read_history(workspace.artifacts("distill") / TRAINEES / item.key / HISTORY)
    return TraineeFigures(
        block=item.result.block,
        candidate=item.result.candidate,
        damage=item.damage,
        val_losses=tuple((h.epoch, h.val_loss) for h in history if h.val_loss is not None),
    )
