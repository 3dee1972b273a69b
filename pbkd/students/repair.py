"""Mend the drift of a stitched student: its blocks have seen the teacher's activations only.

Every block gets the student's own inputs, and its output is compared with the teacher's for the
same images; neither labels nor logits are trained on. With ``joint`` gradients go through the whole
student; with ``local`` they stay in the block, so that memory is needed for one block at a time.
docs/repair.md compares these and others.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pbkd.activations import Activation, Capture
from pbkd.config import RepairConfig
from pbkd.data.batches import Stream
from pbkd.devices import autocast, enough_memory
from pbkd.distill import damage_kl, relative_l2
from pbkd.models import Classifier, predict
from pbkd.students.recalibrate import recalibrate as recalibrate

_log = logging.getLogger(__name__)

_BATCH = 256
_KL_IMAGES = 2000
_RESTARTS, _SLOWER = 2, 4.0
"""How often training begins again where its first epoch taught nothing, and by what factor."""
_SAME = 1e-3


@dataclass(frozen=True)
class RepairRecord:
    """One line of a repair's history.

    Attributes:
        epoch: -1: before the first step.
        train_loss: mean over the epoch's steps and the blocks; null for epoch -1.
        kl: mean KL(teacher || student), nats, on the images that choose; null: not finite.
        restarts: how often training began again at a lower rate.
    """

    epoch: int
    train_loss: float | None
    kl: float | None
    restarts: int = 0


def repair(
    student: Classifier,
    teacher: Classifier,
    paths: Sequence[str],
    train: Stream,
    config: RepairConfig,
    history: Path,
    after_step: Callable[[], None] = lambda: None,
    *,
    val: Stream | None = None,
) -> None:
    """Train the replaced blocks in place; the student ends in evaluation mode.

    It ends with the weights, after an epoch or before the first, whose KL divergence from the
    teacher is smallest: never worse than it came in. Where the first epoch taught it nothing (the
    loss rose and the KL did not fall, or the student knows no more than a guess), training begins
    again at a lower rate.

    Args:
        paths: the replaced blocks, below ``net``.
        history: file of JSON lines, one ``RepairRecord`` per epoch.
        after_step: called after each step, as a sign of life.
        val: images on which the KL divergence is taken; None: training images.

    Raises:
        TrainingError: a batch does not fit into memory.
    """
    history.write_text("")
    has_weights = any(len(list(student.net.get_submodule(path).parameters())) for path in paths)
    if config.method == "none" or config.epochs == 0 or not has_weights:
        return
    with enough_memory(
        f"a batch of {config.batch_size} images", "lower `stitch.repair.batch_size`"
    ):
        run = Repair(student, teacher.eval(), paths, train, config, after_step)
        run.run(history, val or train)


class _PassIsOver(Exception):  # noqa: N818
    """Ends the student's pass once its last replaced block has run."""


