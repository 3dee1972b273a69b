"""`prune`: weights of least magnitude become 0, a rising share of them while the student learns.

Convolutions' and linear layers' weights are pruned; biases and norms are not.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from pbkd.config import PruneStep
from pbkd.errors import ShrinkError
from pbkd.shrink.masks import masks_of_all, masks_per_layer, prunable_weights, sparsity, zero_
from pbkd.shrink.state import Shrunk
from pbkd.shrink.training import Trainer

_log = logging.getLogger(__name__)

_UPDATE_STEPS = 25
"""Steps of the optimizer after which more weights go."""
_LEAST_UPDATES = 20
"""In a short ramp they go more often."""

Masks = Callable[[Sequence[Tensor], float], list[Tensor]]
"""(weights, share that is 0 then) to what stays of each."""


def apply(shrunk: Shrunk, step: PruneStep, trainer: Trainer) -> Shrunk:
    """Prune to a share of zeros, exact but for rounding; zeros that are there already count.

    Over the first ``ramp`` of all steps the share rises, then the student learns with what is left.
    Without a ramp, or without epochs, everything goes at once.

    Raises:
        ShrinkError: as many weights are 0 already, or there are none; or a parametrization makes
            them.
        TrainingError: a batch does not fit into memory.
    """
    model = copy.deepcopy(shrunk.model)
    weights = prunable_weights(model)
    masks = masks_of_all if step.scope == "global" else masks_per_layer
    first = _present_share(weights, step)
    tune, steps_per_epoch = step.tune, trainer.steps_per_epoch(step.tune.batch_size)
    ramp_steps = round(step.ramp * tune.epochs * steps_per_epoch)
    ramp_epochs = math.ceil(ramp_steps / steps_per_epoch)
    if ramp_steps:
        ramp = _Ramp(weights, masks, first, step.sparsity, ramp_steps, steps_per_epoch)
        patient = tune.model_copy(update={"patience": ramp_epochs + 1})  # it gets worse meanwhile
        with ramp.joined_to(model):
            trainer.fit(
                model,
                patient,
                epochs=ramp_epochs,
                name="ramp",
                keep="last",
                on_step=ramp.before_step,
            )
    zero_(weights, masks(weights, step.sparsity))
    if tune.epochs > ramp_epochs:
        trainer.fit(model, tune, epochs=tune.epochs - ramp_epochs)
    _log.info("prune: %.2f %% of the weights are 0", 100 * sparsity(weights))
    return replace(shrunk, model=model.eval())


def share_at(step: int, num_steps: int, first: float, last: float) -> float:
    """The share of zeros that is due before a step: Zhu and Gupta, arXiv 1710.01878, equation 1.

    Args:
        step: from 0; after ``num_steps`` the share stays at ``last``.
        first: share at step 0.
    """
    left = max(0.0, 1 - step / num_steps)
    return last + (first - last) * left**3


def _present_share(weights: Sequence[Tensor], step: PruneStep) -> float:
    """The share of zeros now, of all weights or of the layer that has fewest.

    Raises:
        ShrinkError: it is what the step asks for, or more; or there are no weights.
    """
    if not weights:
        raise ShrinkError("prune: the student has no convolution or linear layer; leave it out")
    each = [sparsity([weight]) for weight in weights]
    share = sparsity(weights) if step.scope == "global" else min(each)
    if share >= step.sparsity:
        raise ShrinkError(
            f"prune: got sparsity {step.sparsity:g}, but {share:.4g} of the weights are 0 already; "
            "raise it, or leave the step out"
        )
    return share


class _Ramp(nn.Module):
    """A training in which the share of zeros rises.

    Masks are drawn anew from the weights alone at the first step of every epoch, as well as every
    few steps. In between, momentum moves weights off 0 that went just now: the masks, what stays of
    each weight, are buffers, so that a checkpoint of the student holds them.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        masks: Masks,
        first: float,
        last: float,
        num_steps: int,
        steps_per_epoch: int,
    ) -> None:
        super().__init__()
        self.weights, self.masks = list(weights), masks  # in a list they are no part of it
        self.first, self.last, self.num_steps = first, last, num_steps
        self.steps_per_epoch = steps_per_epoch
        for index, weight in enumerate(weights):
            self.register_buffer(str(index), torch.ones_like(weight, dtype=torch.bool))

    def before_step(self, step: int) -> None:
        """Let go what is due, and what momentum has moved off 0 again."""
        every = min(_UPDATE_STEPS, max(1, self.num_steps // _LEAST_UPDATES))
        kept = list(self.buffers())
        if step % self.steps_per_epoch % every == 0:
            share = share_at(step, self.num_steps, self.first, self.last)
            for mask, drawn in zip(kept, self.masks(self.weights, share), strict=True):
                mask.copy_(drawn)
        zero_(self.weights, kept)

    @contextmanager
    def joined_to(self, model: nn.Module) -> Iterator[None]:
        """Within the block it is part of the model, whose pruned weights get no gradient."""

        def hook(index: int) -> Callable[[Tensor], Tensor]:
            return lambda gradient: gradient * self.get_buffer(str(index))

        handles = [
            weight.register_hook(hook(index))  # type: ignore[no-untyped-call]
            for index, weight in enumerate(self.weights)
        ]
        model.add_module("ramp", self)
        try:
            yield
        finally:
            del model.ramp
            for handle in handles:
                handle.remove()
