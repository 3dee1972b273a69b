"""The job that makes one student: stitch the chosen candidates in, recalibrate, repair.

Its item in the store holds nothing of the student's budget: students of equal choices share it.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from pbkd.artifacts import Store, load_tensors, write_json
from pbkd.config import CandidateConfig, RepairConfig
from pbkd.data import Stream, load_prepared
from pbkd.devices import best_device, enough_memory
from pbkd.distill import damage_kl
from pbkd.distill.trainee import WEIGHTS
from pbkd.errors import disk_errors_explained
from pbkd.measure import count_macs, num_parameters
from pbkd.models import Classifier, ModelCard, Predictions, load_teacher, predict, save_model
from pbkd.models.checkpoint import WEIGHTS as MODEL_WEIGHTS
from pbkd.students import ChosenStudent, Figures, recalibrate, repair, stitch

_log = logging.getLogger(__name__)

REPAIRED = "repaired"
"""Kind of the store's items."""
RECORD = "repaired.json"
HISTORY = "repair.jsonl"

_BATCH = 256


class Candidate(BaseModel):
    """A trained candidate: what it is, and the folder of its weights."""

    model_config = ConfigDict(frozen=True)

    config: CandidateConfig
    folder: Path


class RepairJob(BaseModel):
    """One stitched student; paths are absolute.

    Attributes:
        key: of the item that it puts into the store.
        students: those that it makes; several where budgets led to equal choices. They do not
            change the item.
        latency_ms: of whole students, by name, and of the ``teacher``; empty where not limited.
        replacements: block path to the candidate that comes there.
        score_images: validation images for the damage, at most.
        progress: folder for the file that is touched.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    students: tuple[ChosenStudent, ...]
    latency_ms: dict[str, float]
    replacements: dict[str, Candidate]
    recalibrate_batches: int
    repair: RepairConfig
    score_images: int
    seed: int
    teacher: Path
    prepared: Path
    store: Path
    progress: Path

    @property
    def heartbeat(self) -> Path:
        """A file that the job touches while it is alive."""
        return self.progress / f"{self.key}.alive"


class Repaired(BaseModel):
    """What ``repaired.json`` says of a stitched student, whatever its budget.

    Attributes:
        teacher, figures: measured; without latency.
        damage: KL(teacher || stitched student) before recalibration, nats; null: not finite.
        teacher_val_accuracy: on the validation split, 0 to 1; the others after each step.
        repair_s: seconds of recalibration and repair on the device.
    """

    model_config = ConfigDict(frozen=True)

    teacher: Figures
    figures: Figures
    damage: float | None
    teacher_val_accuracy: float
    stitched_val_accuracy: float
    recalibrated_val_accuracy: float
    repaired_val_accuracy: float
    repair_s: float


def run_repair(job: RepairJob) -> None:
    """Make a student and put it into the store; returns at once if it is there.

    Raises:
        PbkdError: a model or the data cannot be read, or memory or disk are full.
    """
    store = Store(job.store)
    if store.has(REPAIRED, job.key):
        return
    job.progress.mkdir(parents=True, exist_ok=True)
    with disk_errors_explained(), enough_memory(f"batches of {_BATCH} images", "free some memory"):
        store.put(REPAIRED, job.key, partial(_write_student, job))


def _write_student(job: RepairJob, folder: Path) -> None:
    teacher, card = load_teacher(job.teacher, allow_code=True)
    maker = _Maker(job, teacher.to(best_device()), card)
    job.heartbeat.touch()
    student = maker.stitched()
    expected = maker.predictions(teacher)
    stitched = maker.predictions(student)
    recalibrate_s = maker.recalibrate(student)
    recalibrated = maker.predictions(student)
    repair_s = maker.repair(student, folder / HISTORY)
    repaired = maker.predictions(student)
    replacements = {path: candidate.config for path, candidate in job.replacements.items()}
    student.cpu()
    save_model(folder, student, card.model_copy(update={"replacements": replacements}))
    teacher_bytes = (job.teacher / MODEL_WEIGHTS).stat().st_size
    record = Repaired(
        teacher=_figures(teacher.cpu(), card, teacher_bytes),
        figures=_figures(student, card, (folder / MODEL_WEIGHTS).stat().st_size),
        damage=maker.damage(expected, stitched),
        teacher_val_accuracy=expected.accuracy,
        stitched_val_accuracy=stitched.accuracy,
        recalibrated_val_accuracy=recalibrated.accuracy,
        repaired_val_accuracy=repaired.accuracy,
        repair_s=recalibrate_s + repair_s,
    )
    write_json(folder / RECORD, record)


class _Maker:
    """The teacher and the data of one job on the worker's device."""

    def __init__(self, job: RepairJob, teacher: Classifier, card: ModelCard) -> None:
        self.job, self.teacher = job, teacher
        prepared = load_prepared(job.prepared)
        self.train, self.val = (
            Stream(prepared.split(name), seed=job.seed, augment=card.augment, device=best_device())
            for name in ("train", "val")
        )

    def stitched(self) -> Classifier:
        """The teacher with the trained candidates in place, on the device."""
        return stitch(
            self.teacher,
            {path: candidate.config for path, candidate in self.job.replacements.items()},
            {
                path: load_tensors(candidate.folder / WEIGHTS)
                for path, candidate in self.job.replacements.items()
            },
        ).to(best_device())

    def predictions(self, model: Classifier) -> Predictions:
        """On the validation split."""
        return predict(model, self.val, batch_size=_BATCH, after_batch=self.job.heartbeat.touch)

    def damage(self, expected: Predictions, found: Predictions) -> float | None:
        """On the images on which candidates are scored, nats; None where it is not finite."""
        limit = self.job.score_images
        kl = damage_kl(expected.logits_nk[:limit], found.logits_nk[:limit])
        return float(kl) if kl.isfinite() else None

    def recalibrate(self, student: Classifier) -> float:
        """Returns the seconds that it took."""
        num_batches = self.job.recalibrate_batches
        began_s = time.perf_counter()
        if num_batches and self.job.replacements:
            recalibrate(
                student,
                self.train,
                num_batches=num_batches,
                batch_size=_BATCH,
                after_batch=self.job.heartbeat.touch,
            )
        return _since(began_s)

    def repair(self, student: Classifier, history: Path) -> float:
        """Returns the seconds that it took."""
        began_s = time.perf_counter()
        repair(
            student,
            self.teacher,
            list(self.job.replacements),
            self.train,
            self.job.repair,
            history,
            self.job.heartbeat.touch,
            val=self.val,
        )
        return _since(began_s)


def _since(began_s: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


def _figures(model: Classifier, card: ModelCard, file_bytes: int) -> Figures:
    image = torch.zeros(1, card.network.in_channels, *card.image_size)
    return Figures(
        parameters=num_parameters(model), macs=count_macs(model, image), bytes=file_bytes
    )
