"""A block phase of seconds: six trainees that end at different epochs, on every source."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pbkd.artifacts import Store, load_tensors, read_json
from pbkd.config import DistillConfig, SeparableConfig
from pbkd.distill import SCORES, TRAINEES, TraineeSpec, TrainingJob, train_and_score
from pbkd.distill.score import SCORE
from pbkd.distill.trainee import HISTORY, RESULT, WEIGHTS, read_history
from pbkd.testing import random_split
from tests.activations.cached import NUM_TRAIN, NUM_VAL, VGG_PATHS, Setup, vgg

CUT = "features.7"
BATCHES_PER_EPOCH = NUM_TRAIN // 5
DISTILL = DistillConfig(epochs=5, batch_size=5, lr=5e-3, patience=2, min_improvement=0.02)
CANDIDATES = (SeparableConfig(), SeparableConfig(depth=2, batch_norm=True, init="random"))
TIMES = {"time", "started_at", "finished_at"}

Outcome = dict[str, tuple[dict[str, Tensor], object, object, object]]
"""Trainee to weights, history, result and score, without times."""


class SmallJob:
    """The trainees, their job on one source, and what came out of it.

    Args:
        source: cache, relay, or cut: a relay from a cached input on.
    """

    def __init__(self, folder: Path, source: str, distill: DistillConfig = DISTILL) -> None:
        self.folder = folder
        self.setup = Setup(folder, vgg(), VGG_PATHS)
        self.trainees = [
            TraineeSpec.make(block, config, number, self.setup.card, distill, {"seed": 0})
            for block in VGG_PATHS
            for number, config in enumerate(CANDIDATES)
            if source != "cut" or block != "features.3"
        ]
        self.job = TrainingJob(
            job_id="small",
            trainees=tuple(self.trainees),
            source="cache" if source == "cache" else "relay",
            start=CUT if source == "cut" else None,
            cuts={CUT: CUT} if source == "cut" else {},
            activations=self.setup.config,
            distill=distill,
            seed=0,
            store=self.setup.store.root,
            progress=folder / "progress",
            checkpoints=folder / "checkpoints",
        )
        if source == "cut":
            self.setup.cut_at(CUT)
        if source != "relay":
            self.setup.fill()

    def run(self, trainees: Iterable[TraineeSpec] | None = None, source: str | None = None) -> None:
        """Run the job, or one of some of its trainees."""
        changes: dict[str, object] = {}
        if trainees is not None:
            changes["trainees"] = tuple(trainees)
        if source is not None:
            changes["source"] = source
        job = self.job.model_copy(update=changes)
        splits = random_split(NUM_TRAIN, seed=0), random_split(NUM_VAL, seed=1)
        train_and_score(job, self.setup.teacher, self.setup.card, *splits)

    def checkpoint(self, trainee: TraineeSpec) -> Path:
        return self.job.checkpoints / f"{trainee.key}.pt"

    def checkpoints(self) -> list[Path]:
        return sorted(self.job.checkpoints.glob("*"))

    def outcome(self) -> Outcome:
        """What the store holds of all trainees."""
        return {trainee.name: _outcome(self.setup.store, trainee) for trainee in self.trainees}


def _outcome(
    store: Store, trainee: TraineeSpec
) -> tuple[dict[str, Tensor], object, object, object]:
    item = store.path(TRAINEES, trainee.key)
    history = [line.model_dump(exclude=TIMES) for line in read_history(item / HISTORY)]
    result = {name: value for name, value in read_json(item / RESULT).items() if name not in TIMES}
    score = read_json(store.path(SCORES, trainee.score_key) / SCORE)
    return load_tensors(item / WEIGHTS), history, result, score


def assert_equal(found: Outcome, expected: Outcome) -> None:
    """Compare, bit for bit."""
    assert found.keys() == expected.keys()
    for name, (weights, *others) in expected.items():
        assert found[name][1:] == tuple(others), name
        assert found[name][0].keys() == weights.keys()
        for tensor, value in weights.items():
            assert torch.equal(found[name][0][tensor], value), f"{name}: {tensor}"
