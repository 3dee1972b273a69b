"""Stage `finetune`: one end-to-end distillation per student."""

from __future__ import annotations

from pathlib import Path

from pbkd.artifacts import atomic_dir, digest_of, write_json
from pbkd.data import Stream
from pbkd.devices import best_device
from pbkd.models import save_model
from pbkd.stages.context import StageContext, student_folders
from pbkd.stages.teacher import read_teacher
from pbkd.students import finetune, load_model


def run(context: StageContext) -> None:
    """Write ``artifacts/finetune/STUDENT/``: model, history, ``finetune.json``."""
    sources = student_folders(context.workspace, "stitch")
    checkpoints = []
    with atomic_dir(context.workspace.artifacts("finetune")) as folder:
        for source in sources:
            (folder / source.name).mkdir()
            checkpoints.append(_finetune(context, source, folder / source.name))
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)


def _finetune(context: StageContext, source: Path, folder: Path) -> Path:
    """Write one student; returns the checkpoint, for when the output is safe."""
    device, seed, config = best_device(), context.params.seed, context.params.finetune
    teacher, teacher_card, prepared = read_teacher(context.workspace)
    student, card = load_model(source, allow_code=True)
    train, val = (
        Stream(prepared.split(name), seed=seed, augment=card.augment, device=device)
        for name in ("train", "val")
    )
    key = digest_of(
        {"student": card.digest, "teacher": teacher_card.digest, "config": config, "seed": seed}
    )
    checkpoint = context.workspace.checkpoint("finetune", key)
    accuracy = finetune(
        student.to(device),
        teacher.to(device),
        train,
        val,
        config,
        folder / "history.jsonl",
        checkpoint,
    )
    save_model(folder, student.cpu(), card)
    write_json(folder / "finetune.json", {"val_accuracy": accuracy})
    return checkpoint
