"""Stage `register`: teacher and students into the MLflow registry; the receipt into results/."""

from __future__ import annotations

import json
from pathlib import Path

from pbkd.artifacts import Workspace, digest_of, read_json, write_json
from pbkd.models import read_card
from pbkd.report import (
    MEASURED,
    METRICS,
    REGISTERED,
    REPORT,
    Measured,
    Metrics,
    StudentFigures,
    read_measured,
    read_metrics,
)
from pbkd.stages.context import StageContext
from pbkd.stages.evaluate import model_folders
from pbkd.stages.run_page import picture_files, summary
from pbkd.students import load_model
from pbkd.students.finetune import Finetuned
from pbkd.tracking import PipelineRun, Registered, register_models, still_registered
from pbkd.tracking.lineage import lock_file
from pbkd.tracking.registry import Candidate
from pbkd.tracking.versions import MachineLatency, MeasuredLatency


def run(context: StageContext) -> None:
    """Log what the run produced, register its models, write ``results/registered.json``."""
    workspace, config = context.workspace, context.params.register_
    metrics, measured = read_metrics(workspace.results), read_measured(workspace.results)
    pipeline_run = PipelineRun.current(workspace, context.params)
    log_histories(pipeline_run, workspace)
    pipeline_run.log_metrics(_figures(metrics, measured) | _lacking(workspace))
    for name in (METRICS, MEASURED, REPORT):
        pipeline_run.log_file(workspace.results / name)
    if (lock := lock_file(workspace)) is not None:
        pipeline_run.log_file(lock)
    teacher = read_card(workspace.artifacts("teacher"))
    pipeline_run.log_data(teacher.data_digest)
    network = teacher.network.name
    for name, svg in picture_files(metrics, measured, network):
        pipeline_run.log_text(svg, f"pictures/{name}")
    receipt = register_models(
        workspace,
        pipeline_run,
        config.name,
        _candidates(workspace, metrics, measured),
        config.max_accuracy_drop,
        digest_of({"params": context.params}),
    )
    pipeline_run.describe(summary(metrics, measured, network, receipt))
    write_json(workspace.results / REGISTERED, receipt)
    pipeline_run.end()


def is_registered(workspace: Workspace) -> bool:
    """Whether the receipt is there and the registry agrees with it."""
    path = workspace.results / REGISTERED
    return path.is_file() and still_registered(
        workspace, Registered.model_validate(read_json(path))
    )


def registered_numbers(workspace: Workspace, name: str) -> list[str]:
    """Versions of a model that the receipt names; none without one."""
    path = workspace.results / REGISTERED
    if not path.is_file():
        return []
    receipt = Registered.model_validate(read_json(path))
    return [v.version for v in receipt.versions.values()] if receipt.name == name else []


def log_histories(pipeline_run: PipelineRun, workspace: Workspace) -> None:
    """The series that are on disk: teacher, repairs, fine-tunings, steps of recipes, baselines."""
    series = {"teacher/training": workspace.artifacts("teacher") / "history.jsonl"}
    for path in sorted(workspace.artifacts("stitch").glob("*/repair.jsonl")):
        series[f"repair/{path.parent.name}"] = path
    for path in sorted(workspace.artifacts("finetune").glob("*/history.jsonl")):
        series[f"finetune/{path.parent.name}"] = path
    for path in sorted(workspace.artifacts("shrink").glob("*/*.jsonl")):
        series[f"shrink/{path.parent.name}/{path.stem}"] = path
    for path in sorted(workspace.artifacts("finetune").glob("*/baseline-*/history.jsonl")):
        student, kind = path.parent.parent.name, path.parent.name
        series[f"{kind}/{student}"] = path
    for name, path in series.items():
        pipeline_run.log_history(name, _lines(path))


def _lacking(workspace: Workspace) -> dict[str, float | None]:
    """Per student that was without its teachers for a time: the images it saw without a label."""
    figures: dict[str, float | None] = {}
    for path in sorted(workspace.artifacts("finetune").glob("*/finetune.json")):
        num_lacking = Finetuned.model_validate(read_json(path)).num_lacking
        if num_lacking:
            figures[f"finetune/{path.parent.name}/images_without_soft_label"] = num_lacking
    return figures


def _lines(path: Path) -> list[dict[str, float]]:
    """The numbers of each line, as steps from 0 on: restarted epochs count on."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [
        {key: value for key, value in line.items() if isinstance(value, int | float)}
        | {"epoch": step}
        for step, line in enumerate(lines)
    ]


def _candidates(workspace: Workspace, metrics: Metrics, measured: Measured) -> list[Candidate]:
    entries = {"teacher": metrics.teacher, **metrics.students}
    candidates = []
    for name, folder in model_folders(workspace).items():
        model, card = load_model(folder, allow_code=True)
        entry = entries[name]
        candidates.append(
            Candidate(
                budget=name,
                folder=folder,
                model=model,
                card=card,
                figures=entry.numbers | {"teacher_val_accuracy": metrics.teacher.val_accuracy},
                limits=entry.limits if isinstance(entry, StudentFigures) else {},
                latency=_latency(measured, name),
            )
        )
    return candidates


def _latency(measured: Measured, name: str) -> MachineLatency:
    machine = measured.machine
    where = [f"{machine.processor}, {machine.cores} cores", *machine.gpus]
    return MachineLatency(
        machine_id=machine.machine_id,
        machine=", ".join([*where, f"torch {machine.torch}"]),
        entries=tuple(
            MeasuredLatency.model_validate(entry.model_dump())
            for entry in measured.latency.get(name, ())
        ),
    )


def _figures(metrics: Metrics, measured: Measured) -> dict[str, float | None]:
    """The run's figures under MLflow's names, ``model/figure`` and ``phase/figure``."""
    figures: dict[str, float | None] = {}
    for name, entries in measured.headline.items():
        for entry in entries:
            figures[f"{name}/latency_batch_{entry.batch_size}_ms"] = entry.median_ms
    for stage, record in measured.stages.items():
        figures[f"stage/{stage}_s"] = record.duration_s
        joules = [value for value in record.energy_j.values() if value is not None]
        figures[f"stage/{stage}_energy_j"] = sum(joules) if joules else None
    if measured.block_phase is not None:
        figures["block_phase/speedup"] = measured.block_phase.speedup
        figures["block_phase/wall_s"] = measured.block_phase.wall_s
        figures["block_phase/energy_j"] = measured.block_phase.energy_j
    for name, model in {"teacher": metrics.teacher, **metrics.students}.items():
        figures |= {f"{name}/{key}": value for key, value in model.numbers.items()}
    for name, kinds in metrics.baselines.items():
        for kind, baseline in kinds.items():
            numbers = baseline.numbers
            figures |= {f"baseline-{kind}/{name}/{key}": v for key, v in numbers.items()}
    return figures
