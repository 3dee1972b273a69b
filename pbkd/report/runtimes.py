"""Latency by runtime and threads, and what the exported files are: tables and sentences."""

from __future__ import annotations

from typing import NamedTuple

from pbkd.report.family import MAX_COLUMNS
from pbkd.report.numbers import size_text
from pbkd.report.results import LatencyFigures, Measured, Metrics
from pbkd.report.tables import NOT_MEASURED, Table

_INT8 = "onnxruntime-int8"
NAMES = {"pytorch": "PyTorch", "onnxruntime": "onnxruntime", _INT8: "onnxruntime int8"}


class _Setting(NamedTuple):
    batch_size: int
    threads: int
    device: str

    def __str__(self) -> str:
        where = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"batch {self.batch_size}, {where if self.device == 'cpu' else self.device}"


def runtime_table(metrics: Metrics, measured: Measured) -> Table | None:
    """Milliseconds by runtime and threads; None where there is one of each.

    In brackets, how many times as fast as PyTorch in the same setting.
    """
    names = ["teacher", *metrics.by_size]
    medians = {name: _medians(measured.latency.get(name, ())) for name in names}
    rows = list(dict.fromkeys(key for name in names for key in medians[name]))
    if len({(s.threads, s.device, runtime) for s, runtime in rows}) < 2:
        return None

    def cell(name: str, setting: _Setting, runtime: str) -> str:
        own, base = medians[name].get((setting, runtime)), medians[name].get((setting, "pytorch"))
        if own is None:
            return NOT_MEASURED
        return f"{own:.2f}" + ("" if runtime == "pytorch" or not base else f" ({base / own:.2f}x)")

    # a setting's runtimes stand together, settings in the order in which they were measured
    settings = list(dict.fromkeys(setting for setting, _ in rows))
    runtimes = [runtime for runtime in NAMES if any(runtime == other for _, other in rows)]
    keys = [(s, runtime) for s in settings for runtime in runtimes if (s, runtime) in rows]
    title = "Latency by runtime (ms)"
    if len(names) <= 1 + MAX_COLUMNS:
        body = [
            (str(setting), NAMES[runtime], *(cell(name, setting, runtime) for name in names))
            for setting, runtime in keys
        ]
        return Table(title, ("", "runtime", *names), tuple(body))
    heads = (f"{setting}, {NAMES[runtime]}" for setting, runtime in keys)
    across = [(name, *(cell(name, *key) for key in keys)) for name in names]
    return Table(title, ("model", *heads), tuple(across))


def export_table(metrics: Metrics, measured: Measured) -> Table | None:
    """The ONNX files, and what int8 keeps of the accuracy; None where nothing was exported."""
    names = [name for name in ("teacher", *metrics.by_size) if measured.exports.get(name)]
    if not names:
        return None
    has_int8 = any(_INT8 in measured.exports[name] for name in names)
    has_float = any("onnxruntime" in measured.exports[name] for name in names)
    heads = ("model", *(("ONNX file",) if has_float else ()))
    if has_int8:
        heads += ("int8 file", "int8: accuracy (test)", "int8: accuracy (validation)")
    rows = []
    for name in names:
        files, row = measured.exports[name], [name]
        if has_float:
            plain = files.get("onnxruntime")
            row.append(size_text(plain.file_bytes) if plain else NOT_MEASURED)
        if has_int8:
            small = files.get(_INT8)
            model = metrics.teacher if name == "teacher" else metrics.students[name]
            row += (
                [
                    size_text(small.file_bytes),
                    _accuracy(small.test_accuracy, model.test_accuracy),
                    _accuracy(small.val_accuracy, model.val_accuracy),
                ]
                if small
                else [NOT_MEASURED] * 3
            )
        rows.append(tuple(row))
    return Table("Exported files", heads, tuple(rows))


def export_sentence(measured: Measured) -> str:
    """How well the float32 files agree with their models; empty where there are none."""
    found = [files["onnxruntime"] for files in measured.exports.values() if "onnxruntime" in files]
    if not found:
        return ""
    worst = max(figures.max_difference / (figures.max_logit or 1.0) for figures in found)
    return (
        f"The float32 ONNX files give the models' logits, to within {worst:.1g} of the largest "
        f"logit on {found[0].num_images} validation images."
    )


def _medians(entries: tuple[LatencyFigures, ...]) -> dict[tuple[_Setting, str], float]:
    return {(_Setting(e.batch_size, e.threads, e.device), e.runtime): e.median_ms for e in entries}


def _accuracy(own: float | None, whole: float) -> str:
    if own is None:
        return NOT_MEASURED
    return f"{own:.2%} ({100 * (own - whole):+.2f} points)"
