"""`quantize`: weights on a grid or a codebook; the student learns with its values to be.

Norms are written as a factor and an offset per channel, and what is not quantized is rounded to
float16, so that the file needs no more for it.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pbkd.config import QuantizeStep
from pbkd.devices import channels_last
from pbkd.models import Classifier
from pbkd.shrink.grids import Codebook, Grid, Quantized
from pbkd.shrink.masks import weighted_layers
from pbkd.shrink.state import Shrunk
from pbkd.shrink.training import Trainer

_SHARES = torch.linspace(0.3, 1.0, 29)
"""Of the largest weight, tried as the grid's end: clipping a few makes all others finer."""
_LLOYD_ITERATIONS = 30
_LEAST_HALF = 2.0**-24
"""The least float16 above 0."""


def apply(shrunk: Shrunk, step: QuantizeStep, trainer: Trainer) -> Shrunk:
    """Quantize all weights of convolutions and linear layers; zeros stay zeros, shared ones shared.

    Returns:
        A student whose quantized tensors lie exactly on ``grids``.

    Raises:
        ShrinkError: a parametrization makes a weight.
        TrainingError: a batch does not fit into memory.
    """
    model = copy.deepcopy(shrunk.model)
    layers = weighted_layers(model)
    rounding, halves = _Grid if step.form == "grid" else _Codebook, step.rest == "float16"
    learned = {
        weight: rounding(weight.detach(), bits, halves)
        for weight, bits in _bits(layers, step).items()
    }
    for layer, weight in layers.items():
        parametrize.register_parametrization(layer, "weight", learned[weight])
    if step.tune.epochs:
        trainer.fit(model, step.tune)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    settled = {weight: _settle(weight, learned[weight]) for weight in learned}
    grids = {
        name: settled[parameter]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter in settled
    }
    _simplify_norms(model)
    if halves:
        _round_the_rest(model, set(grids))
    channels_last(model)
    return replace(shrunk, model=model.eval(), grids=grids)


def _bits(
    layers: Mapping[nn.Conv2d | nn.Linear, nn.Parameter], step: QuantizeStep
) -> dict[nn.Parameter, int]:
    """Of each weight; where layers share one, the most that any of them takes."""
    found: dict[nn.Parameter, int] = {}
    for index, (layer, weight) in enumerate(layers.items()):
        is_sensitive = index in (0, len(layers) - 1) or _is_depthwise(layer)
        bits = max(step.bits, step.sensitive_bits) if is_sensitive else step.bits
        found[weight] = max(bits, found.get(weight, 0))
    return found


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


# ---------------------------------------------------------------- values that learn


class _Rounding(nn.Module):
    """A parametrization: the weight as it will be in the file."""

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight, of the weight's shape."""

    @abstractmethod
    def quantized(self) -> Quantized:
        """The values as they are now, on the CPU."""


class _Grid(_Rounding):
    """Learned step sizes, one per output channel: Esser et al., arXiv 1902.08153, section 2."""

    first_steps: Tensor

    def __init__(self, weight: Tensor, bits: int, halves: bool) -> None:
        super().__init__()
        self.bits, self.halves = bits, halves
        self.largest = 2 ** (bits - 1) - 1
        self.register_buffer("first_steps", _best_steps(weight, self.largest))
        self.log_factors = nn.Parameter(torch.zeros_like(self.first_steps))  # decay leads back
        self.gradient_scale = 1 / math.sqrt(weight[0].numel() * self.largest)

    def forward(self, weight: Tensor) -> Tensor:
        """Rounded forward; backward as if it were not, but for what is cut off."""
        steps = self._steps()
        # the value of the steps, with a fraction of their gradient: many weights pull at each
        steps = steps.detach() + (steps - steps.detach()) * self.gradient_scale
        steps = steps.reshape(-1, *[1] * (weight.dim() - 1))
        scaled = (weight / steps).clamp(-self.largest, self.largest)
        return (scaled + (scaled.round() - scaled).detach()) * steps

    def quantized(self) -> Grid:
        """Steps and bits."""
        return Grid(self._steps().detach().cpu(), self.bits)

    def _steps(self) -> Tensor:
        steps = self.first_steps * self.log_factors.exp()
        if self.halves:
            steps = steps + (_halves(steps).clamp_min(_LEAST_HALF) - steps).detach()
        return steps


