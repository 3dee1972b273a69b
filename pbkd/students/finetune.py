"""End-to-end distillation of a student from its teacher's logits and the labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from pbkd.config import DistillationConfig, FinetuneConfig
from pbkd.data.batches import Batch, Stream
from pbkd.distill import distillation_loss
from pbkd.elastic.soft_labels import SoftLabels
from pbkd.elastic.stream import LabelStream
from pbkd.models import Classifier, Recipe
from pbkd.models.guard import Guard
from pbkd.models.run import Loss
from pbkd.models.training import fit_guarded

Teacher = Classifier | SoftLabels | LabelStream
"""Whom a student asks: the model itself, its kept labels, or elastic teachers."""


class Finetuned(BaseModel):
    """How a fine-tuning ended, as ``finetune.json`` says it.

    Attributes:
        val_accuracy: of the weights that were kept, 0 to 1.
        epochs: finished ones, those of diverging attempts included.
        stopped: all epochs done, no better accuracy, or no restart left.
        restarts: how often it began again at a quarter of the rate.
        duration_s: of the training and its validation, on its device; of kept labels that it read
            the labelling, too, though others may have read them as well.
        num_lacking: images that it saw without a label of the teacher, as elastic ones were gone.
    """

    model_config = ConfigDict(frozen=True)

    val_accuracy: float
    epochs: int
    stopped: Literal["epochs", "plateau", "diverged"]
    restarts: int
    duration_s: float
    num_lacking: int = 0


def finetune(
    student: Classifier,
    teacher: Teacher,
    train: Stream,
    val: Stream,
    config: FinetuneConfig,
    history: Path,
    checkpoint: Path | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> Finetuned:
    """Train the student in place; it ends with the weights of the best validation accuracy.

    Those with which it came in count, so that it never ends worse. See ``Guard`` for when it stops
    or begins again.

    Args:
        teacher: on the student's device, or its kept labels for the views of ``train``.
        history: file of JSON lines, one per epoch.
        checkpoint: file to go on from; see ``fit``.
        after_step: called after each step, as a sign of life.

    Raises:
        TrainingError: a batch does not fit into memory.
    """
    fitted = fit_guarded(
        student,
        train,
        val,
        distilling(teacher, config),
        Recipe.of(config),
        Guard(config.patience, config.restarts),
        history=history,
        checkpoint=checkpoint,
        after_step=after_step,
    )
    return Finetuned(**vars(fitted))


def distilling(teacher: Teacher, config: DistillationConfig) -> Loss:
    """The loss of distillation from a teacher's logits and, by their share, from labels."""
    ask = _asking(teacher) if isinstance(teacher, Classifier) else teacher

    def loss(batch: Batch, logits_nk: Tensor) -> Tensor:
        hard = F.cross_entropy(logits_nk, batch.labels_n)
        teacher_logits_nk = ask(batch)
        if teacher_logits_nk is None:
            return hard
        soft = distillation_loss(logits_nk, teacher_logits_nk, config.temperature)
        return (1 - config.label_weight) * soft + config.label_weight * hard

    return loss


def _asking(teacher: Classifier) -> Callable[[Batch], Tensor]:
    teacher.eval()

    @torch.no_grad()
    def ask(batch: Batch) -> Tensor:
        logits_nk: Tensor = teacher(batch.images_nchw)
        return logits_nk

    return ask
