"""Layout and number format of a training step on the CPU: which is fastest for which layers.

Single convolutions and whole networks, forward alone and forward with backward: PyTorch's default
layout, channels-last (what pbkd takes), and channels-last under bfloat16 autocast (what
``mixed_precision: always`` does).

    .venv/bin/python benchmarks/convolutions.py --quick
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import harness
import torch
from published import in_layout, laid_out
from torch import Tensor, nn

from pbkd.devices import autocast
from pbkd.models import NetworkSpec, build_network

_BATCH = 64
_CHANNELS, _SIDE = 128, 16
_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "depthwise 3x3": lambda: _conv(3, groups=_CHANNELS),
    "depthwise 3x3, stride 2": lambda: _conv(3, groups=_CHANNELS, stride=2),
    "pointwise 1x1": lambda: _conv(1),
    "dense 3x3": lambda: _conv(3),
    "dense 3x3, stride 2": lambda: _conv(3, stride=2),
}
_NETWORKS = {
    "cifar_vgg16": (0.5, 32, 128),
    "cifar_resnet20": (1.0, 32, 128),
    "resnet18": (1.0, 96, 32),
    "mobilenet_v3_small": (1.0, 96, 32),
}
"""Width, side of the images, images in a batch."""


@dataclass(frozen=True)
class _Case:
    module: nn.Module
    x_nchw: Tensor

    def run(self, layout: torch.memory_format, *, mixed: bool, is_step: bool) -> float:
        """Seconds of one pass, or of a pass with its backward pass."""
        module, x_nchw = in_layout(self.module, layout), laid_out(self.x_nchw, layout)
        module.zero_grad(set_to_none=True)  # gradients have the layout of the pass before
        start = time.perf_counter()
        with torch.set_grad_enabled(is_step), autocast(x_nchw.device, mixed and "always"):
            y = module(x_nchw.requires_grad_(is_step))
        if is_step:
            y.float().square().mean().backward()
        return time.perf_counter() - start


def main() -> None:
    """Measure, then report."""
    options = harness.parser(__doc__).parse_args()
    repeats = 5 if options.quick else 15
    rows, samples = [], {}
    for name, case in _cases().items():
        for is_step in (False, True):
            case.run(torch.channels_last, mixed=False, is_step=is_step)  # warm
            found = harness.interleaved(_variants(case, is_step), repeats)
            what = "step" if is_step else "forward"
            samples[f"{name}, {what}"] = found
            rows.append({"what": name, "pass": what} | _row(found))
    settings = {"batch": _BATCH, "channels": _CHANNELS, "side": _SIDE, "networks": _NETWORKS}
    settings |= {"threads": torch.get_num_threads(), "native bfloat16": _is_native()}
    harness.finish("convolutions", settings, samples, rows, _targets(samples))


def _cases() -> dict[str, _Case]:
    torch.manual_seed(0)
    images = torch.randn(_BATCH, _CHANNELS, _SIDE, _SIDE)
    cases = {name: _Case(make().train(), images) for name, make in _LAYERS.items()}
    for name, (width, side, batch) in _NETWORKS.items():
        spec = NetworkSpec(name=name, num_classes=10, in_channels=3, width=width)
        network = build_network(spec).train()
        cases[name] = _Case(network, torch.randn(batch, 3, side, side))
    return cases


def _conv(kernel: int, *, groups: int = 1, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(_CHANNELS, _CHANNELS, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(_CHANNELS), nn.ReLU())


def _variants(case: _Case, is_step: bool) -> dict[str, Callable[[], float]]:
    """What pbkd does, and each thing that it does done otherwise."""
    return {
        "default layout": partial(case.run, torch.contiguous_format, mixed=False, is_step=is_step),
        "channels-last": partial(case.run, torch.channels_last, mixed=False, is_step=is_step),
        "bfloat16": partial(case.run, torch.channels_last, mixed=True, is_step=is_step),
    }


def _row(found: Mapping[str, list[float]]) -> dict[str, str]:
    row = {f"{name} (ms)": f"{1e3 * harness.median(times):.1f}" for name, times in found.items()}
    others = [name for name in found if name != "channels-last"]
    return row | {f"{name}, times": f"{_times(found, name):.2f}" for name in others}


def _times(found: Mapping[str, list[float]], variant: str) -> float:
    """How many times as long as in pbkd's way."""
    return harness.median(found[variant]) / harness.median(found["channels-last"])


def _targets(samples: Mapping[str, Mapping[str, list[float]]]) -> list[harness.Target]:
    """That channels-last is the faster layout, and that bfloat16 is not faster for all networks."""
    steps = [samples[f"{name}, step"] for name in _NETWORKS]
    layout = min(_times(found, "default layout") for found in steps)
    bfloat16 = max(_times(found, "bfloat16") for found in steps)
    return [
        harness.Target(
            "worst network's step: default layout over channels-last", layout, "at least", 1.0, "x"
        ),
        harness.Target(
            "worst network's step: bfloat16 over float32", bfloat16, "at least", 1.0, "x"
        ),
    ]


def _is_native() -> bool:
    """Whether the processor multiplies bfloat16 without converting it."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


if __name__ == "__main__":
    main()
