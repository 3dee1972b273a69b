"""What a step needs in order to train: teacher, data, and where the training is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pbkd.config import TuneConfig
from pbkd.data import Stream
from pbkd.models import Classifier, Recipe, predict
from pbkd.models.guard import Guard
from pbkd.models.run import Fitted, Keep
from pbkd.models.training import fit_guarded
from pbkd.students.finetune import distilling

_BATCH = 256


@dataclass(frozen=True)
class Trainer:
    """Distillation of a student, on the device of the streams.

    Attributes:
        folder: for the histories and checkpoints of one step.
        after_step: called after each step of the optimizer and each batch of validation, as a
            sign of life.
    """

    teacher: Classifier
    train: Stream
    val: Stream
    folder: Path
    after_step: Callable[[], None] = lambda: None

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of the optimizer's steps in an epoch."""
        return sum(1 for _ in self.train.rows(0, batch_size))

    def fit(
        self,
        student: nn.Module,
        tune: TuneConfig,
        *,
        epochs: int | None = None,
        name: str = "tune",
        keep: Keep = "best",
        on_step: Callable[[int], None] = lambda _: None,
    ) -> Fitted:
        """Train a student in place, on the device of the streams; it comes back to the CPU.

        Weights that are exactly 0 stay so.

        Args:
            epochs: instead of ``tune.epochs``.
            name: of this training, where a step has several.
            keep: "best" keeps the weights of the best validation accuracy, those with which it came
                included; "last" those at the end.
            on_step: called before each step of the optimizer with the number of steps so far, those
                before a resumed checkpoint included.

        Raises:
            TrainingError: a batch does not fit into memory.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = Recipe.of(tune)
        if epochs is not None:
            recipe = replace(recipe, epochs=epochs)
        device = self.train.device
        student.to(device)
        with _zeros_held(student):
            fitted = fit_guarded(
                student,
                self.train,
                self.val,
                distilling(self.teacher.to(device), tune),
                recipe,
                Guard(tune.patience, tune.restarts),
                history=self.folder / f"{name}.jsonl",
                checkpoint=self.folder / f"{name}.pt",
                after_step=self.after_step,
                before_step=on_step,
                keep=keep,
            )
        student.cpu().eval()
        return fitted

    def accuracy(self, student: nn.Module) -> float:
        """On the validation split, 0 to 1; the student comes back to the CPU."""
        student.to(self.val.device)
        found = predict(student, self.val, batch_size=_BATCH, after_batch=self.after_step)
        student.cpu()
        return found.accuracy


@contextmanager
def _zeros_held(student: nn.Module) -> Iterator[None]:
    """Weights that are 0 get no gradient: with neither momentum nor decay they stay 0."""
    handles = []
    for weight in student.parameters():
        if weight.dim() > 1 and bool((weight == 0).any()):
            kept = (weight != 0).to(weight.dtype)
            hook: Callable[[Tensor], Tensor] = partial(torch.mul, kept)
            handles.append(weight.register_hook(hook))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
