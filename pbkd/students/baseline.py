"""The baselines of a student: its architecture with random weights, trained for equal seconds.

``scratch`` learns from the labels alone, ``distill`` from the teacher's logits as fine-tuning does.
Both follow the recipe with which the teacher was trained. How many steps fit into the seconds is
measured beforehand, so that the schedule ends when they are over.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from pbkd.artifacts import read_json, write_json
from pbkd.blocks import build_candidate, swap
from pbkd.config import FinetuneConfig, TeacherConfig
from pbkd.data.batches import Batch, Stream
from pbkd.models import Classifier, ModelCard, Recipe, build_classifier
from pbkd.models.guard import Guard
from pbkd.models.run import Loss
from pbkd.models.training import Pace, fit_guarded, measure_pace
from pbkd.seeding import derive_seed
from pbkd.students.finetune import distilling

_log = logging.getLogger(__name__)

_MIN_TIMED_S, _MAX_TIMED_S, _TIMED_SHARE = 0.3, 20.0, 0.02

BaselineKind = Literal["scratch", "distill"]


class Baseline(BaseModel):
    """How a baseline's training ended, as ``baseline.json`` says it.

    Attributes:
        val_accuracy: of the best epoch's weights, 0 to 1.
        epochs: passes over the training split; the last may have been cut short.
        num_steps: optimizer steps, chosen before the training.
        device_s: seconds that the student took, and that the baseline was given.
        duration_s: seconds that it took.
    """

    model_config = ConfigDict(frozen=True)

    kind: BaselineKind
    val_accuracy: float
    epochs: int
    num_steps: int
    device_s: float
    duration_s: float


def random_student(card: ModelCard, seed: int) -> Classifier:
    """A student's architecture with fresh weights, by PyTorch's or the network's own rules.

    Raises:
        TeacherError: the network is the user's own, and cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "baseline"))
        model = build_classifier(card, allow_code=True)
        modules = {
            path: build_candidate(config, model.net.get_submodule(path))
            for path, config in card.replacements.items()
        }
    swap(model.net, modules)
    return model.requires_grad_(True)


def scratch_recipe(config: TeacherConfig) -> TeacherConfig:
    """How random weights are trained: as the teacher's were, or by the section's defaults.

    A teacher that was loaded has a recipe that suits its weights, not random ones.
    """
    return config if config.weights is None else TeacherConfig()


def train_baseline(
    kind: BaselineKind,
    model: Classifier,
    teacher: Classifier,
    train: Stream,
    val: Stream,
    config: FinetuneConfig,
    recipe: TeacherConfig,
    device_s: float,
    history: Path,
    checkpoint: Path | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> Baseline:
    """Train in place for about so many seconds; the model ends with its best epoch's weights.

    Args:
        config: temperature, share of the labels, and restarts.
        recipe: optimizer, rate, batch size and label smoothing; see ``scratch_recipe``.
        device_s: at least so long, if steps go on taking what they took when they were timed.
        checkpoint: file to go on from; the number of steps is kept beside it.

    Raises:
        TrainingError: a batch does not fit into memory.
    """
    loss = distilling(teacher, config) if kind == "distill" else _from_labels(recipe)
    per_epoch = sum(1 for _ in train.rows(0, recipe.batch_size))
    steps = _kept(checkpoint)
    if steps is None:
        timed_s = min(max(_MIN_TIMED_S, _TIMED_SHARE * device_s), _MAX_TIMED_S)
        pace = measure_pace(model, train, val, loss, Recipe.of(recipe), timed_s)
        steps = steps_within(device_s, pace, per_epoch)
    if checkpoint is not None:
        write_json(_steps_path(checkpoint), steps)
    _log.info("baseline %s: %d steps for %.1f s", kind, steps, device_s)
    fitted = fit_guarded(
        model,
        train,
        val,
        loss,
        replace(Recipe.of(recipe), num_steps=steps),
        Guard(patience=None, restarts=config.restarts),
        history=history,
        checkpoint=checkpoint,
        after_step=after_step,
    )
    return Baseline(
        kind=kind,
        val_accuracy=fitted.val_accuracy,
        epochs=fitted.epochs,
        num_steps=steps,
        device_s=device_s,
        duration_s=fitted.duration_s,
    )


def steps_within(device_s: float, pace: Pace, steps_per_epoch: int) -> int:
    """The fewest steps, 1 or more, that take at least ``device_s`` seconds.

    The validations before the first step and after each epoch, a shorter last one's too, count.
    """
    epoch_s = steps_per_epoch * pace.step_s + pace.validation_s
    left_s = max(device_s - pace.validation_s, 0.0)
    epochs = math.floor(left_s / epoch_s)
    rest_s = left_s - epochs * epoch_s
    steps = math.ceil((rest_s - pace.validation_s) / pace.step_s)
    more = min(max(steps, 1), steps_per_epoch) if rest_s > 0 else 0
    return max(epochs * steps_per_epoch + more, 1)


def forget(checkpoint: Path) -> None:
    """Remove a checkpoint of ``train_baseline`` and what lies beside it."""
    checkpoint.unlink(missing_ok=True)
    _steps_path(checkpoint).unlink(missing_ok=True)


def _from_labels(recipe: TeacherConfig) -> Loss:
    def loss(batch: Batch, logits_nk: Tensor) -> Tensor:
        smoothing = recipe.label_smoothing
        return F.cross_entropy(logits_nk, batch.labels_n, label_smoothing=smoothing)

    return loss


def _steps_path(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".steps.json")


def _kept(checkpoint: Path | None) -> int | None:
    """The number of steps of a training that was begun before."""
    if checkpoint is None or not checkpoint.is_file() or not _steps_path(checkpoint).is_file():
        return None
    return int(read_json(_steps_path(checkpoint)))
