"""What the students were allowed, what the choice predicted, and what came out."""

from __future__ import annotations

from collections.abc import Mapping

from pbkd.config import StitchConfig
from pbkd.report.numbers import share_text
from pbkd.report.results import Measured, Metrics, StudentFigures
from pbkd.report.tables import NOT_MEASURED, Table

_NAMES = {"parameters": "parameters", "macs": "MACs", "bytes": "file bytes", "latency": "latency"}
_ROUNDING = 1e-6
"""Figures over their limit by less than this share are within it."""


def budget_table(metrics: Metrics, measured: Measured) -> Table | None:
    """A row per limit of a student; None where no student has one."""
    rows = []
    for name, student in metrics.by_size.items():
        for figure, limit in student.limits.items():
            key = "latency_ms" if figure == "latency" else figure
            value = measured_figure(student, measured.stitched_latency_ms.get(name), figure)
            rows.append(
                (
                    name,
                    _NAMES[figure],
                    _text(limit, figure) + _share(limit, metrics, figure),
                    _text(student.predicted.get(key), figure),
                    _text(value, figure),
                    _verdict(value, limit),
                )
            )
    heads = ("student", "limit on", "limit", "predicted", "measured", "outcome")
    return Table("Budgets", heads, tuple(rows)) if rows else None


def damage_table(metrics: Metrics) -> Table:
    """Per student: the sum of its candidates' damages, and its own damage once stitched."""
    rows = [
        (
            name,
            f"{student.predicted_damage:.4f}",
            "not finite" if student.stitched_damage is None else f"{student.stitched_damage:.4f}",
        )
        for name, student in metrics.by_size.items()
    ]
    heads = ("student", "sum of its blocks (nats)", "stitched (nats)")
    return Table("Damage of whole students", heads, tuple(rows))


def machine_sentence(metrics: Metrics, stitch: StitchConfig) -> str:
    """Whether the choice of students depends on the machine, and on what of it."""
    limited = [name for name, own in metrics.by_size.items() if "latency" in own.limits]
    if not limited:
        return "No student has a limit on latency, so that the choice depends on no machine."
    all_of_many = len(limited) == len(metrics.students) > 3
    names = f"all {len(limited)} students" if all_of_many else ", ".join(limited)
    threads = stitch.latency_threads
    cores = "all CPU threads" if threads is None else f"CPU threads: {threads}"
    return (
        f"Limited in latency: {names}. The latency table (milliseconds per candidate, at batch "
        f"{stitch.latency_batch_size}, {cores}) was measured on this machine by stitch and is kept "
        "until --remeasure. It is the only machine-dependent input of the choice: on another "
        "machine, or measured anew, these students may be made of other candidates."
    )


def measured_figure(
    student: StudentFigures, stitched_latency_ms: float | None, figure: str
) -> float | None:
    """What the stitched model measures of a limited figure; None: not measured."""
    if figure == "latency":
        return stitched_latency_ms
    return student.stitched.get(figure)


def _share(limit: float, metrics: Metrics, figure: str) -> str:
    """The limit as a share of the teacher's figure; latency has none that compares."""
    teacher: Mapping[str, int] = {
        "parameters": metrics.teacher.num_parameters,
        "macs": metrics.teacher.macs,
        "bytes": metrics.teacher.file_bytes,
    }
    return f" ({share_text(limit / teacher[figure])})" if figure in teacher else ""


def _verdict(value: float | None, limit: float) -> str:
    if value is None:
        return NOT_MEASURED
    if value <= limit * (1 + _ROUNDING):
        return f"{share_text(value / limit)} of the limit"
    return f"over by {share_text(value / limit - 1)}"


def _text(value: float | None, figure: str) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:.3f} ms" if figure == "latency" else f"{value:,.0f}"
