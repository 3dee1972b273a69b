"""What one worker does in one go: train some trainees on one source, then score them.

A job gets paths and plain values and writes files; it knows no orchestrator. What the store holds
already is not done again, and what a killed job was in goes on from its checkpoints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pbkd.activations import (
    CacheSource,
    Capture,
    RelaySource,
    Resume,
    ResumedSource,
    Side,
    Source,
    activation_stream,
    as_shown,
    both_sides,
    cache_keys,
)
from pbkd.artifacts import Store, digest_of, load_tensors, save_tensors, write_json
from pbkd.blocks import build_candidate, init_candidate
from pbkd.config import ActivationsConfig, DistillConfig
from pbkd.data import Split, Stream, load_prepared
from pbkd.devices import best_device, enough_memory
from pbkd.distill.checkpoint import Checkpoints
from pbkd.distill.score import SCORE, SCORE_BATCH, Damage, score
from pbkd.distill.steps import Steps
from pbkd.distill.timing import warm_up
from pbkd.distill.trainee import WEIGHTS, Trainee, TraineeSpec
from pbkd.errors import disk_errors_explained
from pbkd.models import Classifier, ModelCard, Predictions, load_teacher, predict

_log = logging.getLogger(__name__)

TRAINEES = "trainees"
SCORES = "scores"
PREDICTIONS = "predictions"
_LOGITS = "logits.safetensors"


class TrainingJob(BaseModel):
    """What is to be trained, and how.

    Attributes:
        start: block with whose cached cut a relay begins; None: with the images.
        cuts: block to the module whose input that cut is.
        progress: folder for histories that grow.
        checkpoints: folder from whose files unfinished trainees go on; other jobs may share it.
    """

    model_config = ConfigDict(frozen=True)

    job_id: str
    trainees: tuple[TraineeSpec, ...]
    source: Literal["cache", "relay"]
    start: str | None = None
    cuts: dict[str, str] = {}
    activations: ActivationsConfig
    distill: DistillConfig
    seed: int
    store: Path
    progress: Path
    checkpoints: Path

    @property
    def heartbeat(self) -> Path:
        """A file that the job touches while it is alive."""
        return self.progress / f"{self.job_id}.alive"


class JobSpec(TrainingJob):
    """A job as plain values; paths are absolute, of the stages' outputs."""

    teacher: Path
    prepared: Path


class JobReport(BaseModel):
    """What a finished job says of itself.

    Attributes:
        trained: names of the trainees that it trained; the others were in the store.
        started_at: seconds since 1970.
        score_s: seconds of ``duration_s`` that went into scores.
    """

    model_config = ConfigDict(frozen=True)

    job_id: str
    trained: tuple[str, ...]
    started_at: float
    duration_s: float
    score_s: float


@dataclass(frozen=True)
class Done:
    """Names of the trainees trained just now, and the seconds that went into scores."""

    trained: tuple[str, ...]
    score_s: float


def run_job(spec: JobSpec) -> JobReport:
    """Train and score a job's trainees; weights, history, result and score go into the store.

    Raises:
        PbkdError: the teacher or the data cannot be read, or the store is damaged.
    """
    warm_up()
    started_at = time.time()
    teacher, card = load_teacher(spec.teacher, allow_code=True)
    prepared = load_prepared(spec.prepared)
    done = train_and_score(spec, teacher, card, prepared.split("train"), prepared.split("val"))
    return JobReport(
        job_id=spec.job_id,
        trained=done.trained,
        started_at=started_at,
        duration_s=time.time() - started_at,
        score_s=done.score_s,
    )


def train_and_score(
    job: TrainingJob, teacher: Classifier, card: ModelCard, train: Split, val: Split
) -> Done:
    """Train and score a job's trainees into the store.

    A trainee that has a checkpoint goes on after the last batch that it had taken by then, and ends
    with the same bits as one that was never stopped. The trainees of a job may stand at different
    batches: it begins with the batch that the last of them needs, and each takes part from its own.

    Raises:
        TrainingError: the batches do not fit into memory.
    """
    store = Store(job.store)
    job.progress.mkdir(parents=True, exist_ok=True)
    what = f"batches of {job.distill.batch_size} images for {len(job.trainees)} candidates"
    with disk_errors_explained(), enough_memory(what, "lower `distill.batch_size`"):
        return _train_and_score(job, _Worker(job, teacher, card, train, val), store)


def _train_and_score(spec: TrainingJob, worker: _Worker, store: Store) -> Done:
    to_train = []
    for trainee in spec.trainees:
        if store.has(TRAINEES, trainee.key):
            worker.checkpoints.remove(trainee.key)  # a kill may have come before that
        else:
            to_train.append(trainee)
    if to_train:
        worker.train(to_train, store)
    start = time.perf_counter()
    to_score = [t for t in spec.trainees if not store.has(SCORES, t.score_key)]
    if to_score:
        worker.score(to_score, store)
    score_s = time.perf_counter() - start
    return Done(tuple(trainee.name for trainee in to_train), score_s)


