"""A model's logits and accuracy over a stream, in order and without augmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pbkd.data.batches import Stream
from pbkd.measure import eval_mode


@dataclass(frozen=True)
class Predictions:
    """``logits_nk`` (N, K) float32 and ``labels_n`` (N,) int64, on the stream's device."""

    logits_nk: Tensor
    labels_n: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the images whose largest logit is at the label, 0 to 1."""
        return float((self.logits_nk.argmax(1) == self.labels_n).float().mean())


def predict(
    model: nn.Module,
    stream: Stream,
    *,
    batch_size: int,
    limit: int | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> Predictions:
    """Logits of the first ``limit`` images (default: all), in evaluation mode.

    The model is left in the mode in which it was found.

    Args:
        batch_size: at most; see ``Stream.pass_size``.
        after_batch: called after each batch, as a sign of life.
    """
    batch_size = stream.pass_size(batch_size)
    with torch.no_grad(), eval_mode(model):
        batches = []
        for batch in stream.in_order(batch_size, limit):
            batches.append((model(batch.images_nchw).float(), batch.labels_n))
            after_batch()
    logits, labels = zip(*batches, strict=True)
    return Predictions(torch.cat(logits), torch.cat(labels))
