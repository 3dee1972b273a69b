"""The baselines' part of the stage `finetune`: jobs, keys, and items of the store."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from pbkd.artifacts import Store, digest_of, read_json, write_json
from pbkd.config import TeacherConfig
from pbkd.data import load_prepared
from pbkd.devices import best_device
from pbkd.errors import disk_errors_explained
from pbkd.models import Recipe, load_teacher, read_card, save_model
from pbkd.stages.context import StageContext
from pbkd.stages.device_time import student_device_s
from pbkd.stages.student_job import FINETUNED, RESULT, FinetuneJob, StudentJob
from pbkd.students.baseline import (
    BaselineKind,
    random_student,
    scratch_recipe,
    train_baseline,
)

BASELINES = "baselines"
ALGORITHM = 3
"""Raised whenever the same settings would give other weights."""


class BaselineJob(StudentJob):
    """One baseline as plain values.

    Attributes:
        names: the students whose architecture it has.
        student: a folder of the stage `stitch` that holds it; its weights are not read.
        recipe: of the training.
        device_s: seconds that the student took, rounded up to two digits.
    """

    names: tuple[str, ...]
    kind: BaselineKind
    student: Path
    recipe: TeacherConfig
    device_s: float


def baseline_job(job: FinetuneJob, kind: BaselineKind, context: StageContext) -> BaselineJob:
    """The baseline of a fine-tuned student; what it took is read from the store."""
    workspace, config = context.workspace, context.params.finetune
    duration_s = float(read_json(Store(job.store).path(FINETUNED, job.key) / RESULT)["duration_s"])
    device_s = rounded_up(student_device_s(workspace, job.names[0], duration_s))
    recipe = scratch_recipe(context.params.teacher)
    key = _key(kind, job, recipe, device_s)
    return BaselineJob(
        key=key,
        names=job.names,
        kind=kind,
        student=job.student,
        teacher=job.teacher,
        prepared=job.prepared,
        config=config,
        recipe=recipe,
        seed=job.seed,
        device_s=device_s,
        store=job.store,
        progress=job.progress,
        checkpoint=workspace.checkpoint("baselines", key),
    )


def run_baseline(job: BaselineJob) -> None:
    """Train a baseline into the store; returns at once if it is there.

    Raises:
        PbkdError: a card or the data cannot be read, or memory or disk are full.
    """
    store = Store(job.store)
    if store.has(BASELINES, job.key):
        return
    job.progress.mkdir(parents=True, exist_ok=True)
    with disk_errors_explained():
        teacher, _ = load_teacher(job.teacher, allow_code=True)
        card = read_card(job.student)
        model = random_student(card, job.seed).to(best_device())
        result = train_baseline(
            job.kind,
            model,
            teacher.to(best_device()),
            *job.streams(card, load_prepared(job.prepared)),
            job.config,
            job.recipe,
            job.device_s,
            job.history,
            job.checkpoint,
            job.heartbeat.touch,
        )

        def write(folder: Path) -> None:
            save_model(folder, model.cpu(), card)
            (folder / "history.jsonl").write_bytes(job.history.read_bytes())
            write_json(folder / "baseline.json", result)

        store.put(BASELINES, job.key, write)
    job.checkpoint.unlink(missing_ok=True)


def rounded_up(device_s: float) -> float:
    """Seconds to two digits: a library that changes a little leaves the baselines as they are."""
    unit = 10.0 ** (math.floor(math.log10(max(device_s, 1e-3))) - 1)
    return round(math.ceil(device_s / unit) * unit, 6)


def _key(kind: BaselineKind, job: FinetuneJob, recipe: TeacherConfig, device_s: float) -> str:
    learns_from = {"teacher": read_card(job.teacher).digest} if kind == "distill" else {}
    settings = {"temperature", "label_weight"} if kind == "distill" else set()
    return digest_of(
        {
            "algorithm": ALGORITHM,
            "kind": kind,
            "architecture": read_card(job.student).model_copy(update={"digest": ""}),
            "config": job.config.model_dump(mode="json", include={"restarts", *settings}),
            "recipe": {**asdict(Recipe.of(recipe)), "epochs": None},
            "label_smoothing": recipe.label_smoothing if kind == "scratch" else None,
            "seed": job.seed,
            "device_s": device_s,
            **learns_from,
        }
    )
