"""How far a candidate's output is from the teacher's, per batch; the sums are of float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ActivationLoss = Callable[[Tensor, Tensor], Tensor]
"""(candidate's output, teacher's output), both (B, ...), to a scalar."""


def relative_l2(output: Tensor, target: Tensor) -> Tensor:
    """Squared error over the target's squared norm: ||y - t||^2 / ||t||^2; 1 for an output of 0."""
    norm = _squared_norm(target).clamp_min(torch.finfo(torch.float32).tiny)
    return _squared_norm(output - target) / norm


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per element."""
    return _squared_norm(output - target) / target.numel()


def _squared_norm(x: Tensor) -> Tensor:
    """Of all elements, in one pass; halves the time of squares and their sum on a CPU."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.square()


LOSSES: dict[str, ActivationLoss] = {"relative_l2": relative_l2, "mse": mse}


def damage_kl(teacher_logits_nk: Tensor, logits_nk: Tensor) -> Tensor:
    """Mean over images of KL(teacher || model) of the class distributions, in nats."""
    teacher = teacher_logits_nk.double().log_softmax(1)
    model = logits_nk.double().log_softmax(1)
    return (teacher.exp() * (teacher - model)).sum(1).mean()


def distillation_loss(logits_nk: Tensor, teacher_logits_nk: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of softened distributions (Hinton et al., 1503.02531, eq. 2)."""
    teacher = (teacher_logits_nk / temperature).log_softmax(1)
    student = (logits_nk / temperature).log_softmax(1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1).mean()
