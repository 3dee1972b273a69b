"""The device of this process, the layout that suits it, and what to say where memory ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    On CPUs a depthwise convolution takes a fifth to four fifths of the time, forward and backward,
    by the processor; others up to a third less (benchmarks/convolutions.py). GPUs' tensor cores
    want it, too.
    """
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = in_channels_last(parameter.data)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        for conv in module.modules():
            if type(conv) is nn.Conv2d and _is_unsafe(conv):
                conv.__class__ = _Subsampled
    return module


class _Subsampled(nn.Conv2d):
    """A 1x1 convolution with a stride, as one without a stride on every other pixel.

    oneDNN 3.12 writes beyond its memory in the backward pass of the former, where a processor has
    no AVX-512, the layout is channels-last and there are fewer than eight input channels.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(input[:, :, ::rows, ::columns], weight, bias)


def _is_unsafe(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (1, 1)
        and conv.stride != (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and conv.in_channels < 8
    )


def in_channels_last(x_nchw: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of (N, C, H, W) in channels-last strides.

    ``contiguous(memory_format=...)`` would leave strides as they are where one channel or one pixel
    makes both layouts the same, and then other kernels would run and round differently.
    """
    copy = torch.empty_like(x_nchw, dtype=dtype, memory_format=torch.channels_last)
    return copy.copy_(x_nchw)


def is_mixed_on(device: torch.device, mixed_precision: bool | Literal["always"]) -> bool:
    """Whether the setting wants bfloat16 on this device; ``"always"`` is for CPUs, too."""
    return mixed_precision == "always" or (mixed_precision and device.type == "cuda")


def autocast(device: torch.device, mixed_precision: bool | Literal["always"]) -> torch.autocast:
    """bfloat16 autocast where the setting wants it, else float32 throughout."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_mixed_on(device, mixed_precision))


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
