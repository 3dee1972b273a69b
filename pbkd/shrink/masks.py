"""Weights that are pruned: which tensors hold them, and which go next.

A pruned weight is one that is exactly 0, so that masks need no place of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pbkd.errors import ShrinkError

_LEAST_SHARE = 0.01
"""Of zeros in a tensor that `prune` has been at; fewer may be chance."""


def weighted_layers(model: nn.Module) -> dict[nn.Conv2d | nn.Linear, nn.Parameter]:
    """All convolutions and linear layers, shared ones once, and their weights.

    Raises:
        ShrinkError: a weight is no parameter: a parametrization makes it.
    """
    found: dict[nn.Conv2d | nn.Linear, nn.Parameter] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ShrinkError(
                f"layer {path.removeprefix('net.')}: its weight is made in every pass, as by "
                "weight_norm or spectral_norm; `prune` and `quantize` need a plain parameter: call "
                'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight") before '
                "compressing, or leave these steps out"
            )
        found[layer] = weight
    return found


def prunable_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of ``weighted_layers``, shared ones once; errors as there."""
    return list(dict.fromkeys(weighted_layers(model).values()))


def is_pruned(weight: Tensor) -> bool:
    """Whether a share of a weight tensor that is no chance is exactly 0."""
    return sparsity([weight]) >= _LEAST_SHARE


def sparsity(weights: Sequence[Tensor]) -> float:
    """Share of exact zeros in all tensors together, 0 to 1."""
    return sum(map(_num_zeros, weights)) / sum(weight.numel() for weight in weights)


def masks_per_layer(weights: Sequence[Tensor], share: float) -> list[Tensor]:
    """What stays of each tensor, bool, where each loses its weights of least magnitude.

    Args:
        share: of each tensor that is 0 then, rounded; zeros that are more stay zeros.
    """
    return [_most(weight.detach().abs(), share, _num_zeros(weight)) for weight in weights]


def masks_of_all(weights: Sequence[Tensor], share: float) -> list[Tensor]:
    """As ``masks_per_layer``, with one share of all weights, which compete by their LAMP scores.

    The score is the squared weight over the sum of all in its tensor that are not smaller (Lee et
    al., arXiv 2010.07611). Plain magnitudes would empty layers whose weights happen to be small; by
    the scores the largest weight of every tensor goes last.
    """
    scores = torch.cat([_lamp(weight.detach()).flatten() for weight in weights])
    kept = _most(scores, share, sum(map(_num_zeros, weights)))
    parts = torch.split(kept, [weight.numel() for weight in weights])
    return [mask.reshape(weight.shape) for mask, weight in zip(parts, weights, strict=True)]


def zero_(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set to 0, in place, what does not stay."""
    with torch.no_grad():
        for weight, mask in zip(weights, masks, strict=True):
            weight.masked_fill_(~mask, 0)  # a product would leave -0 of negative ones


def _lamp(weight: Tensor) -> Tensor:
    """LAMP scores, float64, 0 to 1, of the tensor's shape."""
    squares, order = weight.flatten().double().square().sort(stable=True)
    not_smaller = squares.flip(0).cumsum(0).flip(0)
    scores = torch.where(squares > 0, squares / not_smaller, squares)
    return torch.empty_like(scores).scatter_(0, order, scores).reshape(weight.shape)


def _most(scores: Tensor, share: float, least: int) -> Tensor:
    """True but for a share of the lowest scores, of equal ones the first; ``least``: so many."""
    number = max(least, round(share * scores.numel()))
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:number]] = False
    return mask.reshape(scores.shape)


def _num_zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())
