"""The one end-to-end training loop: teachers learn from labels with it, students from teachers.

``fit`` takes a loss that is not finite for an error. ``fit_guarded`` stops at a plateau, begins a
diverging training again at a lower rate, and never ends worse than it began.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pbkd.data.batches import Stream
from pbkd.devices import enough_memory
from pbkd.models.guard import Guard
from pbkd.models.recipe import Recipe as Recipe
from pbkd.models.run import EpochRecord as EpochRecord
from pbkd.models.run import Fitted, Keep, Loss, Run

_CHECKPOINT_EVERY_S = 10.0
"""After an epoch; within one, see ``_Saver``."""
_LONG_EPOCH_S, _SAVING_SHARE = 60.0, 0.02
_LEAST_MOMENTUM = 0.1
"""PyTorch's default: running statistics forget a batch within some ten steps."""


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
        checkpoint: file to go on from, written every few seconds at the end of an epoch and every
            minute within one; its name must tell trainings apart. The caller deletes it once the
            weights are safe.

    Returns:
        The validation accuracy of the weights that were kept, 0 to 1.

    Raises:
        TrainingError: the loss is not finite, or a batch does not fit into memory.
    """
    with _enough_memory(recipe):
        return _drive(Run(model, train, val, loss, recipe), history, checkpoint).val_accuracy


def fit_guarded(
    model: nn.Module,
    train: Stream,
    val: Stream,
    loss: Loss,
    recipe: Recipe,
    guard: Guard,
    *,
    history: Path,
    checkpoint: Path | None = None,
    after_step: Callable[[], None] = lambda: None,
    before_step: Callable[[int], None] = lambda _: None,
    keep: Keep = "best",
) -> Fitted:
    """As ``fit``, with an end at a plateau and restarts instead of an error.

    The best weights of all restarts are kept, so that the model never ends with a lower validation
    accuracy than it began with.

    Args:
        loss: its value for equal logits is the scale by which an explosion is told.
        after_step: called after each step, as a sign of life.
        before_step: called before each step with the number of steps that came before it, in this
            attempt, those before a checkpoint included.
        keep: the last weights, instead of the best ones.

    Raises:
        TrainingError: a batch does not fit into memory.
    """
    with _enough_memory(recipe):
        run = Run(model, train, val, loss, recipe, guard, after_step, before_step, keep)
        return _drive(run, history, checkpoint)


def _enough_memory(recipe: Recipe) -> AbstractContextManager[None]:
    return enough_memory(f"a batch of {recipe.batch_size} images", "lower `batch_size`")


def _drive(run: Run, history: Path, checkpoint: Path | None) -> Fitted:
    if checkpoint is not None:
        run.resume(checkpoint)
    history.write_text(run.history)
    saver = _Saver(run, checkpoint)
    run.pulse = saver.within_epoch
    with _statistics_that_follow(run.model):
        while not run.stopped:
            run.epoch()
            history.write_text(run.history)
            saver.after_epoch()
    return run.finish()


@contextmanager
def _statistics_that_follow(model: nn.Module) -> Iterator[None]:
    """Let batch norms forget as fast as by default.

    Networks for ImageNet average over a hundred steps (MobileNetV3) or thousands (MNASNet); on a
    few images the statistics of the beginning would still be there in the end.
    """
    slow = {
        norm: norm.momentum
        for norm in model.modules()
        if isinstance(norm, _BatchNorm) and norm.momentum is not None
        if norm.momentum < _LEAST_MOMENTUM
    }
    try:
        for norm in slow:
            norm.momentum = _LEAST_MOMENTUM
        yield
    finally:
        for norm, momentum in slow.items():
            norm.momentum = momentum


class _Saver:
    """Writes a run's checkpoint every few seconds after an epoch, and within one that is long.

    Within an epoch it takes a small share of the time, however large the model is.
    """

    def __init__(self, run: Run, checkpoint: Path | None) -> None:
        self._run, self._checkpoint = run, checkpoint
        self._began_s = self._saved_s = time.monotonic()
        self._took_s = 0.0

    def within_epoch(self) -> None:
        """After a step."""
        every_s = max(_LONG_EPOCH_S, self._took_s / _SAVING_SHARE)
        if self._checkpoint is not None and time.monotonic() - self._saved_s >= every_s:
            self._save(self._checkpoint)

    def after_epoch(self) -> None:
        """The last one is always worth a checkpoint, unless the training was short."""
        since_s = self._began_s if self._run.stopped else self._saved_s
        if self._checkpoint is not None and time.monotonic() - since_s >= _CHECKPOINT_EVERY_S:
            self._save(self._checkpoint)

    def _save(self, path: Path) -> None:
        began_s = time.monotonic()
        self._run.save(path)
        self._saved_s = time.monotonic()
        self._took_s = self._saved_s - began_s
