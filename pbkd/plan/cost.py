"""Predicted cost of training one candidate, in multiply-accumulates.

A stand-in until costs are measured: it ranks jobs and balances them, but it is not a time.
"""

from __future__ import annotations

_BACKWARD_OVER_FORWARD = 2
"""Gradients of inputs and of weights cost a forward pass each."""


def trainee_cost(candidate_macs: int, prefix_macs: int, num_images: int, num_epochs: int) -> float:
    """Multiply-accumulates of one training.

    Args:
        candidate_macs: of one image, forward.
        prefix_macs: of the teacher's pass that feeds the block (relay), of one image; 0 for cache.
        num_images: in the training split.
    """
    per_image = candidate_macs * (1 + _BACKWARD_OVER_FORWARD) + prefix_macs
    return float(per_image) * num_images * num_epochs
