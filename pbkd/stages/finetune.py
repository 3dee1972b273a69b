"""Stage `finetune`: one end-to-end distillation per student, then its baselines.

The students' jobs come first (``start``), their baselines' after them (``start_baselines``): a
baseline gets the seconds that its student took.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pbkd.artifacts import Store, Workspace, atomic_dir, digest_of, link_tree, write_json
from pbkd.config import FinetuneConfig
from pbkd.data import load_prepared
from pbkd.devices import best_device
from pbkd.errors import disk_errors_explained
from pbkd.models import ModelCard, load_teacher, read_card, save_model
from pbkd.stages.baselines import BASELINES, BaselineJob, baseline_job, run_baseline
from pbkd.stages.context import StageContext, student_folders, subfolders
from pbkd.stages.student_job import FINETUNED, HISTORY, RESULT, FinetuneJob
from pbkd.stages.teacher import read_teacher_card
from pbkd.students import finetune, load_model

__all__ = ["finish", "run", "run_baseline", "run_finetune", "start", "start_baselines"]

ALGORITHM = 2
"""Raised whenever the same settings would give other weights."""

_BASELINE = "baseline-"


def run(context: StageContext) -> None:
    """Write ``artifacts/finetune/STUDENT/``: model, history, ``finetune.json``, baselines."""
    jobs = start(context)
    for job in jobs:
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
    return [_job(context, key, sources) for key, sources in names.items()]


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
        teacher, _ = load_teacher(job.teacher, allow_code=True)
        student, card = load_model(job.student, allow_code=True)
        prepared = load_prepared(job.prepared)
        result = finetune(
            student.to(best_device()),
            teacher.to(best_device()),
            *job.streams(card, prepared),
            job.config,
            job.history,
            job.checkpoint,
            job.heartbeat.touch,
        )

        def write(folder: Path) -> None:
            save_model(folder, student.cpu(), card)
            (folder / HISTORY).write_bytes(job.history.read_bytes())
            write_json(folder / RESULT, result)

        store.put(FINETUNED, job.key, write)
    job.checkpoint.unlink(missing_ok=True)


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


def _job(context: StageContext, key: str, sources: Sequence[Path]) -> FinetuneJob:
    workspace = context.workspace
    return FinetuneJob(
        key=key,
        names=tuple(source.name for source in sources),
        student=sources[0],
        teacher=workspace.artifacts("teacher"),
        prepared=workspace.prepared,
        config=_config(context, read_card(sources[0])),
        seed=context.params.seed,
        store=workspace.store.root,
        progress=workspace.state / "progress",
        checkpoint=workspace.checkpoint("finetune", key),
    )


def _key(context: StageContext, student: ModelCard, teacher: ModelCard) -> str:
    return digest_of(
        {
            "algorithm": ALGORITHM,
            "student": student.digest,  # covers data and augmentation
            "teacher": teacher.digest,
            "config": _config(context, student).model_dump(mode="json", exclude={"baselines"}),
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
