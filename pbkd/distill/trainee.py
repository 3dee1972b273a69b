"""One candidate of one block while it trains: its optimizer, schedule, history and best weights."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pbkd.activations import Activation
from pbkd.artifacts import digest_of, save_tensors, write_json
from pbkd.blocks import Discovery, candidate_name
from pbkd.config import ActivationsConfig, CandidateConfig, DistillConfig
from pbkd.devices import autocast, is_mixed_on
from pbkd.distill.loss import LOSSES
from pbkd.models import ModelCard
from pbkd.seeding import derive_seed

ALGORITHM = 3
"""Raised whenever the same settings would give other weights."""

WEIGHTS = "weights.safetensors"
HISTORY = "history.jsonl"
RESULT = "result.json"


class TraineeSpec(BaseModel):
    """What to train, and the keys under which the store keeps weights and score."""

    model_config = ConfigDict(frozen=True)

    block: str
    config: CandidateConfig
    seed: int
    key: str
    score_key: str

    @property
    def name(self) -> str:
        """``block/candidate``, unique in a run."""
        return f"{self.block}/{candidate_name(self.config)}"

    @classmethod
    def make(
        cls,
        block: str,
        config: CandidateConfig,
        seed: int,
        card: ModelCard,
        distill: DistillConfig,
        activations: dict[str, object],
    ) -> TraineeSpec:
        """Derive the keys.

        Args:
            seed: of this trainee's initialisation.
            activations: the settings of the stream and of rounding (views, dtype, chunk, its seed);
                neither the source nor the plan.
        """
        training = distill.model_dump(exclude={"score_images"})
        key = digest_of(
            {
                "algorithm": ALGORITHM,
                "teacher": card.digest,
                "data": card.data_digest,
                "augment": card.augment,
                "block": block,
                "candidate": config,
                "training": training,
                "activations": activations,
                "seed": seed,
            }
        )
        score_key = digest_of({"trainee": key, "images": distill.score_images})
        return cls(block=block, config=config, seed=seed, key=key, score_key=score_key)


def make_trainees(
    discovery: Discovery,
    card: ModelCard,
    distill: DistillConfig,
    activations: ActivationsConfig,
    seed: int,
) -> list[TraineeSpec]:
    """Every candidate of every block, in the order of the network."""
    stream = activations.model_dump(include={"views", "dtype", "chunk"})
    return [
        TraineeSpec.make(
            block=block.path,
            config=candidate.config,
            seed=derive_seed(seed, "trainee", block.path, candidate.name),
            card=card,
            distill=distill,
            activations={"seed": seed, **stream},
        )
        for block in discovery.blocks
        for candidate in block.candidates
    ]


class TraineeResult(BaseModel):
    """What ``result.json`` says of a finished trainee.

    Attributes:
        started_at, finished_at: seconds since 1970; of a resumed training, their difference is
            without what was lost.
        stopped: why training ended: all epochs, no better validation loss, a loss not finite, or
            nothing to train.
        best_epoch: epoch of the kept weights; -1: the inherited ones, before any step.
        initial_val_loss, best_val_loss: null where they were not finite.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    block: str
    candidate: str
    config: CandidateConfig
    started_at: float
    finished_at: float
    stopped: str
    message: str
    num_epochs: int
    best_epoch: int
    initial_val_loss: float | None
    best_val_loss: float | None


class HistoryLine(BaseModel):
    """One line of ``history.jsonl``; epoch -1 is before the first step, ``time`` since 1970.

    A loss that was not finite is null.
    """

    model_config = ConfigDict(frozen=True)

    epoch: int
    train_loss: float | None
    val_loss: float | None
    lr: float
    time: float


def read_history(path: Path) -> list[HistoryLine]:
    """The whole lines of a history, also of one that is still growing."""
    text = path.read_text() if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    return [HistoryLine.model_validate_json(line) for line in whole.splitlines()]


@dataclass
class _Best:
    epoch: int
    loss: float
    state: dict[str, Tensor]