class _Codebook(_Rounding):
    """One-dimensional k-means; each weight keeps its cluster while the means learn."""

    codes: Tensor
    is_zero: Tensor

    def __init__(self, weight: Tensor, bits: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        levels = _k_means(weight, 2**bits)
        self.register_buffer("is_zero", levels == 0)
        self.register_buffer("codes", Codebook(levels).codes(weight))
        self.levels = nn.Parameter(levels)

    def forward(self, weight: Tensor) -> Tensor:
        """The clusters' means; the weight itself is not asked any more."""
        return self._levels()[self.codes.long()]

    def quantized(self) -> Codebook:
        """The entries, rising; means that met are one."""
        return Codebook(torch.unique(self._levels().detach().cpu()))

    def _levels(self) -> Tensor:
        levels = torch.where(self.is_zero, torch.zeros_like(self.levels), self.levels)
        if self.halves:
            levels = levels + (_halves(levels) - levels).detach()
        return levels


def _settle(weight: nn.Parameter, rounding: _Rounding) -> Quantized:
    """Round the weight in place: whatever shares it goes on sharing it."""
    quantized = rounding.quantized()
    with torch.no_grad():
        weight.copy_(quantized.values(quantized.codes(rounding(weight))))
    return quantized


def _best_steps(weight: Tensor, largest: int) -> Tensor:
    """Per output channel the step of least squared error, (O,); 1 where all weights are 0."""
    rows = weight.flatten(1).float()
    ends = rows.abs().amax(1)
    best = torch.where(ends > 0, ends / largest, torch.ones_like(ends))
    least = torch.full_like(ends, math.inf)
    for share in _SHARES:
        steps = torch.where(ends > 0, share * ends / largest, torch.ones_like(ends))[:, None]
        errors = ((rows / steps).round().clamp(-largest, largest) * steps - rows).square().sum(1)
        best = torch.where(errors < least, steps[:, 0], best)
        least = torch.minimum(errors, least)
    return best


def _k_means(weight: Tensor, num_levels: int) -> Tensor:
    """At most ``num_levels`` rising means, by Lloyd's algorithm.

    It begins with means that are spread half evenly and half as the weights are: the first serve
    the large weights, the others the many. Where weights are 0, one of the levels is 0, and the
    others are the means of the rest.
    """
    values = weight.flatten().float().sort().values
    has_zeros = bool((values == 0).any())
    values = values[values != 0]
    if not len(values):
        return torch.zeros(1)
    num_levels -= has_zeros
    evenly = torch.linspace(float(values[0]), float(values[-1]), num_levels - num_levels // 2)
    shares = (torch.arange(num_levels // 2) + 0.5) / max(num_levels // 2, 1)
    levels = torch.unique(torch.cat([evenly, values[(shares * len(values)).long()]]))
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    for _ in range(_LLOYD_ITERATIONS):
        borders = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        borders = torch.cat([torch.tensor([0]), borders, torch.tensor([len(values)])])
        counts = borders.diff()
        filled = counts > 0
        levels = (sums[borders[1:]] - sums[borders[:-1]])[filled] / counts[filled]
        levels = levels.float()
    if has_zeros:
        levels = torch.cat([levels, torch.zeros(1)])
    rising: Tensor = torch.unique(levels)
    return rising


# ---------------------------------------------------------------- what is not quantized


def _simplify_norms(model: nn.Module) -> None:
    """Batch norms as a factor and an offset: mean 0 and variance 1, which cost a file nothing.

    Those that share them stay: each has statistics of its own.
    """
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    for norm in model.modules():
        if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d):
            continue
        if norm.running_mean is None or norm.running_var is None or not norm.affine:
            continue
        if owners[norm.weight] != 1 or owners[norm.bias] != 1:
            continue
        with torch.no_grad():
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            offset = norm.bias.double() - norm.running_mean.double() * factor
            norm.weight.copy_(factor * math.sqrt(1 + norm.eps))
            norm.bias.copy_(offset)
            norm.running_mean.zero_()
            norm.running_var.fill_(1)


def _round_the_rest(model: Classifier, quantized: set[str]) -> None:
    """Float parameters that are not quantized, to float16; running statistics are simple already.

    A tensor that float16 cannot hold to its precision stays as it is.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in quantized:
                continue
            rounded = _halves(parameter)
            error = (rounded - parameter).abs().max() if parameter.numel() else torch.zeros(())
            if bool(error <= 2**-10 * parameter.abs().max()):
                parameter.copy_(rounded)


def _halves(values: Tensor) -> Tensor:
    return values.detach().half().float()
