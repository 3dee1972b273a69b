"""What a training is watched for: divergence and plateaus."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

_log = logging.getLogger(__name__)

_EXPLODED = 4.0
_COLLAPSED = 0.5


@dataclass(frozen=True)
class Guard:
    """When a training is given up, and how often it may begin again.

    A training diverges if a logit or loss is not finite; if the mean loss of some steps is over
    four times that of the first step and of equal logits for all classes; or if, once the schedule
    has risen, the validation accuracy falls below half of that of the first weights.

    Attributes:
        patience: epochs without a better validation accuracy before training stops; counted among
            those that end after the rise, where a dip is no plateau; None: it never stops.
        restarts: a diverging training begins again with its first weights at a quarter of the rate,
            so often.
    """

    patience: int | None = None
    restarts: int = 0


class DivergedError(Exception):
    """Ends an attempt; the message says what was seen. ``pbkd.models.training`` lets none out."""


@dataclass
class Watch:
    """What one attempt at a training has shown so far; plain values, for checkpoints.

    Attributes:
        start_accuracy: validation accuracy of the first weights.
        max_loss: over which the loss has exploded; None: not known, nothing is watched but numbers
            that are not finite.
        best_accuracy: of the epochs after the rise.
        num_worse: epochs since then.
    """

    start_accuracy: float
    max_loss: float | None = None
    best_accuracy: float = -1.0
    num_worse: int = 0

    def first_loss(self, loss: float, equal_logits: float) -> None:
        """Take the first step's loss, and that of equal logits, for the scale."""
        self.max_loss = _EXPLODED * max(loss, equal_logits)

    def check_loss(self, mean: float) -> None:
        """Raise DivergedError if the mean loss of the last steps is out of all bounds."""
        if not math.isfinite(mean):
            raise DivergedError(f"the training loss is {mean}")
        if self.max_loss is not None and mean > self.max_loss:
            raise DivergedError(
                f"the training loss is {mean:.3g}, over {_EXPLODED:g} times that of the first step "
                "and of equal logits"
            )

    def check_accuracy(self, accuracy: float, *, has_risen: bool) -> None:
        """Raise DivergedError if an epoch's validation accuracy (NaN: of no number) collapsed."""
        if math.isnan(accuracy):
            raise DivergedError("the validation logits are not finite")
        if has_risen and accuracy < _COLLAPSED * self.start_accuracy:
            raise DivergedError(
                f"the validation accuracy is {accuracy:.4f}, below {_COLLAPSED:g} times the "
                f"{self.start_accuracy:.4f} of the first weights"
            )

    def is_plateau(self, accuracy: float, patience: int) -> bool:
        """Count an epoch after the rise; whether ``patience`` of them brought nothing better."""
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.num_worse = accuracy, 0
        else:
            self.num_worse += 1
        if self.num_worse < patience:
            return False
        _log.info("no better accuracy for %d epochs", patience)
        return True
