"""Part of `evaluate`: models as ONNX files, whether these are right, and latency by runtime.

All of it differs between machines, int8 answers too: onnxruntime has other kernels for other
processors. So it goes to ``measured.json``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from pbkd.config import EvaluateConfig
from pbkd.data import Prepared
from pbkd.devices import best_device
from pbkd.errors import ExportError
from pbkd.export import (
    OnnxModel,
    Runtime,
    RuntimeLatency,
    TimedModel,
    accuracy_of,
    check_parity,
    first_images,
    onnx_is_installed,
    parity,
    runtime_latencies,
    to_int8,
    to_onnx,
)
from pbkd.measure import usable_cores
from pbkd.models import Classifier, ModelCard
from pbkd.report import ExportFigures, LatencyFigures

_log = logging.getLogger(__name__)

FEW_PASSES = 5
"""A median of fewer passes is told in the log."""

PARITY_IMAGES = 64
"""Validation images on which a file is compared with its model."""

Models = dict[str, tuple[Classifier, ModelCard]]


class RuntimeFigures(NamedTuple):
    """Per model: latency by setting, and what its files are, by runtime."""

    latency: dict[str, list[LatencyFigures]]
    exports: dict[str, dict[Runtime, ExportFigures]]


def measure_runtimes(config: EvaluateConfig, models: Models, prepared: Prepared) -> RuntimeFigures:
    """Export every distinct model to temporary files, compare them with it, measure all in turns.

    A model that cannot be exported, or whose file computes something else, is told in the log, and
    has no figures in that runtime; so it is with all models where onnxruntime is not installed.
    """
    wanted = [runtime for runtime in config.runtimes if runtime != "pytorch"]
    if wanted and not onnx_is_installed():
        _log.info(
            "no latency in onnxruntime: it is not installed; for it, run: pip install "
            "'pbkd[export]', then: pbkd evaluate --remeasure"
        )
        wanted = []
    measured_as = _distinct(models)
    files: dict[str, dict[Runtime, Path]] = {}
    exports: dict[str, dict[Runtime, ExportFigures]] = {}
    with tempfile.TemporaryDirectory(prefix="pbkd-") as temporary:
        for number, name in enumerate(measured_as.values() if wanted else ()):
            folder = Path(temporary) / str(number)
            try:
                files[name], exports[name] = _exported(
                    config, *models[name], prepared, folder, wanted
                )
            except ExportError as error:
                _log.warning("%s: not measured in onnxruntime: %s", name, error)
        latency = latencies(config, models, files)
    by_name = {name: measured_as[card.digest] for name, (_, card) in models.items()}
    return RuntimeFigures(
        latency, {name: exports[same] for name, same in by_name.items() if same in exports}
    )


def latencies(
    config: EvaluateConfig,
    models: Models,
    files: Mapping[str, Mapping[Runtime, Path]] | None = None,
) -> dict[str, list[LatencyFigures]]:
    """All models in turns, setting by setting; equal models are measured once.

    A baseline is not among them: it has its student's architecture, and so its latency. Where
    PyTorch has a GPU, its latency there comes first; then the CPU follows if there are files for
    other runtimes.

    Args:
        files: model, of equal ones the first, to ONNX files by runtime.
    """
    measured_as = _distinct(models)
    device, files = best_device(), files or {}
    card = models["teacher"][1]
    example = torch.rand(1, card.network.in_channels, *card.image_size)
    plain = {name: TimedModel(models[name][0], {}) for name in measured_as.values()}
    figures: dict[str, list[LatencyFigures]] = {name: [] for name in plain}

    def measure(timed: dict[str, TimedModel], device: torch.device, threads: list[int]) -> None:
        found = runtime_latencies(
            timed,
            example.to(device),
            batch_sizes=config.latency_batch_sizes,
            threads=threads,
            seconds=config.latency_seconds,
            max_seconds=config.latency_max_seconds,
        )
        _warn_of_few(found, config)
        for name, entries in found.items():
            figures[name] += map(_figures, entries)

    if device.type != "cpu":
        measure(plain, device, [usable_cores()])
    if device.type == "cpu" or files:
        timed = {name: TimedModel(models[name][0], files.get(name, {})) for name in plain}
        wanted = [threads or usable_cores() for threads in config.latency_threads]
        measure(timed, torch.device("cpu"), list(dict.fromkeys(wanted)))
    return {name: figures[measured_as[card.digest]] for name, (_, card) in models.items()}


def _distinct(models: Models) -> dict[str, str]:
    """Digest to the first model that has it."""
    return {card.digest: name for name, (_, card) in reversed(models.items())}


def _exported(
    config: EvaluateConfig,
    model: Classifier,
    card: ModelCard,
    prepared: Prepared,
    folder: Path,
    wanted: Sequence[Runtime],
) -> tuple[dict[Runtime, Path], dict[Runtime, ExportFigures]]:
    """Files and figures by runtime; ExportError where one cannot be made or is wrong."""
    images = first_images(prepared.split("val"), PARITY_IMAGES)
    path = folder / "model.onnx"
    to_onnx(model, card, path)
    found = parity(model, OnnxModel(path), images)
    check_parity(found, "the ONNX file")
    files: dict[Runtime, Path] = {"onnxruntime": path}
    figures: dict[Runtime, ExportFigures] = {
        "onnxruntime": ExportFigures(file_bytes=path.stat().st_size, **asdict(found))
    }
    if "onnxruntime-int8" in wanted:
        small = folder / "model-int8.onnx"
        to_int8(path, first_images(prepared.split("train"), config.calibration_images), small)
        session = OnnxModel(small)
        figures["onnxruntime-int8"] = ExportFigures(
            file_bytes=small.stat().st_size,
            **asdict(parity(model, session, images)),
            val_accuracy=accuracy_of(session, prepared.split("val")),
            test_accuracy=accuracy_of(session, prepared.split("test")),
        )
        files["onnxruntime-int8"] = small
    return (
        {runtime: files[runtime] for runtime in wanted},
        {runtime: figures[runtime] for runtime in wanted},
    )


def _figures(entry: RuntimeLatency) -> LatencyFigures:
    values = asdict(entry.latency)
    values.pop("dtype")
    return LatencyFigures(**values, runtime=entry.runtime)


def _warn_of_few(found: Mapping[str, list[RuntimeLatency]], config: EvaluateConfig) -> None:
    fewest: dict[int, int] = {}
    for entries in found.values():
        for entry in entries:
            latency = entry.latency
            fewest[latency.batch_size] = min(
                latency.repeats, fewest.get(latency.batch_size, latency.repeats)
            )
    for batch_size, repeats in fewest.items():
        if repeats < FEW_PASSES:
            _log.warning(
                "latency at batch %d rests on only %d passes per model within %g s; raise "
                "evaluate.latency_max_seconds for more",
                batch_size,
                repeats,
                config.latency_max_seconds,
            )
