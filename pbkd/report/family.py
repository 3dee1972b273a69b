"""Teacher and students side by side: the summary, the final table, and how accuracy came about."""

from __future__ import annotations

from collections.abc import Callable

from pbkd.report.numbers import count_text, share_text, size_text
from pbkd.report.results import BASELINES, Measured, Metrics, ModelFigures, StudentFigures
from pbkd.report.tables import NOT_MEASURED, Table

NEAR = 0.01
"""The summary is about the smallest student whose validation accuracy is at most so much below the
teacher's; about the most accurate one where there is none."""

MAX_COLUMNS = 3
"""More students than these are rows of the final table, not columns."""


def summary_sentence(metrics: Metrics, measured: Measured, network: str = "The teacher") -> str:
    """One sentence for one student, by ``NEAR``: size, speed and accuracy against the teacher's.

    The speed is told for the smallest and the largest batch that was measured.
    """
    name, why = _told_of(metrics)
    student = metrics.students[name]
    points = 100 * (student.test_accuracy - metrics.teacher.test_accuracy)
    latency = measured.headline
    pairs = list(zip(latency["teacher"], latency[name], strict=True))
    pairs.sort(key=lambda pair: pair[0].batch_size)
    speeds = [
        f"{_faster(teacher.median_ms / own.median_ms)} at batch {own.batch_size}"
        for teacher, own in (pairs if len(pairs) < 2 else (pairs[0], pairs[-1]))
    ]
    speed = f"{' and '.join(speeds)}, " if speeds else ""
    share = share_text(student.file_bytes / metrics.teacher.file_bytes)
    lead = f"{network} at {share} of its bytes"
    return f"{lead}, {speed}{points:+.1f} points of test accuracy{why}."


def final_table(metrics: Metrics, measured: Measured) -> Table:
    """Teacher against students; a few are columns, many are rows. Ratios are to the teacher."""
    if len(metrics.students) <= MAX_COLUMNS:
        return _as_columns(metrics, measured)
    return _as_rows(metrics, measured)


def accuracy_table(metrics: Metrics, measured: Measured) -> Table:
    """How each student's validation accuracy came about, and what its baselines reached."""
    kinds = kinds_of(metrics)
    rows = []
    for name, student in metrics.by_size.items():
        baselines = metrics.baselines.get(name, {})
        seconds = measured.device_s.get(name)
        rows.append(
            (
                name,
                f"{student.blocks_replaced} of {student.blocks_total}",
                f"{student.stitched_val_accuracy:.2%}",
                f"{student.recalibrated_val_accuracy:.2%}",
                f"{student.repaired_val_accuracy:.2%}",
                f"{student.finetuned_val_accuracy:.2%}",
                *(f"{baselines[k].val_accuracy:.2%}" if k in baselines else "" for k in kinds),
                NOT_MEASURED if seconds is None else seconds_text(seconds),
                f"{metrics.teacher.val_accuracy:.2%}",
            )
        )
    steps = ("stitched", "recalibrated", "repaired", "fine-tuned")
    beside = (*(f"baseline {BASELINES[kind]}" for kind in kinds), "device seconds", "teacher")
    heads = ("student", "blocks replaced", *steps, *beside)
    return Table("Validation accuracy, step by step", heads, tuple(rows))


def kinds_of(metrics: Metrics) -> list[str]:
    """The kinds of baselines that there are, in the report's order."""
    there = {kind for own in metrics.baselines.values() for kind in own}
    return [kind for kind in BASELINES if kind in there]


def seconds_text(duration_s: float) -> str:
    """Seconds without their unit."""
    return f"{duration_s:,.0f}" if duration_s >= 100 else f"{duration_s:.3g}"


def _told_of(metrics: Metrics) -> tuple[str, str]:
    """The student of the summary, and why it is this one."""
    students, num = metrics.students, len(metrics.students)
    least = metrics.teacher.val_accuracy - NEAR - 1e-9
    near = [name for name in metrics.by_size if students[name].val_accuracy >= least]
    within = f"{100 * NEAR:g} point"
    if num == 1:
        return next(iter(students)), ""
    if near:
        name = near[-1]
        rule = f"the smallest of {num} within {within} of the teacher"
        return name, f" (student {name}: {rule} on the validation images)"
    name = max(reversed(metrics.by_size), key=lambda name: students[name].val_accuracy)
    rule = f"the most accurate of {num} on the validation images, where none is within {within}"
    return name, f" (student {name}: {rule} of the teacher)"


def _as_columns(metrics: Metrics, measured: Measured) -> Table:
    teacher, students = metrics.teacher, metrics.by_size

    def each(text: Callable[[ModelFigures], str]) -> list[str]:
        return [text(teacher), *(text(student) for student in students.values())]

    def with_ratio(figure: Callable[[ModelFigures], int]) -> list[str]:
        own = figure(teacher)
        values = [figure(student) for student in students.values()]
        return [f"{own:,}", *(f"{value:,} ({_less(own / value)})" for value in values)]

    rows = [
        ("accuracy (test)", *each(lambda m: f"{m.test_accuracy:.2%}")),
        ("accuracy (validation)", *each(lambda m: f"{m.val_accuracy:.2%}")),
        ("parameters", *with_ratio(lambda m: m.num_parameters)),
        ("MACs per image", *with_ratio(lambda m: m.macs)),
        ("file bytes", *with_ratio(lambda m: m.file_bytes)),
    ]
    latency = measured.headline
    for index, entry in enumerate(latency["teacher"]):
        baseline = entry.median_ms
        cells = [f"{baseline:.2f}"]
        for name in students:
            median = latency[name][index].median_ms
            cells.append(f"{median:.2f} ({_faster(baseline / median)})")
        rows.append((f"latency, batch {entry.batch_size} (ms)", *cells))
    return Table("Teacher and students", ("", "teacher", *students), tuple(rows))


def _as_rows(metrics: Metrics, measured: Measured) -> Table:
    teacher = metrics.teacher
    latency = measured.headline
    figures = latency["teacher"]

    def row(name: str, model: ModelFigures | StudentFigures) -> tuple[str, ...]:
        is_teacher = model is teacher

        def share(own: float, whole: float) -> str:
            return "" if is_teacher else f" ({share_text(own / whole)})"

        pairs = list(zip(latency[name], figures, strict=True))
        return (
            name,
            f"{model.test_accuracy:.2%}",
            f"{model.val_accuracy:.2%}",
            count_text(model.num_parameters) + share(model.num_parameters, teacher.num_parameters),
            count_text(model.macs) + share(model.macs, teacher.macs),
            size_text(model.file_bytes) + share(model.file_bytes, teacher.file_bytes),
            *(
                f"{own.median_ms:.2f}"
                + ("" if is_teacher else f" ({whole.median_ms / own.median_ms:.2f}x)")
                for own, whole in pairs
            ),
        )

    sizes = ("parameters", "MACs", "file")
    times = (f"ms at batch {entry.batch_size} (speed)" for entry in figures)
    heads = ("model", "accuracy (test)", "accuracy (validation)", *sizes, *times)
    rows = [row("teacher", teacher), *(row(name, own) for name, own in metrics.by_size.items())]
    return Table("Teacher and students", heads, tuple(rows))


def _faster(speed: float) -> str:
    if 0.995 < speed < 1.005:
        return "as fast"
    return f"{speed:.2f}x faster" if speed > 1 else f"{1 / speed:.2f}x slower"


def _less(ratio: float) -> str:
    if 0.995 < ratio < 1.005:
        return "the same"
    return f"{ratio:.1f}x less" if ratio > 1 else f"{1 / ratio:.1f}x more"
