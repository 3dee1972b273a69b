"""The one end-to-end training loop: teachers learn from labels with it, students from teachers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pbkd.data.batches import Batch, Stream
from pbkd.errors import TrainingError
from pbkd.models.inference import predict

_log = logging.getLogger(__name__)

_BATCH = 256

Loss = Callable[[Batch, Tensor], Tensor]
"""(batch, the model's logits (B, K)) to a scalar."""


@dataclass(frozen=True)
class EpochRecord:
    """One line of a training's history; the loss is the mean over the epoch's steps."""

    epoch: int
    train_loss: float
    val_accuracy: float


def fit(
    model: nn.Module,
    train: Stream,
    val: Stream,
    loss: Loss,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    history: Path,
) -> float:
    """Train in place with SGD, Nesterov momentum and a one-cycle schedule; keep the best weights.

    The best weights are those with the highest validation accuracy, the first ones included; of
    equal ones the last.

    Args:
        lr: peak learning rate, at a quarter of the steps.
        history: file of JSON lines, one ``EpochRecord`` per epoch.

    Returns:
        The validation accuracy of the weights that were kept, 0 to 1.

    Raises:
        TrainingError: the loss is not finite.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    num_steps = epochs * sum(1 for _ in train.rows(0, batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=lr,
        total_steps=max(num_steps + 1, 5),  # at 4, a quarter is one step: it divides by zero
        pct_start=0.25,
    )
    history.write_text("")
    best_accuracy, best_state = predict(model, val, batch_size=_BATCH).accuracy, _copy(model)
    for epoch in range(epochs):
        model.train()
        losses = []
        for batch in train.epoch(epoch, batch_size):
            step_loss = loss(batch, model(batch.images_nchw))
            optimizer.zero_grad(set_to_none=True)
            step_loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(step_loss.detach())
        train_loss = float(torch.stack(losses).mean())
        if not math.isfinite(train_loss):
            raise TrainingError(
                f"epoch {epoch}: the training loss is {train_loss}; lower `lr` (now {lr:g})"
            )
        accuracy = predict(model, val, batch_size=_BATCH).accuracy
        with history.open("a") as file:
            file.write(json.dumps(asdict(EpochRecord(epoch, train_loss, accuracy))) + "\n")
        _log.info("epoch %d: loss %.4f, accuracy %.4f", epoch, train_loss, accuracy)
        if accuracy >= best_accuracy:
            best_accuracy, best_state = accuracy, _copy(model)
    model.load_state_dict(best_state)
    model.eval()
    return best_accuracy


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
