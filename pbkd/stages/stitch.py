"""Stage `stitch`: choose students under budgets, stitch each one, and mend it.

``start`` chooses all students before any is made, ``run_repair`` makes one, as a job of a worker,
and ``finish`` puts them together. Students of equal choices share one job and its item in the
store; what depends on a student's budget is written by ``finish`` alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from pbkd.artifacts import Workspace, atomic_dir, digest_of, link_tree, read_json, write_json
from pbkd.devices import best_device
from pbkd.distill import TRAINEES
from pbkd.models import ModelCard
from pbkd.stages.blocks import read_blocks
from pbkd.stages.context import StageContext, subfolders
from pbkd.stages.distill import Distilled, read_distilled
from pbkd.stages.repair_job import RECORD, REPAIRED, Candidate, Repaired, RepairJob, run_repair
from pbkd.stages.teacher import read_teacher
from pbkd.students import (
    Choice,
    ChosenStudent,
    Figures,
    LatencyMeter,
    Selection,
    Subject,
    choose_students,
    needs_latency,
)

__all__ = [
    "STITCH",
    "RepairJob",
    "Stitched",
    "finish",
    "read_stitched",
    "run",
    "run_repair",
    "start",
]

_log = logging.getLogger(__name__)

ALGORITHM = 3
"""Raised whenever the same choices and settings would give another model."""

STITCH = "stitch.json"


def _from_null(limit: Any) -> Any:
    return math.inf if limit is None else limit


def _to_null(limit: float) -> float | None:
    return limit if math.isfinite(limit) else None


class Stitched(BaseModel):
    """What ``stitch.json`` says of a student.

    Attributes:
        limits: figure (parameters, macs, bytes, latency in milliseconds) to what was allowed.
        max_damage: nats, over which a candidate was left out; null in the file: infinity.
        predicted: sums over the blocks' options and the rest.
        predicted_damage: sum of the chosen candidates' damages, nats.
        measured: of the stitched model; latency beside the teacher's, null unless it was limited.
        teacher: the same of the teacher.
        damage: KL(teacher || stitched student) before recalibration, nats; null: not finite.
        teacher_val_accuracy: on the validation split, 0 to 1; the others after each step.
        repair_s: seconds of recalibration and repair on the device.
    """

    model_config = ConfigDict(frozen=True)

    limits: dict[str, float]
    max_damage: Annotated[
        float, BeforeValidator(_from_null), PlainSerializer(_to_null, when_used="json")
    ]
    choices: tuple[Choice, ...]
    predicted: Figures
    predicted_damage: float
    measured: Figures
    teacher: Figures
    damage: float | None
    teacher_val_accuracy: float
    stitched_val_accuracy: float
    recalibrated_val_accuracy: float
    repaired_val_accuracy: float
    repair_s: float


def run(context: StageContext) -> None:
    """Write ``artifacts/stitch/STUDENT/``: model, ``stitch.json``, ``repair.jsonl``."""
    jobs = start(context)
    for job in jobs:
        run_repair(job)
    finish(context, jobs)


def start(context: StageContext) -> list[RepairJob]:
    """Choose all students; a job for every choice, several students' where theirs are equal.

    Measures latency on this process's device where a limit asks for it and none is kept.

    Raises:
        ArtifactError: an earlier stage has not run.
        BudgetError: names every student whose limits cannot be kept.
    """
    workspace, config = context.workspace, context.params.stitch
    output = workspace.artifacts("stitch")
    for folder in subfolders(output):
        workspace.store.adopt(REPAIRED, folder)
    distilled = {(d.result.block, d.result.candidate): d for d in read_distilled(workspace)}
    damages = {name: item.damage.kl for name, item in distilled.items()}
    discovery = read_blocks(workspace)
    teacher, card, _ = read_teacher(workspace)
    meter = LatencyMeter(workspace, teacher.to(best_device()), card, discovery, config)
    latency = meter.table() if needs_latency(config) else None
    subject = Subject.of(teacher, discovery, damages, latency)
    students = choose_students(subject.blocks, subject.rest, config)
    _log_choices(students)
    whole_ms = _whole_latencies(meter, students)
    groups: dict[tuple[str | None, ...], list[ChosenStudent]] = {}
    for student in students:
        groups.setdefault(student.selection.names, []).append(student)
    return [_job(context, card, distilled, group, whole_ms) for group in groups.values()]


def finish(context: StageContext, jobs: Sequence[RepairJob]) -> None:
    """Write ``artifacts/stitch/``: exactly the present students, by hard links.

    Raises:
        ArtifactError: a student in the store is damaged.
    """
    store = context.workspace.store
    for job in jobs:
        store.verify(REPAIRED, job.key)
    with atomic_dir(context.workspace.artifacts("stitch")) as folder:
        for job in jobs:
            item = store.path(REPAIRED, job.key)
            repaired = Repaired.model_validate(read_json(item / RECORD))
            for student in job.students:
                link_tree(item, folder / student.name)
                stitched = _stitched(context, student, repaired, job.latency_ms)
                _log_student(student.name, stitched)
                write_json(folder / student.name / STITCH, stitched)


def read_stitched(workspace: Workspace, student: str) -> Stitched:
    """What the stage wrote of a student."""
    return Stitched.model_validate(read_json(workspace.artifacts("stitch") / student / STITCH))


def _whole_latencies(meter: LatencyMeter, students: Sequence[ChosenStudent]) -> dict[str, float]:
    """Milliseconds of the students whose latency is limited, and of the ``teacher``."""
    limited = {
        student.name: student.selection.replacements
        for student in students
        if "latency" in student.limits
    }
    return meter.whole(limited) if limited else {}


def _job(
    context: StageContext,
    card: ModelCard,
    distilled: Mapping[tuple[str, str], Distilled],
    students: Sequence[ChosenStudent],
    whole_ms: dict[str, float],
) -> RepairJob:
    workspace, params = context.workspace, context.params
    chosen = {
        path: distilled[path, name] for path, name in students[0].selection.replacements.items()
    }
    items = workspace.artifacts("distill") / TRAINEES
    # of all candidates the same images
    score_images = max(item.damage.num_images for item in distilled.values())
    settings = params.stitch.model_dump(include={"recalibrate_batches", "repair"})
    key = digest_of(
        {
            "algorithm": ALGORITHM,
            "teacher": card.digest,
            "data": card.data_digest,
            "augment": card.augment,
            "trainees": {path: item.key for path, item in chosen.items()},
            "settings": settings,
            "score_images": score_images,
            "seed": params.seed,
        }
    )
    return RepairJob(
        key=key,
        students=tuple(students),
        latency_ms=whole_ms,
        replacements={
            path: Candidate(config=item.result.config, folder=items / item.key)
            for path, item in chosen.items()
        },
        recalibrate_batches=params.stitch.recalibrate_batches,
        repair=params.stitch.repair,
        score_images=score_images,
        seed=params.seed,
        teacher=workspace.artifacts("teacher"),
        prepared=workspace.prepared,
        store=workspace.store.root,
        progress=workspace.state / "progress",
    )


def _stitched(
    context: StageContext,
    student: ChosenStudent,
    repaired: Repaired,
    latency_ms: Mapping[str, float],
) -> Stitched:
    limited = student.name in latency_ms
    own_ms = {"latency_ms": latency_ms[student.name]} if limited else {}
    teacher_ms = {"latency_ms": latency_ms["teacher"]} if limited else {}
    selection = student.selection
    return Stitched(
        limits=dict(student.limits),
        max_damage=context.params.stitch.max_damage,
        choices=selection.choices,
        predicted=selection.figures,
        predicted_damage=selection.damage,
        measured=repaired.figures.model_copy(update=own_ms),
        teacher=repaired.teacher.model_copy(update=teacher_ms),
        **repaired.model_dump(exclude={"teacher", "figures"}),
    )


# ---------------------------------------------------------------- log


def _log_choices(students: Sequence[ChosenStudent]) -> None:
    for student in students:
        selection: Selection = student.selection
        _log.info(
            "student %s: %d of %d blocks replaced, predicted damage %.4g nats",
            student.name,
            len(selection.replacements),
            len(selection.choices),
            selection.damage,
        )
        for choice in selection.choices:
            name = choice.candidate or "teacher's own"
            _log.debug("%s, %s: %s (%s)", student.name, choice.block, name, choice.reason)


def _log_student(name: str, stitched: Stitched) -> None:
    predicted, measured = stitched.predicted, stitched.measured
    for figure, foretold in predicted.model_dump(exclude={"latency_ms"}).items():
        found = getattr(measured, figure)
        _log.info("student %s: %s predicted %d, measured %d", name, figure, foretold, found)
    if measured.latency_ms is not None and predicted.latency_ms is not None:
        _log.info(
            "student %s: latency predicted %.4g ms, measured %.4g ms, teacher %.4g ms",
            name,
            predicted.latency_ms,
            measured.latency_ms,
            stitched.teacher.latency_ms,
        )
        if measured.latency_ms > stitched.limits["latency"]:
            _log.warning(
                "student %s: latency %.4g ms is over the limit of %.4g ms; lower the limit by as "
                "much, or run `pbkd stitch --remeasure` on a calm machine",
                name,
                measured.latency_ms,
                stitched.limits["latency"],
            )
    _log.info(
        "student %s: validation accuracy stitched %.4f, recalibrated %.4f, repaired %.4f",
        name,
        stitched.stitched_val_accuracy,
        stitched.recalibrated_val_accuracy,
        stitched.repaired_val_accuracy,
    )
