"""Damage: how much the teacher suffers when one trained candidate stands in for one block.

Candidates are scored together: per batch of images the teacher runs once, and each candidate costs
no more than the suffix after its block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pbkd.activations import Suffixes
from pbkd.blocks import swapped
from pbkd.config import DistillConfig
from pbkd.data.batches import Stream
from pbkd.distill.loss import damage_kl
from pbkd.measure import eval_mode
from pbkd.models import Classifier, Predictions

SCORE = "score.json"
SCORE_BATCH = 256

_DRY_IMAGES = 2
_TRAINED_PER_SCORED = 25
_ENOUGH_IMAGES = 250


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


def with_score_images(config: DistillConfig, num_train: int, num_val: int) -> DistillConfig:
    """The settings with as many images for the score as the rule of DistillConfig allows.

    They are as given where the rule takes none away, and then so are the keys of scores.
    """
    allowed = max(_ENOUGH_IMAGES, config.epochs * num_train // _TRAINED_PER_SCORED)
    if allowed >= min(config.score_images, num_val):
        return config
    return config.model_copy(update={"score_images": allowed})


def score(
    teacher: Classifier,
    candidates: Sequence[tuple[str, nn.Module]],
    teacher_predictions: Predictions,
    val: Stream,
    batch_size: int,
    after_batch: Callable[[], None] = lambda: None,
) -> list[Damage]:
    """Run the teacher's suffix with one block replaced, for each candidate; bits are the teacher's.

    Args:
        teacher: it is left as it was.
        candidates: path of the block, and what stands in for it, on the teacher's device.
        teacher_predictions: of the first images of ``val``, which are those that are used.
        batch_size: that of the predictions.
        after_batch: called after each batch of each candidate, as a sign of life.
    """
    labels_n = teacher_predictions.labels_n
    with eval_mode(teacher):
        logits_cnk = _logits(teacher, candidates, val, batch_size, len(labels_n), after_batch)
    return [_damage(teacher_predictions, Predictions(x, labels_n)) for x in logits_cnk]


@torch.no_grad()
def _logits(
    teacher: Classifier,
    candidates: Sequence[tuple[str, nn.Module]],
    val: Stream,
    batch_size: int,
    num_images: int,
    after_batch: Callable[[], None],
) -> list[Tensor]:
    """(N, K) float32 logits with each of the candidates."""
    images_nchw = val.plain(torch.arange(_DRY_IMAGES) % len(val))
    suffixes = Suffixes(teacher, dict.fromkeys(path for path, _ in candidates), images_nchw)
    logits: list[list[Tensor]] = [[] for _ in candidates]
    for batch in val.in_order(val.pass_size(batch_size), num_images):
        for start, x in suffixes.inputs(batch.images_nchw):
            for (path, module), found in zip(candidates, logits, strict=True):
                if suffixes.starts[path] == start:
                    with swapped(teacher.net, {path: module}):
                        found.append(suffixes.logits(start, x).float())
                    after_batch()
    return [torch.cat(found) for found in logits]


def _damage(teacher: Predictions, found: Predictions) -> Damage:
    kl = damage_kl(teacher.logits_nk, found.logits_nk)
    return Damage(
        kl=float(kl) if kl.isfinite() else None,
        accuracy_drop=teacher.accuracy - found.accuracy,
        num_images=len(found.labels_n),
    )
