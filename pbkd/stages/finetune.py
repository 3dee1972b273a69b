"""Stage `finetune`: one end-to-end distillation per student, then its baselines.

Where labels are kept, they come first (``label_jobs``); then the students' jobs (``start``), and
their baselines' after them (``start_baselines``), with the seconds that each student took.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from pbkd.artifacts import Store, Workspace, atomic_dir, digest_of, link_tree, write_json
from pbkd.config import FinetuneConfig
from pbkd.data import Stream, load_prepared
from pbkd.devices import best_device
from pbkd.elastic.actors import RayBoard
from pbkd.elastic.label_plan import LABELS
from pbkd.elastic.soft_labels import SoftLabels
from pbkd.elastic.stream import LabelStream
from pbkd.errors import disk_errors_explained
from pbkd.models import ModelCard, load_teacher, read_card, save_model
from pbkd.settings import Settings
from pbkd.stages.baselines import BASELINES, BaselineJob, baseline_job, run_baseline
from pbkd.stages.context import StageContext, student_folders, subfolders
from pbkd.stages.labels import LabelJob, label_jobs, label_plan, labels_s, run_labels, teachers_of
from pbkd.stages.student_job import FINETUNED, HISTORY, RESULT, FinetuneJob
from pbkd.stages.teacher import read_teacher_card
from pbkd.students import finetune, load_model
from pbkd.students.finetune import Teacher

__all__ = [
    "finish",
    "run",
    "run_baseline",
    "run_finetune",
    "run_labels",
    "start",
    "start_baselines",
    "start_labels",
]

ALGORITHM = 3
"""Raised whenever the same settings would give other weights."""

_BASELINE = "baseline-"
_IDLE: dict[str, set[str]] = {
    "inline": {"views", "top_labels", "without_teachers"},
    "cached": {"without_teachers"},
    "elastic": set(),
}
"""Settings that change nothing."""


def run(context: StageContext) -> None:
    """Write ``artifacts/finetune/STUDENT/``: model, history, ``finetune.json``, baselines."""
    jobs = start(context)
    for labels in start_labels(context, jobs):
        run_labels(labels)
    with teachers_of(context, jobs, Settings.from_env()) as ready:
        for job in ready:
            run_finetune(job)
    baselines = start_baselines(context, jobs)
    for baseline in baselines:
        run_baseline(baseline)
    finish(context, jobs, baselines)


def start(context: StageContext) -> list[FinetuneJob]:
    """Import what the old output holds; a job for every stitched model.

    Raises:
        ArtifactError: an earlier stage has not run.
    """
    workspace = context.workspace
    _adopt_output(workspace)
    teacher, _ = read_teacher_card(workspace)
    names: dict[str, list[Path]] = {}
    for source in student_folders(workspace, "stitch"):
        names.setdefault(_key(context, read_card(source), teacher), []).append(source)
    return [_job(context, key, sources, teacher) for key, sources in names.items()]


def start_labels(context: StageContext, jobs: Sequence[FinetuneJob]) -> list[LabelJob]:
    """The jobs that must run before the students' that the store lacks."""
    if context.params.finetune.teachers != "cached":
        return []
    store = context.workspace.store
    wanted = {key for job in jobs if not store.has(FINETUNED, job.key) for key in job.labels}
    teacher, _ = read_teacher_card(context.workspace)
    return [job for job in label_jobs(context, teacher) if job.key in wanted]


def _config(context: StageContext, student: ModelCard) -> FinetuneConfig:
    """A student that kept all of the teacher's blocks has nothing to learn from it."""
    config = context.params.finetune
    return config if student.replacements else config.model_copy(update={"epochs": 0})