class Repair:
    """A student whose blocks learn, with the teacher that shows them their outputs.

    Attributes:
        targets: the teacher's activations for the batch of the present step.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier,
        paths: Sequence[str],
        train: Stream,
        config: RepairConfig,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.student, self.teacher, self.train = student, teacher, train
        self.config, self.after_step = config, after_step
        self.is_local = config.method != "joint"
        self.blocks = {path: student.net.get_submodule(path) for path in paths}
        images = train.plain(torch.arange(min(config.batch_size, len(train))))
        self.capture = Capture(teacher, paths, images, torch.float32)
        self.norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
        self.parameters = list(self._parameters())
        self.num_steps = config.epochs * sum(1 for _ in train.rows(0, config.batch_size))
        self.restarts = 0
        self.begin()
        self.targets: Mapping[str, Activation] = {}
        self.losses: list[Tensor] = []

    def begin(self) -> None:
        """Make optimizer and schedule anew, at a rate that is lower after each restart."""
        lr = self.config.lr / _SLOWER**self.restarts
        # fused: one kernel for all parameters
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.num_steps)

    def _parameters(self) -> Iterator[nn.Parameter]:
        """What learns: the blocks, and where gradients reach them the batch norms between."""
        inside = {module for block in self.blocks.values() for module in block.modules()}
        between = [] if self.is_local else [norm for norm in self.norms if norm not in inside]
        for module in (*self.blocks.values(), *between):
            yield from module.parameters()

    def run(self, history: Path, chooser: Stream) -> None:
        """All epochs; the student ends with the best weights."""
        reference = self._logits(self.teacher, chooser)
        guess_kl = float(damage_kl(reference, _guess(reference)))
        best_kl, best = self._kl(reference, chooser), _copy(self.student)
        start = best
        lines = [RepairRecord(-1, None, _finite(best_kl))]
        epoch = 0
        with self._only_ours_learn():
            while epoch < self.config.epochs:
                losses = self._epoch(epoch)
                loss = float(losses.mean())
                kl = self._kl(reference, chooser)
                if is_better := kl < best_kl or math.isnan(best_kl) > math.isnan(kl):
                    best_kl, best = kl, _copy(self.student)
                _log.info("repair, epoch %d: loss %.4f, KL %.4f", epoch, loss, kl)
                lines.append(RepairRecord(epoch, _finite(loss), _finite(kl), self.restarts))
                history.write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines))
                is_lost = (_has_risen(losses) and not is_better) or _is_guess(kl, guess_kl)
                if epoch == 0 and is_lost and self.restarts < _RESTARTS:
                    self._begin_again(start)
                else:
                    epoch += 1
        self.student.load_state_dict(best)
        self.student.eval()

    def _begin_again(self, start: Mapping[str, Tensor]) -> None:
        self.restarts += 1
        self.student.load_state_dict(start)
        self.begin()
        lr = self.optimizer.param_groups[0]["lr"]
        _log.warning("repair: the first epoch taught nothing; again at lr %g", lr)

    def _epoch(self, epoch: int) -> Tensor:
        """Train through the data once; returns the losses of its steps."""
        losses = []
        self.student.eval()  # no dropout: the teacher has none either
        for norm in self.norms:
            norm.train()
        with self._hooks():
            for batch in self.train.epoch(epoch, self.config.batch_size):
                losses.append(self._step(batch.images_nchw))
                self.after_step()
        self.student.eval()
        return torch.stack(losses)

    def _step(self, images_nchw: Tensor) -> Tensor:
        self.losses.clear()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(images_nchw.device, self.config.mixed_precision):
            self.targets = self.capture(images_nchw)
            with suppress(_PassIsOver), torch.set_grad_enabled(not self.is_local):
                self.student(images_nchw)
        loss = torch.stack(self.losses).mean()
        if not self.is_local:
            _backward(loss)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _logits(self, model: Classifier, chooser: Stream) -> Tensor:
        return predict(
            model, chooser, batch_size=_BATCH, limit=_KL_IMAGES, after_batch=self.after_step
        ).logits_nk

    def _kl(self, reference: Tensor, chooser: Stream) -> float:
        return float(damage_kl(reference, self._logits(self.student, chooser)))

    @contextmanager
    def _only_ours_learn(self) -> Iterator[None]:
        everything = list(self.student.parameters())
        before = [parameter.requires_grad for parameter in everything]
        self.student.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, required in zip(everything, before, strict=True):
                parameter.requires_grad_(required)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for path, block in self.blocks.items():
            if self.is_local:
                handles.append(block.register_forward_pre_hook(partial(self._before, path)))
            handles.append(block.register_forward_hook(partial(self._after, path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def local_input(self, path: str, x: Tensor) -> Tensor:
        """What a block gets whose gradients stay in it, from what the student has for it."""
        return x

    def _before(self, path: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        torch.set_grad_enabled(True)
        return (self.local_input(path, args[0]),)

    def _after(self, path: str, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        """Take the loss before a later operation overwrites the output."""
        loss = relative_l2(output.float(), self.targets[path].output)
        self.losses.append(loss.detach() if self.is_local else loss)
        if self.is_local:
            _backward(loss)
            torch.set_grad_enabled(False)
        if len(self.losses) == len(self.blocks):
            raise _PassIsOver
        return output.detach() if self.is_local else None


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:  # not of a candidate without weights
        loss.backward()  # type: ignore[no-untyped-call]


def _guess(logits_nk: Tensor) -> Tensor:
    """The logits of a model that knows how frequent each class is, and nothing of an image."""
    return logits_nk.double().softmax(1).mean(0).log().expand_as(logits_nk)


def _has_risen(losses: Tensor) -> bool:
    """Whether an epoch's losses ended above its first one, or are no numbers."""
    return not float(losses[len(losses) // 2 :].mean()) <= float(losses[0])


def _is_guess(kl: float, guess_kl: float) -> bool:
    """Whether a student says the same of every image, as one does whose activations have died."""
    return math.isclose(kl, guess_kl, rel_tol=_SAME)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
