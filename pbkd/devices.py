"""The device of this process, the layout that suits it, and what to say where memory ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pbkd.errors import TrainingError


def best_device() -> torch.device:
    """The first visible GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the GPU or on the CPU."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def channels_last(module: nn.Module) -> nn.Module:
    """Give a module's convolutions the layout in which they run fastest, in place; values stay.

    On CPUs a depthwise convolution takes a fifth of the time, forward and backward; a 1x1 one a
    quarter, a dense one two thirds (benchmarks/layout.py). GPUs' tensor cores want it, too.
    """
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = in_channels_last(parameter.data)
    return module


def in_channels_last(x_nchw: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of (N, C, H, W) in channels-last strides.

    ``contiguous(memory_format=...)`` would leave strides as they are where one channel or one pixel
    makes both layouts the same, and then other kernels would run and round differently.
    """
    copy = torch.empty_like(x_nchw, dtype=dtype, memory_format=torch.channels_last)
    return copy.copy_(x_nchw)


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Turn a failed allocation into TrainingError: ``what`` did not fit, ``advice`` is what to do.

    Raises:
        TrainingError: the device or the machine has no memory left.
    """
    try:
        yield
    except MemoryError as error:
        raise TrainingError(f"no memory for {what}; {advice}") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        first_line = str(error).splitlines()[0]
        raise TrainingError(f"no memory for {what} ({first_line}); {advice}") from error
