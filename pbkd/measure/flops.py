"""Multiply-accumulates of a forward pass. The one convention of pbkd: 1 MAC = 2 FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pbkd.measure.eval_mode import eval_mode

FLOPS_PER_MAC = 2


def count_macs(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates of one forward over the whole batch given, in eval mode.

    Convolutions, matrix products and attention count; biases, normalisation, activations, pooling
    and additions do not. Padding counts as if it were multiplied. Modes, inputs and the random
    state are afterwards as before.

    Source: ``torch.utils.flop_counter.FlopCounterMode``, halved.
    """
    cuda_devices = {x.device.index for x in inputs if x.is_cuda}
    with (
        torch.random.fork_rng(devices=sorted(cuda_devices)),
        torch.no_grad(),
        eval_mode(module),
        _attention_as_products(),
        FlopCounterMode(display=False) as counter,
    ):
        # Copies: a module may begin with an in-place operation.
        module(*(x.clone() for x in inputs))
    return int(counter.get_total_flops()) // FLOPS_PER_MAC


@contextmanager
def _attention_as_products() -> Iterator[None]:
    """Compute attention by plain matrix products: the counter gives fused CPU kernels 0 FLOPs."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
