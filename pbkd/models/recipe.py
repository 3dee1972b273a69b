"""How to train: the recipe that a section of params.yaml holds, its optimizer and schedule."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import nn

from pbkd.config import MixedPrecision, Section

RISE = 0.25
"""Share of the steps for which one_cycle rises."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the fields but the last are those of the parameters' sections.

    Attributes:
        seconds: of the whole training, instead of ``epochs``; the schedule follows the clock.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    mixed_precision: MixedPrecision = False
    seconds: float | None = None

    @classmethod
    def of(cls, section: Section) -> Recipe:
        """The recipe that a section of params.yaml holds; what it lacks is as above."""
        return cls(**section.model_dump(include={field.name for field in fields(cls)}))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer of all parameters."""
    lr, weight_decay = recipe.lr, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The recipe's schedule, stepped after each step of the optimizer."""
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(num_steps, 1))
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.lr,
        total_steps=max(num_steps + 1, 5),  # at 4, a quarter is one step: it divides by zero
        pct_start=RISE,
        cycle_momentum=recipe.optimizer == "sgd",  # adamw: left at its betas
    )
