"""End-to-end distillation of a student from its teacher's logits and the labels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pbkd.config import FinetuneConfig
from pbkd.data.batches import Batch, Stream
from pbkd.distill import distillation_loss
from pbkd.models import Classifier, Recipe, fit


def finetune(
    student: Classifier,
    teacher: Classifier,
    train: Stream,
    val: Stream,
    config: FinetuneConfig,
    history: Path,
    checkpoint: Path | None = None,
) -> float:
    """Train the student in place; it ends with the weights of the best validation accuracy.

    Args:
        history: file of JSON lines, one per epoch.
        checkpoint: file to go on from; see ``fit``.

    Returns:
        That validation accuracy, 0 to 1.

    Raises:
        TrainingError: the loss is not finite.
    """
    teacher.eval()

    def loss(batch: Batch, logits_nk: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits_nk = teacher(batch.images_nchw)
        soft = distillation_loss(logits_nk, teacher_logits_nk, config.temperature)
        hard = F.cross_entropy(logits_nk, batch.labels_n)
        return (1 - config.label_weight) * soft + config.label_weight * hard

    recipe = Recipe.of(config)
    return fit(student, train, val, loss, recipe, history=history, checkpoint=checkpoint)
