"""Stage `finetune`: one end-to-end distillation per student."""

from __future__ import annotations

from pathlib import Path

from pbkd.artifacts import atomic_dir, write_json
from pbkd.data import Stream, load_prepared
from pbkd.devices import best_device
from pbkd.models import load_teacher, save_model
from pbkd.stages.context import StageContext, student_folders
from pbkd.students import finetune, load_model


def run(context: StageContext) -> None:
    """Write ``artifacts/finetune/STUDENT/``: model, history, ``finetune.json``."""
    sources = student_folders(context.workspace, "stitch")
    with atomic_dir(context.workspace.artifacts("finetune")) as folder:
        for source in sources:
            (folder / source.name).mkdir()
            _finetune(context, source, folder / source.name)


def _finetune(context: StageContext, source: Path, folder: Path) -> None:
    device = best_device()
    teacher, _ = load_teacher(context.workspace.artifacts("teacher"))
    student, card = load_model(source)
    prepared = load_prepared(context.workspace.prepared)
    train, val = (
        Stream(prepared.split(name), seed=context.params.seed, augment=card.augment, device=device)
        for name in ("train", "val")
    )
    accuracy = finetune(
        student.to(device),
        teacher.to(device),
        train,
        val,
        context.params.finetune,
        folder / "history.jsonl",
    )
    save_model(folder, student.cpu(), card)
    write_json(folder / "finetune.json", {"val_accuracy": accuracy})