class _Worker:
    """The teacher and the data of one job on the worker's device."""

    def __init__(
        self, spec: TrainingJob, teacher: Classifier, card: ModelCard, train: Split, val: Split
    ) -> None:
        self.spec = spec
        self.checkpoints = Checkpoints(spec.checkpoints)
        self.device = best_device()
        self.teacher, self.card = teacher.to(self.device), card
        self.train_stream = self._stream(train)
        self.val_stream = self._stream(val)

    def train(self, specs: list[TraineeSpec], store: Store) -> None:
        batch_size, epochs = self.spec.distill.batch_size, self.spec.distill.epochs
        source = self._source(sorted({spec.block for spec in specs}), store)
        steps = epochs * sum(1 for _ in self.train_stream.rows(0, batch_size))
        first = next(iter(source.val({spec.block for spec in specs})))
        trainees = [self._trainee(spec, first[spec.block].input, steps) for spec in specs]
        self._validate([trainee for trainee in trainees if trainee.epoch == -1], source)
        active = self._publish_finished(trainees, store)
        take_steps = Steps()
        for epoch in range(epochs):
            present = [trainee for trainee in active if trainee.epoch == epoch]
            self._train_epoch(epoch, present, source, take_steps)
            self._validate(present, source)
            active = self._publish_finished(active, store)
            self.checkpoints.save_if_due(active)

    def _train_epoch(
        self, epoch: int, trainees: list[Trainee], source: Source, take_steps: Steps
    ) -> None:
        """Give each trainee the batches of an epoch that it has not taken."""
        if not trainees:
            return
        skip = min(trainee.num_taken for trainee in trainees)
        batches = source.epoch(epoch, {trainee.spec.block for trainee in trainees}, skip)
        for index, activations in enumerate(batches, start=skip):
            take_steps([t for t in trainees if t.num_taken == index], activations)
            self.checkpoints.save_if_due(trainees)
            self._beat()

    def score(self, specs: list[TraineeSpec], store: Store) -> None:
        damages = score(
            self.teacher,
            [(spec.block, self._trained(spec, store)) for spec in specs],
            self._teacher_predictions(store),
            self.val_stream,
            SCORE_BATCH,
            self._beat,
        )
        for spec, damage in zip(specs, damages, strict=True):
            store.put(SCORES, spec.score_key, _writer(damage))
        self._beat()

    def _trained(self, spec: TraineeSpec, store: Store) -> nn.Module:
        block = self.teacher.net.get_submodule(spec.block)
        candidate = build_candidate(spec.config, block)
        candidate.load_state_dict(load_tensors(store.path(TRAINEES, spec.key) / WEIGHTS))
        return candidate.to(self.device).eval()

    def _teacher_predictions(self, store: Store) -> Predictions:
        """What the teacher says of the images of the score: computed by the first job that asks."""
        limit = self.spec.distill.score_images
        key = digest_of(
            {"teacher": self.card.digest, "data": self.card.data_digest, "images": limit}
        )
        if not store.has(PREDICTIONS, key):
            found = predict(
                self.teacher,
                self.val_stream,
                batch_size=SCORE_BATCH,
                limit=limit,
                after_batch=self._beat,
            )
            store.put(PREDICTIONS, key, lambda folder: save_tensors(folder / _LOGITS, vars(found)))
            return found  # not from the store: another job may be putting the same
        kept = load_tensors(store.path(PREDICTIONS, key) / _LOGITS)
        return Predictions(**{name: tensor.to(self.device) for name, tensor in kept.items()})

    def _trainee(self, spec: TraineeSpec, x: Tensor, steps: int) -> Trainee:
        return self.checkpoints.resume(lambda: self._new_trainee(spec, x, steps))

    def _new_trainee(self, spec: TraineeSpec, x: Tensor, steps: int) -> Trainee:
        block = self.teacher.net.get_submodule(spec.block)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            module = build_candidate(spec.config, block).to(self.device)
        init_candidate(spec.config, module, block, x.float())
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        progress = self.spec.progress / f"{spec.key}.jsonl"
        return Trainee(spec, module, self.spec.distill, steps, progress)

    def _validate(self, trainees: list[Trainee], source: Source) -> None:
        if not trainees:
            return
        sums: list[list[Tensor]] = [[] for _ in trainees]
        for activations in source.val({trainee.spec.block for trainee in trainees}):
            for trainee, losses in zip(trainees, sums, strict=True):
                losses.append(trainee.batch_loss(activations[trainee.spec.block]))
            self._beat()
        for trainee, losses in zip(trainees, sums, strict=True):
            trainee.end_epoch(float(torch.stack(losses).sum()) / len(self.val_stream))
        self._beat()

    def _publish_finished(self, trainees: list[Trainee], store: Store) -> list[Trainee]:
        """Put those that stopped into the store; returns the others."""
        for trainee in trainees:
            if not trainee.active:
                store.put(TRAINEES, trainee.spec.key, trainee.write)
                self.checkpoints.remove(trainee.spec.key)
                _log.info("trained %s: %s", trainee.spec.name, trainee.stopped)
        return [trainee for trainee in trainees if trainee.active]

    def _source(self, paths: list[str], store: Store) -> Source:
        spec, batch_size = self.spec, self.spec.distill.batch_size
        if spec.source == "cache":
            return self._cache(both_sides(paths), store)
        images = self.val_stream.plain(torch.arange(min(batch_size, len(self.val_stream))))
        dtype = getattr(torch, spec.activations.dtype)
        capture = Capture(self.teacher, paths, images, dtype)
        if spec.start is None:
            return RelaySource(capture, self.train_stream, self.val_stream, batch_size)
        resume = Resume(capture, spec.cuts[spec.start], images)
        return ResumedSource(resume, self._cache([(spec.start, "cut")], store), spec.start)

    def _cache(self, sides: list[tuple[str, Side]], store: Store) -> CacheSource:
        spec = self.spec
        config = as_shown(spec.activations, spec.distill.epochs)
        keys = cache_keys(self.card, config, spec.seed, sides, spec.cuts)
        num_val, batch_size = len(self.val_stream), spec.distill.batch_size
        return CacheSource(store, keys, self.train_stream, num_val, batch_size, self.device)

    def _stream(self, split: Split) -> Stream:
        return activation_stream(
            split, self.card, self.spec.activations, self.spec.seed, self.device
        )

    def _beat(self) -> None:
        self.spec.heartbeat.touch()


def _writer(damage: Damage) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / SCORE, damage)
