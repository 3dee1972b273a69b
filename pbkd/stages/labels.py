"""The labels' part of the stage `finetune`: kept ones, a job per view, and elastic teachers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pbkd.artifacts import Store, read_json, write_json
from pbkd.data import Stream, load_prepared
from pbkd.devices import best_device, enough_memory
from pbkd.elastic.label_plan import LABELS, LabelPlan
from pbkd.elastic.pool import PoolSize, TeacherPool
from pbkd.elastic.soft_labels import RECORD, labels_key, write_labels
from pbkd.elastic.status import FILE, TeachersStatus
from pbkd.errors import disk_errors_explained
from pbkd.models import ModelCard, load_teacher
from pbkd.settings import Settings
from pbkd.stages.context import StageContext
from pbkd.stages.student_job import FINETUNED, FinetuneJob


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
    """One for every view that fine-tuning will show; none where the teacher runs inline."""
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
            write_json(folder / RECORD, {"duration_s": time.perf_counter() - began_s})

        store.put(LABELS, job.key, write)


def labels_s(folders: Sequence[Path]) -> float:
    """Device seconds that the labelling of some views took."""
    return sum(float(read_json(folder / RECORD)["duration_s"]) for folder in folders)


@contextmanager
def teachers_of(
    context: StageContext,
    jobs: Sequence[FinetuneJob],
    settings: Settings,
    on_status: Callable[[TeachersStatus], None] = lambda _: None,
) -> Iterator[list[FinetuneJob]]:
    """Elastic teachers for the jobs that the store lacks; yields all jobs with the way to them.

    None are started where the store holds all labels, or another kind of teachers is asked for.

    Args:
        on_status: gets what the teachers do, once a second.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    if not needs_teachers(context, jobs):
        yield list(jobs)
        return
    plan = label_plan(max(_left(context, jobs), key=lambda job: len(job.labels)))
    size = PoolSize(
        min_teachers=settings.min_teachers,
        max_teachers=max(settings.min_teachers, settings.max_teachers),
        gpus=settings.teacher_gpus,
    )
    path = context.workspace.state / FILE
    with TeacherPool(plan, size, path, on_status=on_status) as pool:
        way = {
            "board": pool.board,
            "address": pool.address,
            "auth_mode": pool.auth_mode,
            "deadline_s": settings.teacher_deadline_s,
        }
        if settings.runner == "ray":  # before students take the CPUs
            pool.wait_for_one(settings.teacher_deadline_s)
        yield [job.model_copy(update=way) for job in jobs]


def needs_teachers(context: StageContext, jobs: Sequence[FinetuneJob]) -> bool:
    """Whether elastic teachers are asked for, and have something to label."""
    store = context.workspace.store
    keys = {key for job in _left(context, jobs) for key in job.labels}
    is_elastic = context.params.finetune.teachers == "elastic"
    return is_elastic and not all(store.has(LABELS, key) for key in keys)


def _left(context: StageContext, jobs: Sequence[FinetuneJob]) -> list[FinetuneJob]:
    return [job for job in jobs if not context.workspace.store.has(FINETUNED, job.key)]


def label_plan(job: FinetuneJob) -> LabelPlan:
    """What elastic teachers label for a student; equal for all students of a run."""
    return LabelPlan(
        keys=job.labels,
        teacher=job.teacher,
        prepared=job.prepared,
        seed=job.seed,
        top=job.config.top_labels,
        temperature=job.config.temperature,
        store=job.store,
        folder=job.store.parent / LABELS,
        num_images=len(load_prepared(job.prepared).split("train")),
    )
