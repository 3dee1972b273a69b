"""The state of one training, whole in a checkpoint, and what it does in an epoch."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pbkd.artifacts import load_checkpoint, save_checkpoint
from pbkd.data.batches import Batch, Stream
from pbkd.devices import autocast
from pbkd.errors import TrainingError
from pbkd.models.guard import DivergedError, Guard, Watch
from pbkd.models.inference import predict
from pbkd.models.recipe import RISE, Recipe, make_optimizer, make_schedule
from pbkd.seeding import derive_seed

_log = logging.getLogger(__name__)

_BATCH = 256
_WINDOW = 50
"""Steps after which the losses are read: rarely, because a GPU must be waited for."""
_SLOWER = 4.0
_CLOCK_STEPS = 10_000
"""Steps of the schedule of a training that is as long as the clock says."""


Loss = Callable[[Batch, Tensor], Tensor]
"""(batch, the model's logits (B, K) float32) to a scalar."""


@dataclass(frozen=True)
class EpochRecord:
    """One line of a training's history; the loss is the mean over the epoch's steps.

    Attributes:
        restarts: how often the training had begun again; the epochs then count from 0 again.
    """

    epoch: int
    train_loss: float
    val_accuracy: float
    restarts: int = 0


Stopped = Literal["epochs", "plateau", "diverged"]
"""Why a training ended: all epochs done, no better accuracy, or no restart left."""


Keep = Literal["best", "last"]
"""Which weights a training ends with: those of the best validation accuracy, or the last ones."""


@dataclass(frozen=True)
class Fitted:
    """How a guarded training ended.

    Attributes:
        val_accuracy: of the weights that were kept, 0 to 1.
        epochs: finished ones, of all restarts together.
        duration_s: validation included; of a resumed training, without what was lost.
    """

    val_accuracy: float
    epochs: int
    stopped: Stopped
    restarts: int
    duration_s: float


class Run:
    """The state of one training, whole in a checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        train: Stream,
        val: Stream,
        loss: Loss,
        recipe: Recipe,
        guard: Guard | None = None,
        after_step: Callable[[], None] = lambda: None,
        before_step: Callable[[int], None] = lambda _: None,
        keep: Keep = "best",
    ) -> None:
        self.model, self.train, self.val = model, train, val
        self.loss, self.recipe, self.guard = loss, recipe, guard
        self.after_step, self.before_step, self.keep = after_step, before_step, keep
        self.began_at, self.elapsed_s = time.monotonic(), 0.0
        self.steps_per_epoch = sum(1 for _ in train.rows(0, recipe.batch_size))
        self.num_steps = recipe.epochs * self.steps_per_epoch
        if recipe.seconds is not None:
            self.num_steps = _CLOCK_STEPS
        self.restarts = 0
        self.pulse: Callable[[], None] = lambda: None
        """Called after each step, where a checkpoint may be saved."""
        self.history = ""
        self.best_accuracy = _number(self.val_accuracy())
        self.validation_s = self._now_s
        self.watch = Watch(self.best_accuracy)
        self.start_state = self.best_state = _copy(model)
        self._begin()

    def _begin(self) -> None:
        """What is new in each restart."""
        recipe = replace(self.recipe, lr=self.recipe.lr / _SLOWER**self.restarts)
        self.optimizer = make_optimizer(self.model, recipe)
        self.schedule = make_schedule(self.optimizer, recipe, self.num_steps)
        self.next_epoch = 0
        self.epoch_losses: list[Tensor] = []
        """Of the steps of an epoch that is not over."""
        self._random: list[Tensor] = []
        self.cycle_from_s = self._now_s
        self.watch = Watch(self.watch.start_accuracy)
        self.stopped: Stopped | None = "epochs" if self.num_steps == 0 else None

    def epoch(self) -> None:
        """Train through the data once, and look at the validation split."""
        try:
            train_loss = self._train()
            accuracy = self.val_accuracy()
            # what is to keep its last weights may lose accuracy on the way, as by pruning
            is_judged = self.guard is not None and self.keep == "best"
            guarded_now = is_judged and self._has_risen
            self.watch.check_accuracy(accuracy, has_risen=guarded_now)
        except DivergedError as error:
            self._diverged(f"epoch {self.next_epoch}: {error}")
            return
        number = self.next_epoch
        record = EpochRecord(number, train_loss, accuracy, self.restarts)
        self.history += json.dumps(asdict(record)) + "\n"
        _log.info("epoch %d: loss %.4f, accuracy %.4f", number, train_loss, accuracy)
        if accuracy >= self.best_accuracy or self.keep == "last":
            self.best_accuracy, self.best_state = accuracy, _copy(self.model)
        patience = self.guard.patience if self.guard is not None else None
        if patience is not None and self._has_risen and self.watch.is_plateau(accuracy, patience):
            self.stopped = "plateau"
        self.next_epoch += 1
        if self._progress(after_epochs=self.next_epoch) >= 1:
            self.stopped = "epochs"

    def finish(self) -> Fitted:
        """Put the weights in that are kept."""
        assert self.stopped is not None
        self.model.load_state_dict(self.best_state)
        self.model.eval()
        return Fitted(
            val_accuracy=self.best_accuracy,
            epochs=len(self.history.splitlines()),
            stopped=self.stopped,
            restarts=self.restarts,
            duration_s=self._now_s,
        )

    def save(self, path: Path) -> None:
        """Write all that is needed to go on, whole or not at all."""
        save_checkpoint(path, self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch_losses": [loss.cpu() for loss in self.epoch_losses],
            "random": self._random_state() if self.epoch_losses else [],
            "elapsed_s": self._now_s,
            "watch": asdict(self.watch),
            **{name: getattr(self, name) for name in _PLAIN},
            **{name: getattr(self, name) for name in _STATES},
        }

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint if there is one; a damaged one is left aside."""
        if not path.is_file():
            return
        try:
            content: dict[str, Any] = load_checkpoint(path)
        except Exception as error:  # noqa: BLE001  a damaged file makes torch raise anything
            _log.warning("checkpoint %s is damaged (%s); beginning again", path, error)
            return
        if not isinstance(content, dict) or content.keys() != self._content().keys():
            _log.warning("checkpoint %s is of another version; beginning again", path)
            return
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.watch = Watch(**content["watch"])
        for name in ("elapsed_s", *_PLAIN):
            setattr(self, name, content[name])
        device = next(self.model.parameters()).device
        for name in _STATES:
            setattr(self, name, {key: t.to(device) for key, t in content[name].items()})
        self.epoch_losses = [loss.to(device) for loss in content["epoch_losses"]]
        self._random = content["random"]
        _log.info(
            "going on after epoch %d and %d steps", self.next_epoch - 1, len(self.epoch_losses)
        )

    # ------------------------------------------------------------ one epoch

    def _train(self) -> float:
        """The epoch's steps; returns their mean loss."""
        number, losses = self.next_epoch, self.epoch_losses
        with torch.random.fork_rng(self._gpus):  # dropout draws
            torch.manual_seed(derive_seed(self.train.seed, "fit", number))
            self._restore_random_state()
            self.model.train()
            for batch in self.train.epoch(number, self.recipe.batch_size, skip=len(losses)):
                self.before_step(number * self.steps_per_epoch + len(losses))
                losses.append(self.step(batch))
                self.after_step()
                if self._time_is_up:
                    break
                if len(losses) % _WINDOW == 0:
                    self.watch.check_loss(_mean(losses[-_WINDOW:]))
                self.pulse()
            self.watch.check_loss(_mean(losses[-_WINDOW:]))
        self.epoch_losses = []
        return _mean(losses)

    @property
    def _gpus(self) -> list[int]:
        return [torch.cuda.current_device()] if self.train.device.type == "cuda" else []

    def _random_state(self) -> list[Tensor]:
        """What the rest of the epoch draws from: of the CPU, then of the GPU."""
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._gpus)]

    def _restore_random_state(self) -> None:
        if self._random:
            torch.set_rng_state(self._random[0])
            for gpu, state in zip(self._gpus, self._random[1:], strict=False):
                torch.cuda.set_rng_state(state, gpu)
        self._random = []

    def step(self, batch: Batch) -> Tensor:
        """One optimizer step; the loss stays on the device."""
        with autocast(batch.images_nchw.device, self.recipe.mixed_precision):
            logits_nk = self.model(batch.images_nchw)
        step_loss = self.loss(batch, logits_nk.float())
        if self.guard is not None and self.watch.max_loss is None:
            equal = self.loss(batch, torch.zeros_like(logits_nk, dtype=torch.float32))
            self.watch.first_loss(float(step_loss.detach()), float(equal))
        self.optimizer.zero_grad(set_to_none=True)
        step_loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.recipe.seconds is None:
            self.schedule.step()
        else:
            due = int(self._progress() * _CLOCK_STEPS)
            for _ in range(self.schedule.last_epoch, due):
                self.schedule.step()
        return step_loss.detach()

    def val_accuracy(self) -> float:
        """Of the present weights, 0 to 1; NaN if a logit is not finite."""
        found = predict(self.model, self.val, batch_size=_BATCH, after_batch=self.after_step)
        # the largest of logits that are not finite would be a class like any other
        return found.accuracy if bool(found.logits_nk.isfinite().all()) else math.nan

    # ------------------------------------------------------------ how far it is

    @property
    def _now_s(self) -> float:
        """Seconds of this training, those before it was resumed included."""
        return self.elapsed_s + time.monotonic() - self.began_at

    @property
    def _time_is_up(self) -> bool:
        """Whether only the last validation still fits into the recipe's seconds."""
        seconds = self.recipe.seconds
        return seconds is not None and self._now_s + self.validation_s >= seconds

    def _progress(self, after_epochs: int = 0) -> float:
        """Share of the schedule that is over, 0 to 1: by the clock, or after so many epochs."""
        if self.recipe.seconds is None:
            return min(after_epochs * self.steps_per_epoch / max(self.num_steps, 1), 1.0)
        if self._time_is_up:
            return 1.0
        whole_s = self.recipe.seconds - self.validation_s - self.cycle_from_s
        return min((self._now_s - self.cycle_from_s) / whole_s, 1.0)

    # ------------------------------------------------------------ the guard

    @property
    def _has_risen(self) -> bool:
        """Whether the present epoch ends after the rise of the schedule."""
        rise = RISE if self.recipe.schedule == "one_cycle" else 0.0
        return self._progress(after_epochs=self.next_epoch + 1) > rise

    def _diverged(self, what: str) -> None:
        lr = self.recipe.lr / _SLOWER**self.restarts
        if self.guard is None:
            raise TrainingError(f"{what}; lower `lr` (now {lr:g})")
        if self.restarts == self.guard.restarts:
            _log.warning("%s at lr %g; no restart is left, the best weights stay", what, lr)
            self.stopped = "diverged"
            return
        self.restarts += 1
        _log.warning("%s at lr %g; beginning again at lr %g", what, lr, lr / _SLOWER)
        self.model.load_state_dict(self.start_state)
        self._begin()


_PLAIN = ("next_epoch", "history", "best_accuracy", "restarts", "stopped", "cycle_from_s")
_STATES = ("start_state", "best_state")
"""What a checkpoint holds of a run beside model, optimizer and schedule."""


def _number(accuracy: float) -> float:
    """Weights that give no number are the worst."""
    return 0.0 if math.isnan(accuracy) else accuracy


def _mean(losses: list[Tensor]) -> float:
    return float(torch.stack(losses).mean())


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
