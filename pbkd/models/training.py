"""The one end-to-end training loop: teachers learn from labels with it, students from teachers."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pbkd.artifacts import atomic_path
from pbkd.config import Section
from pbkd.data.batches import Batch, Stream
from pbkd.devices import enough_memory
from pbkd.errors import TrainingError
from pbkd.models.inference import predict
from pbkd.seeding import derive_seed

_log = logging.getLogger(__name__)

_BATCH = 256
_CHECKPOINT_EVERY_S = 10.0

Loss = Callable[[Batch, Tensor], Tensor]
"""(batch, the model's logits (B, K) float32) to a scalar."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the fields are those of the parameters' sections."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    mixed_precision: bool = False

    @classmethod
    def of(cls, section: Section) -> Recipe:
        """The recipe that a section of params.yaml holds; what it lacks is as above."""
        return cls(**section.model_dump(include={field.name for field in fields(cls)}))


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
    recipe: Recipe,
    *,
    history: Path,
    checkpoint: Path | None = None,
) -> float:
    """Train in place and keep the best weights.

    The best weights are those with the highest validation accuracy, the first ones included; of
    equal ones the last. Each epoch draws from its own seed, so that a training that goes on from a
    checkpoint ends as one that was never stopped.

    Args:
        history: file of JSON lines, one ``EpochRecord`` per epoch.
        checkpoint: file to go on from, written every few seconds at the end of an epoch; its name
            must tell trainings apart. The caller deletes it once the weights are safe.

    Returns:
        The validation accuracy of the weights that were kept, 0 to 1.

    Raises:
        TrainingError: the loss is not finite, or a batch does not fit into memory.
    """
    with enough_memory(f"a batch of {recipe.batch_size} images", "lower `batch_size`"):
        run = _Run(model, train, val, loss, recipe)
        if checkpoint is not None:
            run.resume(checkpoint)
        history.write_text(run.history)
        began_at = saved_at = time.monotonic()
        while run.next_epoch < recipe.epochs:
            run.epoch()
            history.write_text(run.history)
            now, is_last = time.monotonic(), run.next_epoch == recipe.epochs
            since = began_at if is_last else saved_at
            if checkpoint is not None and now - since >= _CHECKPOINT_EVERY_S:
                run.save(checkpoint)
                saved_at = now
        return run.finish()


class _Run:
    """The state of one training, whole in a checkpoint."""

    def __init__(
        self, model: nn.Module, train: Stream, val: Stream, loss: Loss, recipe: Recipe
    ) -> None:
        self.model, self.train, self.val = model, train, val
        self.loss, self.recipe = loss, recipe
        self.optimizer = _optimizer(model, recipe)
        num_steps = recipe.epochs * sum(1 for _ in train.rows(0, recipe.batch_size))
        self.schedule = _schedule(self.optimizer, recipe, num_steps)
        self.next_epoch = 0
        self.history = ""
        self.best_accuracy = predict(model, val, batch_size=_BATCH).accuracy
        self.best_state = _copy(model)

    def epoch(self) -> None:
        """Train through the data once, and look at the validation split."""
        number = self.next_epoch
        gpus = [torch.cuda.current_device()] if self.train.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):  # dropout draws
            torch.manual_seed(derive_seed(self.train.seed, "fit", number))
            self.model.train()
            batches = self.train.epoch(number, self.recipe.batch_size)
            losses = [self._step(batch) for batch in batches]
        train_loss = float(torch.stack(losses).mean())
        if not math.isfinite(train_loss):
            raise TrainingError(
                f"epoch {number}: the training loss is {train_loss}; lower `lr` "
                f"(now {self.recipe.lr:g})"
            )
        accuracy = predict(self.model, self.val, batch_size=_BATCH).accuracy
        self.history += json.dumps(asdict(EpochRecord(number, train_loss, accuracy))) + "\n"
        _log.info("epoch %d: loss %.4f, accuracy %.4f", number, train_loss, accuracy)
        if accuracy >= self.best_accuracy:
            self.best_accuracy, self.best_state = accuracy, _copy(self.model)
        self.next_epoch += 1

    def finish(self) -> float:
        """Put the best weights in; returns their validation accuracy."""
        self.model.load_state_dict(self.best_state)
        self.model.eval()
        return self.best_accuracy

    def save(self, path: Path) -> None:
        """Write all that is needed to go on, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(self._content(), buffer)  # into a file, it would hide why it fails
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def _content(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "next_epoch": self.next_epoch,
            "history": self.history,
            "best_accuracy": self.best_accuracy,
            "best_state": self.best_state,
        }

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint if there is one; a damaged one is left aside."""
        if not path.is_file():
            return
        try:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  a damaged file makes torch raise anything
            _log.warning("checkpoint %s is damaged (%s); beginning again", path, error)
            return
        if not isinstance(content, dict) or content.keys() != self._content().keys():
            _log.warning("checkpoint %s is of another version; beginning again", path)
            return
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        device = next(self.model.parameters()).device
        self.next_epoch, self.history = content["next_epoch"], content["history"]
        self.best_accuracy = content["best_accuracy"]
        self.best_state = {name: t.to(device) for name, t in content["best_state"].items()}
        _log.info("going on after epoch %d", self.next_epoch - 1)

    def _step(self, batch: Batch) -> Tensor:
        device_type = batch.images_nchw.device.type
        mixed = self.recipe.mixed_precision and device_type == "cuda"
        with torch.autocast(device_type, torch.bfloat16, enabled=mixed):
            logits_nk = self.model(batch.images_nchw)
        step_loss = self.loss(batch, logits_nk.float())
        self.optimizer.zero_grad(set_to_none=True)
        step_loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        return step_loss.detach()


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    lr, weight_decay = recipe.lr, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )


def _schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(num_steps, 1))
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.lr,
        total_steps=max(num_steps + 1, 5),  # at 4, a quarter is one step: it divides by zero
        pct_start=0.25,
        cycle_momentum=recipe.optimizer == "sgd",  # adamw: left at its betas
    )


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
