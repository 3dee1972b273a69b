"""What `shrink` did to each student, step by step, and what its file is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from pbkd.report.numbers import count_text, size_text
from pbkd.report.results import LatencyFigures, Measured, Metrics, StudentFigures
from pbkd.report.runtimes import NAMES
from pbkd.report.tables import NOT_MEASURED, Table

_RUNTIMES = ("pytorch", "onnxruntime")
_METHODS = {
    "start": "fine-tuned",
    "prune": "prune",
    "prune_channels": "prune channels",
    "low_rank": "low rank",
    "quantize": "quantize",
    "code": "code",
}


def shrink_table(metrics: Metrics, measured: Measured) -> Table | None:
    """A row for every student and step; None where no recipe has steps.

    Times are those of the smallest batch and fewest threads, in PyTorch and onnxruntime.
    """
    rows = [
        (
            name if index == 0 else "",
            f"{_METHODS[step.method]}{f' ({step.settings})' if step.settings else ''}",
            f"{step.file_bytes:,}",
            f"{metrics.teacher.file_bytes / step.file_bytes:.1f}x",
            f"{step.bits_per_weight:.2f}",
            count_text(step.num_parameters),
            f"{count_text(step.num_nonzero)} ({step.num_nonzero / step.num_parameters:.0%})",
            count_text(step.macs),
            *_times(measured.latency_after(name, index)),
            f"{step.val_accuracy:.2%}",
        )
        for name, student in metrics.by_size.items()
        for index, step in enumerate(student.steps)
    ]
    if not rows:
        return None
    heads = (
        "student",
        "after",
        "file (bytes)",
        "smaller",
        "bits per weight",
        "parameters",
        "not zero",
        "MACs",
        *(f"ms, {NAMES[runtime]}" for runtime in _RUNTIMES),
        "accuracy (validation)",
    )
    return Table("Shrinking, step by step", heads, tuple(rows))


def times_sentence(measured: Measured) -> str:
    """In which setting the table's times were taken; empty where there are none."""
    own = _fewest(measured.latency["teacher"])
    if own is None:
        return ""
    threads = f"{own.threads} thread{'s' if own.threads > 1 else ''}"
    return f"Times: one pass over a batch of {own.batch_size}, {own.device}, {threads}."


def _times(entries: Sequence[LatencyFigures]) -> list[str]:
    setting = _fewest(entries)
    found = {
        entry.runtime: entry.median_ms
        for entry in entries
        if setting is not None and _key(entry) == _key(setting)
    }
    return [f"{found[runtime]:.2f}" if runtime in found else NOT_MEASURED for runtime in _RUNTIMES]


def _fewest(entries: Sequence[LatencyFigures]) -> LatencyFigures | None:
    return min(entries, key=_key, default=None)


def _key(entry: LatencyFigures) -> tuple[bool, int, int]:
    """CPUs first: only there all runtimes are measured."""
    return entry.device != "cpu", entry.batch_size, entry.threads


def file_sentence(metrics: Metrics) -> str:
    """What the bytes are of."""
    coded = [name for name, student in metrics.by_size.items() if student.is_coded]
    teacher = size_text(metrics.teacher.file_bytes)
    base = f"Ratios are to the teacher's float32 weights as a safetensors file ({teacher})."
    if not coded:
        return f"Files are safetensors. {base}"
    whose = "the students" if len(coded) == len(metrics.students) else ", ".join(coded)
    return (
        f"The files of {whose} are .pbkd: whole models, entropy-coded, as they lie on the disk. "
        f"{base}"
    )


def zeros_sentence(student: StudentFigures) -> str | None:
    """That zeros are stored, and are not skipped in time; None where there are few."""
    if student.num_nonzero is None or student.num_nonzero > 0.95 * student.num_parameters:
        return None
    return (
        "Zeros make the file smaller, not the network faster: PyTorch and onnxruntime multiply "
        "them like any other weight."
    )
