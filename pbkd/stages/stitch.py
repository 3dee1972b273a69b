"""Stage `stitch`: choose candidates, put them into the teacher, recalibrate batch norm."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pbkd.artifacts import Workspace, atomic_dir, load_tensors, read_json, write_json
from pbkd.data import Stream
from pbkd.devices import best_device
from pbkd.distill import TRAINEES
from pbkd.distill.trainee import WEIGHTS
from pbkd.models import predict, save_model
from pbkd.stages.blocks import read_blocks
from pbkd.stages.context import StageContext
from pbkd.stages.distill import read_distilled
from pbkd.stages.teacher import read_teacher
from pbkd.students import Choice, choose, recalibrate, stitch

_log = logging.getLogger(__name__)

STUDENT = "default"
"""Name of the one student; named budgets come beside it."""

_BATCH = 256


class Stitched(BaseModel):
    """What ``stitch.json`` says of a student: limit, choices, validation accuracies (0 to 1)."""

    model_config = ConfigDict(frozen=True)

    max_damage: float
    choices: tuple[Choice, ...]
    teacher_val_accuracy: float
    stitched_val_accuracy: float
    recalibrated_val_accuracy: float


def run(context: StageContext) -> None:
    """Write ``artifacts/stitch/STUDENT/``: model and ``stitch.json``."""
    workspace, config = context.workspace, context.params.stitch
    distilled = {(d.result.block, d.result.candidate): d for d in read_distilled(workspace)}
    choices = choose(
        read_blocks(workspace).blocks,
        {name: item.damage for name, item in distilled.items()},
        config.max_damage,
    )
    for choice in choices:
        _log.info("%s: %s (%s)", choice.block, choice.candidate or "teacher's own", choice.reason)
    items = workspace.artifacts("distill") / TRAINEES
    weights = {
        choice.block: load_tensors(items / distilled[choice.block, choice.candidate].key / WEIGHTS)
        for choice in choices
        if choice.candidate is not None
    }
    with atomic_dir(workspace.artifacts("stitch")) as folder:
        (folder / STUDENT).mkdir()
        _write_student(context, choices, weights, folder / STUDENT)


def read_stitched(workspace: Workspace, student: str) -> Stitched:
    """What the stage wrote of a student."""
    path = workspace.artifacts("stitch") / student / "stitch.json"
    return Stitched.model_validate(read_json(path))


def _write_student(
    context: StageContext,
    choices: list[Choice],
    weights: dict[str, dict[str, Tensor]],
    folder: Path,
) -> None:
    device = best_device()
    teacher, card, prepared = read_teacher(context.workspace)
    replacements = {choice.block: choice.config for choice in choices if choice.config is not None}
    student = stitch(teacher, replacements, weights).to(device)
    train, val = (
        Stream(prepared.split(name), seed=context.params.seed, augment=card.augment, device=device)
        for name in ("train", "val")
    )
    stitched_accuracy = predict(student, val, batch_size=_BATCH).accuracy
    num_batches = context.params.stitch.recalibrate_batches
    if num_batches and replacements:
        recalibrate(student, train, num_batches=num_batches, batch_size=_BATCH)
    stitched = Stitched(
        max_damage=context.params.stitch.max_damage,
        choices=tuple(choices),
        teacher_val_accuracy=predict(teacher.to(device), val, batch_size=_BATCH).accuracy,
        stitched_val_accuracy=stitched_accuracy,
        recalibrated_val_accuracy=predict(student, val, batch_size=_BATCH).accuracy,
    )
    save_model(folder, student.cpu(), card.model_copy(update={"replacements": replacements}))
    write_json(folder / "stitch.json", stitched)
    _log.info(
        "validation accuracy: stitched %.4f, recalibrated %.4f",
        stitched.stitched_val_accuracy,
        stitched.recalibrated_val_accuracy,
    )
