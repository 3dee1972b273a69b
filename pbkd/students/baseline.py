"""The baselines of a student: its architecture with random weights, trained for equal seconds.

``scratch`` learns from the labels alone, ``distill`` from the teacher's logits as fine-tuning does.
Both follow the recipe with which the teacher was trained; its schedule follows the clock, so that
it ends when the seconds are over, whatever a step takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from pbkd.blocks import build_candidate, swap
from pbkd.config import FinetuneConfig, TeacherConfig
from pbkd.data.batches import Batch, Stream
from pbkd.models import Classifier, ModelCard, Recipe, build_classifier
from pbkd.models.guard import Guard
from pbkd.models.run import Loss
from pbkd.models.training import fit_guarded
from pbkd.seeding import derive_seed
from pbkd.students.finetune import distilling

_log = logging.getLogger(__name__)

BaselineKind = Literal["scratch", "distill"]


class Baseline(BaseModel):
    """How a baseline's training ended, as ``baseline.json`` says it.

    Attributes:
        val_accuracy: of the best epoch's weights, 0 to 1.
        epochs: passes over the training split; the last may have been cut short.
        device_s: seconds that the student took, and that the baseline was given.
        duration_s: seconds that it took.
    """

    model_config = ConfigDict(frozen=True)

    kind: BaselineKind
    val_accuracy: float
    epochs: int
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
    """Train in place for so many seconds; the model ends with its best epoch's weights.

    Args:
        config: temperature, share of the labels, and restarts.
        recipe: optimizer, rate, batch size and label smoothing; see ``scratch_recipe``.
        device_s: seconds, validations included.
        checkpoint: file to go on from; the seconds before it count.

    Raises:
        TrainingError: a batch does not fit into memory.
    """
    loss = distilling(teacher, config) if kind == "distill" else _from_labels(recipe)
    _log.info("baseline %s: %.1f s", kind, device_s)
    fitted = fit_guarded(
        model,
        train,
        val,
        loss,
        replace(Recipe.of(recipe), seconds=device_s),
        Guard(patience=None, restarts=config.restarts),
        history=history,
        checkpoint=checkpoint,
        after_step=after_step,
    )
    return Baseline(
        kind=kind,
        val_accuracy=fitted.val_accuracy,
        epochs=fitted.epochs,
        device_s=device_s,
        duration_s=fitted.duration_s,
    )


def _from_labels(recipe: TeacherConfig) -> Loss:
    def loss(batch: Batch, logits_nk: Tensor) -> Tensor:
        smoothing = recipe.label_smoothing
        return F.cross_entropy(logits_nk, batch.labels_n, label_smoothing=smoothing)

    return loss
