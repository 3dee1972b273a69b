"""The steps of ``pbkd.compress``, on a model and data that are in memory.

The same as the stages': train and score every candidate, choose, stitch, mend, fine-tune.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel

from pbkd import students
from pbkd.artifacts import (
    Store,
    Workspace,
    digest_of,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)
from pbkd.blocks import Discovery, candidate_name, find_blocks
from pbkd.config import (
    ActivationsConfig,
    AugmentConfig,
    BlocksConfig,
    DistillConfig,
    FinetuneConfig,
    StitchConfig,
)
from pbkd.data import Split, Stream
from pbkd.devices import best_device
from pbkd.distill import (
    SCORES,
    TRAINEES,
    Damage,
    TraineeSpec,
    TrainingJob,
    make_trainees,
    train_and_score,
)
from pbkd.distill.score import SCORE
from pbkd.distill.trainee import WEIGHTS
from pbkd.measure import count_macs, num_parameters
from pbkd.models import Classifier, ModelCard, predict
from pbkd.students import Choice, ChosenStudent

_log = logging.getLogger(__name__)

_ALGORITHM = 3
"""Raised whenever the same choices and settings would give another model."""
_STUDENTS = "students"  # the store's kind of items
_RECORD = "student.json"
_BATCH = 256


@dataclass(frozen=True)
class Compression:
    """What was done; accuracies are on ``val``, 0 to 1, MACs of one image (1 MAC = 2 FLOPs).

    ``limits`` maps parameters, macs, bytes and latency (ms) to what was allowed.
    """

    limits: dict[str, float]
    choices: tuple[Choice, ...]
    teacher_accuracy: float
    stitched_accuracy: float
    repaired_accuracy: float
    accuracy: float
    teacher_num_parameters: int
    num_parameters: int
    teacher_macs: int
    macs: int


class Student(Classifier):
    """A compressed model: float32 NCHW in [0, 1] to logits; ``compression`` says how it came."""

    compression: Compression


@dataclass(frozen=True)
class Settings:
    """The sections that count, and the seed."""

    augment: AugmentConfig
    blocks: BlocksConfig
    activations: ActivationsConfig
    distill: DistillConfig
    stitch: StitchConfig
    finetune: FinetuneConfig
    seed: int


@dataclass(frozen=True)
class Splits:
    """What is trained on, and what chooses."""

    train: Split
    val: Split


class _Made(BaseModel):
    """What ``student.json`` says beside a student's weights: accuracies after each step."""

    stitched: float
    repaired: float
    finetuned: float


def compress_splits(
    teacher: Classifier, card: ModelCard, splits: Splits, settings: Settings, folder: Path
) -> dict[str, Student]:
    """The students of ``settings.stitch.students``, by name; see ``pbkd.compress``.

    Args:
        teacher: with its card; it ends on this process's device.
        folder: holds the store, measured latencies and checkpoints.
    """
    image = torch.zeros(1, *splits.train.images.shape[1:])
    discovery = find_blocks(teacher.net, settings.blocks, image)
    for refused in discovery.refused:
        _log.info("left out %s: %s", refused.name, refused.reason)
    if not students.needs_latency(settings.stitch):  # impossible limits are told before training
        known = students.Subject.of(teacher, discovery)
        students.check_budgets(known.blocks, known.rest, settings.stitch)
    trainees = make_trainees(discovery, card, settings.distill, settings.activations, settings.seed)
    store = Store(folder / "store")
    job = TrainingJob(
        job_id="all",
        trainees=tuple(trainees),
        source="relay",
        activations=settings.activations,
        distill=settings.distill,
        seed=settings.seed,
        store=store.root,
        progress=folder / "progress",
        checkpoints=folder / "checkpoints",
    )
    train_and_score(job, teacher, card, splits.train, splits.val)
    teacher.to(best_device())
    chosen = _choose(teacher, card, discovery, trainees, settings, folder)
    maker = _Maker(teacher, card, trainees, splits, settings, folder)
    return {student.name: maker.make(student) for student in chosen}


def _choose(
    teacher: Classifier,
    card: ModelCard,
    discovery: Discovery,
    trainees: Sequence[TraineeSpec],
    settings: Settings,
    folder: Path,
) -> list[ChosenStudent]:
    store = Store(folder / "store")
    damages = {_name(trainee): _damage(store, trainee).kl for trainee in trainees}
    latency = None
    if students.needs_latency(settings.stitch):
        home = Workspace(folder, folder)  # measured latencies are kept there
        latency = students.LatencyMeter(home, teacher, card, discovery, settings.stitch).table()
    subject = students.Subject.of(teacher, discovery, damages, latency)
    return students.choose_students(subject.blocks, subject.rest, settings.stitch)


