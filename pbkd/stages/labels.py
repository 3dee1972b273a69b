"""The kept labels' part of the stage `finetune`: a job per view, items of the store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pbkd.artifacts import Store, read_json, write_json
from pbkd.data import Stream, load_prepared
from pbkd.devices import best_device, enough_memory
from pbkd.errors import disk_errors_explained
from pbkd.models import ModelCard, load_teacher
from pbkd.stages.context import StageContext
from pbkd.students.soft_labels import labels_key, write_labels

LABELS = "labels"
"""Kind of the store's items."""
_RECORD = "labels.json"


class LabelJob(BaseModel):
    """One view of the training images to label; paths are absolute."""

    model_config = ConfigDict(frozen=True)

    key: str
    view: int
    top: int | None
    temperature: float
    teacher: Path
    prepared: Path
    seed: int
    store: Path
    progress: Path

    @property
    def heartbeat(self) -> Path:
        """A file that the job touches while it is alive."""
        return self.progress / f"{self.key}.alive"


def label_jobs(context: StageContext, teacher: ModelCard) -> list[LabelJob]:
    """A job for every view that fine-tuning will show; none where the teacher runs inline."""
    config, workspace, seed = context.params.finetune, context.workspace, context.params.seed
    if config.teachers == "inline":
        return []
    return [
        LabelJob(
            key=labels_key(teacher, config, seed, view),
            view=view,
            top=config.top_labels,
            temperature=config.temperature,
            teacher=workspace.artifacts("teacher"),
            prepared=workspace.prepared,
            seed=seed,
            store=workspace.store.root,
            progress=workspace.state / "progress",
        )
        for view in range(min(config.views, config.epochs))
    ]


def run_labels(job: LabelJob) -> None:
    """Label a view into the store; returns at once if it is there.

    Raises:
        PbkdError: teacher or data cannot be read, or memory or disk are full.
    """
    store = Store(job.store)
    if store.has(LABELS, job.key):
        return
    job.progress.mkdir(parents=True, exist_ok=True)
    with disk_errors_explained(), enough_memory("labelling", "free some memory"):
        began_s = time.perf_counter()
        teacher, card = load_teacher(job.teacher, allow_code=True)
        images = load_prepared(job.prepared).split("train")
        device = best_device()
        train = Stream(images, seed=job.seed, augment=card.augment, device=device)

        def write(folder: Path) -> None:
            write_labels(
                folder,
                teacher.to(device),
                train,
                job.view,
                job.top,
                job.temperature,
                job.heartbeat.touch,
            )
            write_json(folder / _RECORD, {"duration_s": time.perf_counter() - began_s})

        store.put(LABELS, job.key, write)


def labels_s(folders: Sequence[Path]) -> float:
    """Device seconds that the labelling of some views took."""
    return sum(float(read_json(folder / _RECORD)["duration_s"]) for folder in folders)