class Trainee:
    """Trains ``module`` to give the block's outputs for the block's inputs.

    Args:
        module: the candidate, initialised, on its device.
        num_steps: steps of the whole training, for the cosine schedule.
        progress: JSON lines appear here epoch by epoch.
    """

    def __init__(
        self,
        spec: TraineeSpec,
        module: nn.Module,
        config: DistillConfig,
        num_steps: int,
        progress: Path,
    ) -> None:
        self.spec = spec
        self.module = module
        self.config = config
        self.loss = LOSSES[config.loss]
        self._norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        self.learns = any(True for _ in module.parameters())  # an identity has none
        self.optimizer = _optimizer(config, module)
        self.num_steps = num_steps
        self.lr = config.lr
        self._steps_taken = 0
        self.progress = progress
        self.started_at = time.time()
        self.stopped = ""
        self.message = ""
        self._epoch = -1
        self._losses: list[Tensor] = []
        self._best = _Best(-1, math.inf, self._state())
        self._plateau_since = -1
        self._initial_val_loss: float | None = None
        progress.parent.mkdir(parents=True, exist_ok=True)
        progress.write_text("")

    @property
    def active(self) -> bool:
        """Whether it still learns."""
        return not self.stopped

    @property
    def epoch(self) -> int:
        """The epoch that it is in; -1: before its first validation."""
        return self._epoch

    @property
    def num_taken(self) -> int:
        """Batches of the present epoch that it has taken."""
        return len(self._losses)

    def step(self, activation: Activation) -> None:
        """One optimizer step; the loss stays on the device."""
        self.count(self.descend(activation))

    def descend(self, activation: Activation) -> Tensor:
        """The part of a step that a CUDA graph can record; returns the loss."""
        self.module.eval()  # no dropout: the target has none, and draws depend on the grouping
        for norm in self._norms:
            norm.train()
        loss = self._loss(activation)
        if self.learns:
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def count(self, loss: Tensor) -> None:
        """Keep a step's loss, and set the learning rate of the next step: half a cosine wave."""
        self._losses.append(loss)
        self._steps_taken += 1
        self._set_lr()

    def _set_lr(self) -> None:
        share = min(self._steps_taken / self.num_steps, 1.0)
        self.lr = self.config.lr * (1 + math.cos(math.pi * share)) / 2
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # a recorded step reads it there
                group["lr"].fill_(self.lr)
            else:
                group["lr"] = self.lr

    @torch.no_grad()
    def batch_loss(self, activation: Activation) -> Tensor:
        """Validation loss of one batch times its number of images."""
        self.module.eval()
        return self._loss(activation) * len(activation.input)

    def end_epoch(self, val_loss: float) -> None:
        """Record an epoch, keep the weights if they are the best, decide whether to go on.

        Called once before the first step, too: epoch -1 stands for the initial weights.
        """
        train_loss = float(torch.stack(self._losses).mean()) if self._losses else None
        self._losses.clear()
        self._record(train_loss, val_loss)
        if self._epoch == -1:
            self._initial_val_loss = val_loss
        if not math.isfinite(val_loss) or (
            train_loss is not None and not math.isfinite(train_loss)
        ):
            self._diverged(train_loss, val_loss)
        elif val_loss < self._best.loss:
            self._better(val_loss)
        if self.active and not self.learns:
            self.stopped, self.message = "fixed", "it has no parameters to train"
        patience = self.config.patience
        if self.active and self._epoch >= self._plateau_since + patience:
            self.stopped, self.message = "plateau", f"no better loss for {patience} epochs"
        if self.active and self._epoch == self.config.epochs - 1:
            self.stopped = "epochs"
        self._epoch += 1

    def write(self, folder: Path) -> None:
        """Fill an item of the store: best weights, history, result."""
        save_tensors(folder / WEIGHTS, self._best.state)
        (folder / HISTORY).write_bytes(self.progress.read_bytes())
        write_json(folder / RESULT, self._result())

    def snapshot(self) -> dict[str, Any]:
        """All that ``restore`` needs, as plain values and tensors; these are not copies."""
        losses = torch.stack(self._losses) if self._losses else torch.zeros(0)
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "steps_taken": self._steps_taken,
            "epoch": self._epoch,
            "losses": losses,
            "best": vars(self._best),
            "plateau_since": self._plateau_since,
            "initial_val_loss": self._initial_val_loss,
            "elapsed_s": time.time() - self.started_at,
            "history": self.progress.read_text(),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go on where a snapshot of the same trainee was taken, on whatever device.

        To be called before the first step: what a CUDA graph has recorded would keep the tensors of
        before. Raises anything, and leaves the trainee in parts, where the snapshot is of another
        module.
        """
        device = self.optimizer.param_groups[0]["params"][0].device
        self.module.load_state_dict(snapshot["module"])
        # its own groups, because they say where the rate and the count of steps have to lie
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": snapshot["optimizer"], "param_groups": groups})
        self._steps_taken = snapshot["steps_taken"]
        self._set_lr()
        self._epoch = snapshot["epoch"]
        self._losses = list(snapshot["losses"].to(device))
        best = snapshot["best"]
        weights = {name: tensor.to(device) for name, tensor in best["state"].items()}
        self._best = _Best(best["epoch"], best["loss"], weights)
        self._plateau_since = snapshot["plateau_since"]
        self._initial_val_loss = snapshot["initial_val_loss"]
        self.started_at = time.time() - snapshot["elapsed_s"]
        self.progress.write_text(snapshot["history"])

    def _loss(self, activation: Activation) -> Tensor:
        x, target = activation.input, activation.output
        is_mixed = is_mixed_on(x.device, self.config.mixed_precision)
        # the candidate may overwrite its input, and others read the original
        own = x.to(torch.bfloat16 if is_mixed else torch.float32, copy=True)
        with autocast(x.device, self.config.mixed_precision):
            output = self.module(own)
        return self.loss(output, target if is_mixed else target.float())

    def _better(self, val_loss: float) -> None:
        if val_loss < self._best.loss * (1 - self.config.min_improvement):
            self._plateau_since = self._epoch
        self._best = _Best(self._epoch, val_loss, self._state())

    def _diverged(self, train_loss: float | None, val_loss: float) -> None:
        self.stopped = "diverged"
        self.message = (
            f"epoch {self._epoch}: training loss {train_loss}, validation loss {val_loss}; kept "
            f"the weights of epoch {self._best.epoch}; lower distill.lr (now {self.config.lr:g})"
        )

    def _record(self, train_loss: float | None, val_loss: float) -> None:
        line = HistoryLine(
            epoch=self._epoch,
            train_loss=_finite(train_loss),
            val_loss=_finite(val_loss),
            lr=self.lr,
            time=time.time(),
        )
        with self.progress.open("a") as file:
            file.write(line.model_dump_json() + "\n")

    def _result(self) -> TraineeResult:
        return TraineeResult(
            key=self.spec.key,
            block=self.spec.block,
            candidate=candidate_name(self.spec.config),
            config=self.spec.config,
            started_at=self.started_at,
            finished_at=time.time(),
            stopped=self.stopped,
            message=self.message,
            num_epochs=self._epoch,
            best_epoch=self._best.epoch,
            initial_val_loss=_finite(self._initial_val_loss),
            best_val_loss=_finite(self._best.loss),
        )

    def _state(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.module.state_dict().items()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _optimizer(config: DistillConfig, module: nn.Module) -> torch.optim.Optimizer:
    # an optimizer refuses to be without any
    parameters = [*module.parameters()] or [nn.Parameter(torch.zeros(0))]
    # what a CUDA graph records has to lie on the device
    on_gpu = parameters[0].is_cuda
    lr = torch.tensor(config.lr, device=parameters[0].device) if on_gpu else config.lr
    decay = config.weight_decay
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, weight_decay=decay, capturable=on_gpu)
    # fused: one kernel for all parameters; a third of the time on the CPU
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=True, capturable=on_gpu)
