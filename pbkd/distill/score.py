"""Damage: how much the teacher suffers when one trained candidate stands in for one block."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict
from torch import nn

from pbkd.blocks import swapped
from pbkd.data.batches import Stream
from pbkd.distill.loss import damage_kl
from pbkd.models import Classifier, Predictions, predict

SCORE = "score.json"


class Damage(BaseModel):
    """Measured on the validation split.

    Attributes:
        kl: mean KL(teacher || teacher with the candidate) in nats; null where it is not finite.
        accuracy_drop: the teacher's accuracy less the accuracy with the candidate, -1 to 1.
        num_images: images used.
    """

    model_config = ConfigDict(frozen=True)

    kl: float | None
    accuracy_drop: float
    num_images: int


def score(
    teacher: Classifier,
    path: str,
    candidate: nn.Module,
    teacher_predictions: Predictions,
    val: Stream,
    batch_size: int,
    after_batch: Callable[[], None] = lambda: None,
) -> Damage:
    """Run the teacher with one block replaced; the teacher is left as it was.

    Args:
        after_batch: called after each batch, as a sign of life.
    """
    num_images = len(teacher_predictions.labels_n)
    with swapped(teacher.net, {path: candidate}):
        predictions = predict(
            teacher, val, batch_size=batch_size, limit=num_images, after_batch=after_batch
        )
    kl = damage_kl(teacher_predictions.logits_nk, predictions.logits_nk)
    return Damage(
        kl=float(kl) if kl.isfinite() else None,
        accuracy_drop=teacher_predictions.accuracy - predictions.accuracy,
        num_images=num_images,
    )
