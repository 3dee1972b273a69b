"""The least time in which a device can train a case's candidates, from two measured rates.

Bytes: each convolution's input, output and weight, read or written once in the forward pass and
once in the backward pass, and the block's target, read once; all at ``activations.dtype``, over the
bandwidth of a large copy. ReLUs and the loss are taken as fused, the optimizer's state and the
teacher's passes as free. Operations: 2 per multiply-accumulate, times 3 for the forward pass and
the two products of the backward pass, over the rate of a large bfloat16 matrix product.

The floor is the larger of the two times, not their sum: blocks do not depend on each other, so one
block's memory traffic may run under another's arithmetic, and a sum would not be a lower bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from case import Case
from torch import Tensor, nn

from pbkd.measure import FLOPS_PER_MAC, count_macs

_PASSES = 2
_PRODUCTS = 3
_REPEATS = 10


@dataclass(frozen=True)
class Rates:
    """What the device does at best: bytes of a copy, read and written, and bfloat16 FLOPs."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Floor:
    """Time of the whole training of all candidates by memory traffic, and by arithmetic."""

    memory_s: float
    arithmetic_s: float

    @property
    def duration_s(self) -> float:
        """The floor."""
        return max(self.memory_s, self.arithmetic_s)


def measure_rates(device: torch.device) -> Rates:
    """Best of ten copies, and of ten products; 4 GiB and 8192 x 8192 on a GPU, else tiny."""
    on_gpu = device.type == "cuda"
    source = torch.ones(2**32 if on_gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _shortest_s(lambda: target.copy_(source), device)
    size = 8192 if on_gpu else 256
    matrix = torch.randn(size, size, device=device).bfloat16()
    product_s = _shortest_s(lambda: matrix @ matrix, device)
    return Rates(2 * source.numel() / copy_s, FLOPS_PER_MAC * size**3 / product_s)


def floor_of(case: Case, rates: Rates) -> Floor:
    """The floor of ``case.num_steps`` steps of every candidate."""
    batch_size = case.distill.batch_size
    activations = case.capture()(case.train.plain(torch.arange(1)))
    num_bytes = num_macs = 0
    for path, candidate in case.candidates.items():
        pair = activations[path]
        elements, weights = _elements(candidate, pair.input.float())
        per_step = _PASSES * (batch_size * elements + weights) + batch_size * pair.output.numel()
        num_bytes += per_step * pair.input.element_size()
        num_macs += _PRODUCTS * batch_size * count_macs(candidate, pair.input.float())
    return Floor(
        memory_s=case.num_steps * num_bytes / rates.bytes_per_s,
        arithmetic_s=case.num_steps * FLOPS_PER_MAC * num_macs / rates.flops_per_s,
    )


@torch.no_grad()
def _elements(candidate: nn.Module, x: Tensor) -> tuple[int, int]:
    """Numbers in all convolutions' inputs and outputs for a batch, and in their weights."""
    sizes: list[int] = []

    def count(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(args[0].numel() + output.numel())

    convs = [module for module in candidate.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_hook(count) for conv in convs]
    try:
        candidate(x)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(sizes), sum(conv.weight.numel() for conv in convs)


def _shortest_s(function: Callable[[], object], device: torch.device) -> float:
    samples = []
    for _ in range(_REPEATS):
        _synchronise(device)
        began = time.perf_counter()
        function()
        _synchronise(device)
        samples.append(time.perf_counter() - began)
    return min(samples)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
