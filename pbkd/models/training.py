"""The one end-to-end training loop: teachers learn from labels with it, students from teachers.

``fit`` takes a loss that is not finite for an error. ``fit_guarded`` stops at a plateau, begins a
diverging training again at a lower rate, and never ends worse than it began.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from pbkd.data.batches import Stream
from pbkd.devices import enough_memory
from pbkd.models.guard import Guard
from pbkd.models.recipe import Recipe as Recipe
from pbkd.models.run import EpochRecord as EpochRecord
from pbkd.models.run import Fitted, Keep, Loss, Run

_CHECKPOINT_EVERY_S = 10.0


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
    began_at = saved_at = time.monotonic()
    while not run.stopped:
        run.epoch()
        history.write_text(run.history)
        now = time.monotonic()
        since = began_at if run.stopped else saved_at
        if checkpoint is not None and now - since >= _CHECKPOINT_EVERY_S:
            run.save(checkpoint)
            saved_at = now
    return run.finish()