class _Maker:
    """Makes students out of trained candidates."""

    def __init__(
        self,
        teacher: Classifier,
        card: ModelCard,
        trainees: Sequence[TraineeSpec],
        splits: Splits,
        settings: Settings,
        folder: Path,
    ) -> None:
        self.teacher, self.card, self.settings, self.folder = teacher, card, settings, folder
        self.store = Store(folder / "store")
        self.trainees = {_name(trainee): trainee for trainee in trainees}
        self.train, self.val = (
            Stream(split, seed=settings.seed, augment=settings.augment, device=best_device())
            for split in (splits.train, splits.val)
        )
        self.image = torch.zeros(1, *splits.train.images.shape[1:])
        self.teacher_accuracy = self._accuracy(teacher)
        self.teacher_macs = count_macs(teacher, self.image.to(best_device()))

    def make(self, chosen: ChosenStudent) -> Student:
        """Stitch, mend and fine-tune, or read from the store."""
        spec = {path: self.trainees[path, n] for path, n in chosen.selection.replacements.items()}
        student = students.stitch(
            self.teacher,
            {path: trainee.config for path, trainee in spec.items()},
            {
                path: load_tensors(self.store.path(TRAINEES, trainee.key) / WEIGHTS)
                for path, trainee in spec.items()
            },
        ).to(best_device())
        key = self._key({path: trainee.key for path, trainee in spec.items()})
        item = self.store.put(
            _STUDENTS, key, lambda folder: self._train(student, list(spec), key, folder)
        )
        self.store.verify(_STUDENTS, key)
        student.load_state_dict(load_tensors(item / WEIGHTS))
        done = _Made.model_validate(read_json(item / _RECORD))
        result = Student(student.net, self.card.mean, self.card.std).cpu().eval()
        result.compression = Compression(
            limits={str(figure): limit for figure, limit in chosen.limits.items()},
            choices=chosen.selection.choices,
            teacher_accuracy=self.teacher_accuracy,
            stitched_accuracy=done.stitched,
            repaired_accuracy=done.repaired,
            accuracy=done.finetuned,
            teacher_num_parameters=num_parameters(self.teacher),
            num_parameters=num_parameters(result),
            teacher_macs=self.teacher_macs,
            macs=count_macs(result, self.image),
        )
        return result

    def _train(self, student: Classifier, paths: list[str], key: str, folder: Path) -> None:
        """Recalibrate, repair, fine-tune; the weights and the accuracies go into a folder."""
        stitch, train = self.settings.stitch, self.train
        stitched = self._accuracy(student)
        if stitch.recalibrate_batches and paths:
            number = stitch.recalibrate_batches
            students.recalibrate(student, train, num_batches=number, batch_size=_BATCH)
        students.repair(
            student,
            self.teacher,
            paths,
            train,
            stitch.repair,
            folder / "repair.jsonl",
            val=self.val,
        )
        repaired = self._accuracy(student)
        checkpoint = self.folder / f"finetune-{key}.pt"
        done = students.finetune(
            student,
            self.teacher,
            train,
            self.val,
            self.settings.finetune,
            folder / "finetune.jsonl",
            checkpoint,
        )
        save_tensors(folder / WEIGHTS, student.state_dict())
        accuracies = _Made(stitched=stitched, repaired=repaired, finetuned=done.val_accuracy)
        write_json(folder / _RECORD, accuracies)
        checkpoint.unlink(missing_ok=True)

    def _accuracy(self, model: Classifier) -> float:
        return predict(model, self.val, batch_size=_BATCH).accuracy

    def _key(self, trainees: Mapping[str, str]) -> str:
        settings = self.settings
        return digest_of(
            {
                "algorithm": _ALGORITHM,
                "teacher": self.card.digest,
                "data": self.card.data_digest,
                "augment": settings.augment,
                "trainees": trainees,
                "stitch": settings.stitch.model_dump(include={"recalibrate_batches", "repair"}),
                "finetune": settings.finetune,
                "seed": settings.seed,
            }
        )


def _name(trainee: TraineeSpec) -> tuple[str, str]:
    return trainee.block, candidate_name(trainee.config)


def _damage(store: Store, trainee: TraineeSpec) -> Damage:
    return Damage.model_validate(read_json(store.path(SCORES, trainee.score_key) / SCORE))
