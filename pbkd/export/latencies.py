"""Latency of models in several runtimes, all of them measured in turns in one run per setting.

A setting is a batch size, a number of threads and a device. Only what was measured under one
setting compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from pbkd.export.session import OnnxModel
from pbkd.measure import Latency, measure_interleaved

Runtime = Literal["pytorch", "onnxruntime", "onnxruntime-int8"]


@dataclass(frozen=True)
class RuntimeLatency:
    """A latency, and what ran the model."""

    runtime: Runtime
    latency: Latency


@dataclass(frozen=True)
class TimedModel:
    """A model in the forms in which it is to be measured.

    Attributes:
        module: for `pytorch`.
        files: ONNX file by runtime.
    """

    module: nn.Module
    files: Mapping[Runtime, Path]


def runtime_latencies(
    models: Mapping[str, TimedModel],
    example_nchw: Tensor,
    *,
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    seconds: float,
    max_seconds: float,
) -> dict[str, list[RuntimeLatency]]:
    """Measure models in turns: batch size by batch size, for each number of threads.

    Args:
        models: name to forms; modules are moved to the device of ``example_nchw``.
        example_nchw: at least one image; on a GPU, only where no model has files.
        threads: numbers of threads within an operation, each at least 1.
        seconds: measuring time per batch size for a pair of models; more models get more in
            proportion, threads and runtimes share it. At least 20 passes are made of each.
        max_seconds: per batch size; no round of all models begins after this time.

    Returns:
        Model to latencies: by batch size, then threads, then runtime, in the order given.
    """
    for model in models.values():
        model.module.to(example_nchw.device)
    figures: dict[str, list[RuntimeLatency]] = {name: [] for name in models}
    share = max(1.0, len(models) / 2) / len(threads)
    for batch_size in batch_sizes:
        for num_threads in threads:
            forms = dict(_forms(models, num_threads))
            keys = {f"{runtime} {name}": (runtime, name) for runtime, name in forms}
            latencies = measure_interleaved(
                {key: forms[form] for key, form in keys.items()},
                example_nchw,
                batch_size=batch_size,
                threads=num_threads,
                min_duration_s=seconds * share,
                max_duration_s=max_seconds / len(threads),
            )
            for key, latency in latencies.items():
                runtime, name = keys[key]
                figures[name].append(RuntimeLatency(runtime, latency))
    return figures


def _forms(
    models: Mapping[str, TimedModel], threads: int
) -> Iterator[tuple[tuple[Runtime, str], Callable[[Tensor], object]]]:
    """Every model in every runtime: PyTorch's first."""
    for name, model in models.items():
        yield ("pytorch", name), model.module
    for name, model in models.items():
        for runtime, path in model.files.items():
            yield (runtime, name), OnnxModel(path, threads=threads)