def run_finetune(job: FinetuneJob) -> None:
    """Fine-tune a student into the store; returns at once if it is there.

    Raises:
        PbkdError: a model or the data cannot be read, or memory or disk are full.
    """
    store = Store(job.store)
    if store.has(FINETUNED, job.key):
        return
    job.progress.mkdir(parents=True, exist_ok=True)
    with disk_errors_explained():
        student, card = load_model(job.student, allow_code=True)
        prepared = load_prepared(job.prepared)
        train, val = job.streams(card, prepared, views=len(job.labels) or None)
        with ExitStack() as stack:
            teacher = _teacher(job, train, len(card.class_names))
            if isinstance(teacher, LabelStream):
                stack.callback(teacher.close)
                train.views = teacher.view_of
            result = finetune(
                student.to(best_device()),
                teacher,
                train,
                val,
                job.config,
                job.history,
                job.checkpoint,
                job.heartbeat.touch,
            )
        if isinstance(teacher, LabelStream):
            result = result.model_copy(update={"num_lacking": teacher.num_lacking})
        kept = [store.path(LABELS, key) for key in job.labels if store.has(LABELS, key)]
        duration_s = result.duration_s + labels_s(kept)

        def write(folder: Path) -> None:
            save_model(folder, student.cpu(), card)
            (folder / HISTORY).write_bytes(job.history.read_bytes())
            write_json(folder / RESULT, result.model_copy(update={"duration_s": duration_s}))

        store.put(FINETUNED, job.key, write)
    job.checkpoint.unlink(missing_ok=True)


def _teacher(job: FinetuneJob, train: Stream, num_classes: int) -> Teacher:
    if job.board:
        return LabelStream(
            label_plan(job),
            RayBoard(job.board, job.address, job.auth_mode),
            job.key,
            train,
            num_classes,
            job.deadline_s,
            may_lack=job.config.without_teachers == "labels",
        )
    if job.labels:
        folders = [Store(job.store).path(LABELS, key) for key in job.labels]
        return SoftLabels(folders, num_classes, job.config.temperature, best_device())
    teacher, _ = load_teacher(job.teacher, allow_code=True)
    return teacher.to(best_device())


def start_baselines(context: StageContext, jobs: Sequence[FinetuneJob]) -> list[BaselineJob]:
    """After the fine-tuning: a job for every student and entry of ``finetune.baselines``.

    Uses no device.

    Raises:
        ArtifactError: a student is not fine-tuned, or an earlier stage has not run.
    """
    kinds = context.params.finetune.baselines
    return [baseline_job(job, kind, context) for job in jobs for kind in dict.fromkeys(kinds)]


def finish(
    context: StageContext, jobs: Sequence[FinetuneJob], baselines: Sequence[BaselineJob] = ()
) -> None:
    """Write ``artifacts/finetune/``, by hard links; uses no device.

    Raises:
        ArtifactError: an item of the store is damaged; it is removed.
    """
    store = context.workspace.store
    for job in jobs:
        store.verify(FINETUNED, job.key)
    for baseline in baselines:
        store.verify(BASELINES, baseline.key)
    with atomic_dir(context.workspace.artifacts("finetune")) as folder:
        for job in jobs:
            for name in job.names:
                link_tree(store.path(FINETUNED, job.key), folder / name)
        for baseline in baselines:
            for name in baseline.names:
                item = store.path(BASELINES, baseline.key)
                link_tree(item, folder / name / f"{_BASELINE}{baseline.kind}")


def _job(
    context: StageContext, key: str, sources: Sequence[Path], teacher: ModelCard
) -> FinetuneJob:
    workspace, config = context.workspace, _config(context, read_card(sources[0]))
    labels = label_jobs(context, teacher) if config.epochs else []
    return FinetuneJob(
        key=key,
        labels=tuple(label.key for label in labels),
        names=tuple(source.name for source in sources),
        student=sources[0],
        teacher=workspace.artifacts("teacher"),
        prepared=workspace.prepared,
        config=config,
        seed=context.params.seed,
        store=workspace.store.root,
        progress=workspace.state / "progress",
        checkpoint=workspace.checkpoint("finetune", key),
    )


def _key(context: StageContext, student: ModelCard, teacher: ModelCard) -> str:
    config = _config(context, student)
    idle = _IDLE[config.teachers]
    return digest_of(
        {
            "algorithm": ALGORITHM,
            "student": student.digest,  # covers data and augmentation
            "teacher": teacher.digest,
            "config": config.model_dump(mode="json", exclude={"baselines", *idle}),
            "seed": context.params.seed,
        }
    )


def _adopt_output(workspace: Workspace) -> None:
    """Import what the old output holds; a student's folder holds its baselines' folders, too."""
    output, store = workspace.artifacts("finetune"), workspace.store
    for folder in subfolders(output):
        for baseline in folder.glob(f"{_BASELINE}*"):
            store.adopt(BASELINES, baseline)
        workspace.state.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=workspace.state) as temporary:
            for path in folder.iterdir():
                if path.is_file():
                    shutil.copy(path, temporary)
            store.adopt(FINETUNED, Path(temporary))
