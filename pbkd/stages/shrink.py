"""Stage `shrink`: each student through its recipe; an empty one passes it through."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pbkd.artifacts import Store, atomic_dir, link_tree
from pbkd.config import StepConfig
from pbkd.data import Stream, load_prepared
from pbkd.devices import best_device
from pbkd.errors import disk_errors_explained
from pbkd.models import load_teacher, read_card
from pbkd.shrink import SHRUNK, Trainer, run_recipe, step_keys
from pbkd.stages.context import StageContext, student_folders, subfolders
from pbkd.stages.teacher import read_teacher_card


class ShrinkJob(BaseModel):
    """One student's recipe; paths are absolute.

    Attributes:
        names: the students that it makes; several where equal models have equal recipes.
        student: a folder of the stage `finetune`.
        keys: of the store's items before the first step and after each.
        progress: folder for the file that is touched.
        checkpoints: folder for the trainings of the steps.
    """

    model_config = ConfigDict(frozen=True)

    names: tuple[str, ...]
    student: Path
    steps: tuple[StepConfig, ...]
    keys: tuple[str, ...]
    seed: int
    teacher: Path
    prepared: Path
    store: Path
    progress: Path
    checkpoints: Path

    @property
    def key(self) -> str:
        """Of the item that the job ends with."""
        return self.keys[-1]

    @property
    def heartbeat(self) -> Path:
        """A file that the job touches while it is alive."""
        return self.progress / f"{self.key}.alive"


def run(context: StageContext) -> None:
    """Write ``artifacts/shrink/STUDENT/``: model, ``shrink.json``, and `model.pbkd` if coded."""
    jobs = start(context)
    for job in jobs:
        run_shrink(job)
    finish(context, jobs)


def start(context: StageContext) -> list[ShrinkJob]:
    """Import what the old output holds; a job for every student. Uses no device.

    Raises:
        ArtifactError: an earlier stage has not run.
    """
    workspace, params = context.workspace, context.params
    for folder in subfolders(workspace.artifacts("shrink")):
        workspace.store.adopt(SHRUNK, folder)
    teacher, _ = read_teacher_card(workspace)
    found: dict[str, ShrinkJob] = {}
    for source in student_folders(workspace, "finetune"):
        steps = params.shrink.recipe_of(source.name)
        keys = step_keys(read_card(source).digest, teacher.digest, steps, params.seed)
        names = found[keys[-1]].names if keys[-1] in found else ()
        found[keys[-1]] = ShrinkJob(
            names=(*names, source.name),
            student=source,
            steps=steps,
            keys=tuple(keys),
            seed=params.seed,
            teacher=workspace.artifacts("teacher"),
            prepared=workspace.prepared,
            store=workspace.store.root,
            progress=workspace.state / "progress",
            checkpoints=workspace.checkpoint("shrink", "steps").parent,
        )
    return list(found.values())


def run_shrink(job: ShrinkJob) -> None:
    """Take a student through its recipe, into the store; returns at once if it is there.

    Raises:
        PbkdError: a step cannot be taken, a model or the data cannot be read, or memory or disk
            are full.
    """
    store = Store(job.store)
    if store.has(SHRUNK, job.key):
        return
    job.progress.mkdir(parents=True, exist_ok=True)
    with disk_errors_explained():
        teacher, card = load_teacher(job.teacher, allow_code=True)
        prepared, device = load_prepared(job.prepared), best_device()
        train, val = (
            Stream(prepared.split(name), seed=job.seed, augment=card.augment, device=device)
            for name in ("train", "val")
        )

        def trainer_of(key: str) -> Trainer:
            return Trainer(teacher, train, val, job.checkpoints / key, job.heartbeat.touch)

        run_recipe(job.student, job.steps, job.keys, store, trainer_of)


def finish(context: StageContext, jobs: list[ShrinkJob]) -> None:
    """Write ``artifacts/shrink/``, by hard links; uses no device.

    Raises:
        ArtifactError: an item of the store is damaged; it is removed.
    """
    store = context.workspace.store
    for job in jobs:
        store.verify(SHRUNK, job.key)
    with atomic_dir(context.workspace.artifacts("shrink")) as folder:
        for job in jobs:
            for name in job.names:
                link_tree(store.path(SHRUNK, job.key), folder / name)
