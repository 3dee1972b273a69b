"""The layout that suits a device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pbkd.config import MixedPrecision
from pbkd.devices import autocast, channels_last, is_mixed_on


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("channels", [4, 8])
def test_a_strided_1x1_convolution_gives_the_same_on_every_processor(
    capability: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, 6, 1, stride=2)
    x = torch.randn(2, channels, 7, 8)
    expected = plain(x)
    conv = channels_last(nn.Sequential(plain))[0]
    assert (type(conv) is nn.Conv2d) == (capability == "AVX512" or channels == 8)
    assert (conv.stride, conv.out_channels) == ((2, 2), 6)
    torch.testing.assert_close(conv(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize(
    ("mixed_precision", "on_cpu", "on_gpu"),
    [(False, False, False), (True, False, True), ("always", True, True)],
)
def test_bfloat16_is_taken_on_gpus_and_on_cpus_only_always(
    mixed_precision: MixedPrecision, on_cpu: bool, on_gpu: bool
) -> None:
    assert is_mixed_on(torch.device("cpu"), mixed_precision) is on_cpu
    assert is_mixed_on(torch.device("cuda"), mixed_precision) is on_gpu
    with autocast(torch.device("cpu"), mixed_precision):
        y = nn.Linear(2, 2)(torch.zeros(1, 2))
    assert y.dtype == (torch.bfloat16 if on_cpu else torch.float32)
