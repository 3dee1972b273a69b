"""What `shrink` did to each student, step by step, and what its file is compared with."""

from __future__ import annotations

from pbkd.report.numbers import count_text, size_text
from pbkd.report.results import Metrics, StudentFigures
from pbkd.report.tables import Table

_NAMES = {
    "start": "fine-tuned",
    "prune": "prune",
    "prune_channels": "prune channels",
    "low_rank": "low rank",
    "quantize": "quantize",
    "code": "code",
}


def shrink_table(metrics: Metrics) -> Table | None:
    """A row for every student and step; None where no recipe has steps."""
    rows = [
        (
            name if index == 0 else "",
            f"{_NAMES[step.method]}{f' ({step.settings})' if step.settings else ''}",
            f"{step.file_bytes:,}",
            f"{metrics.teacher.file_bytes / step.file_bytes:.1f}x",
            f"{step.bits_per_weight:.2f}",
            count_text(step.num_parameters),
            f"{count_text(step.num_nonzero)} ({step.num_nonzero / step.num_parameters:.0%})",
            count_text(step.macs),
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
        "accuracy (validation)",
    )
    return Table("Shrinking, step by step", heads, tuple(rows))


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
