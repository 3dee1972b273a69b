"""The report's tables as rows of text, for the terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pbkd.blocks import Discovery
from pbkd.plan import Job, place
from pbkd.report.results import Measured, Metrics, ModelFigures

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Table:
    """A title, column heads, and rows of text; the first column names the row."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def summary_sentence(metrics: Metrics, measured: Measured) -> str:
    """One sentence for the smallest student."""
    name, student = min(metrics.students.items(), key=lambda item: item[1].file_bytes)
    share = student.file_bytes / metrics.teacher.file_bytes
    points = 100 * (student.test_accuracy - metrics.teacher.test_accuracy)
    speed = _speedup(measured, name, batch_size=1)
    faster = "" if speed is None else f", {_faster(speed)} at batch 1"
    return f"The teacher at {share:.0%} of its bytes{faster}, {points:+.1f} points of accuracy."


def final_table(metrics: Metrics, measured: Measured) -> Table:
    """Teacher against students, a column each; ratios are to the teacher."""
    teacher = metrics.teacher
    students = metrics.students
    rows = [
        ("accuracy (test)", *_each(metrics, lambda m: f"{m.test_accuracy:.2%}")),
        ("accuracy (validation)", *_each(metrics, lambda m: f"{m.val_accuracy:.2%}")),
        (
            "parameters",
            *_with_ratio(teacher.num_parameters, [s.num_parameters for s in students.values()]),
        ),
        ("MACs per image", *_with_ratio(teacher.macs, [s.macs for s in students.values()])),
        ("file bytes", *_with_ratio(teacher.file_bytes, [s.file_bytes for s in students.values()])),
    ]
    for index, entry in enumerate(measured.latency["teacher"]):
        baseline = entry.median_ms
        cells = [f"{baseline:.2f}"]
        for name in students:
            median = measured.latency[name][index].median_ms
            cells.append(f"{median:.2f} ({baseline / median:.2f}x)")
        rows.append((f"latency, batch {entry.batch_size} (ms)", *cells))
    return Table("Teacher and students", ("", "teacher", *students), tuple(rows))


def accuracy_table(metrics: Metrics) -> Table:
    """How each student's validation accuracy came about."""
    rows = [
        (
            name,
            f"{student.blocks_replaced} of {student.blocks_total}",
            f"{student.stitched_val_accuracy:.2%}",
            f"{student.recalibrated_val_accuracy:.2%}",
            f"{student.finetuned_val_accuracy:.2%}",
            f"{metrics.teacher.val_accuracy:.2%}",
        )
        for name, student in metrics.students.items()
    ]
    heads = ("student", "blocks replaced", "stitched", "recalibrated", "fine-tuned", "teacher")
    return Table("Validation accuracy, step by step", heads, tuple(rows))


def stage_table(measured: Measured) -> Table:
    """Wall time and energy of each stage's last run on this machine."""
    rows = []
    for name, figures in measured.stages.items():
        energy = [value for value in figures.energy_j.values() if value is not None]
        joules = f"{sum(energy):.0f}" if energy else NOT_MEASURED
        rows.append((name, f"{figures.duration_s:.1f}", joules))
    return Table("Wall time per stage", ("stage", "seconds", "energy (J)"), tuple(rows))


def discovery_tables(discovery: Discovery) -> list[Table]:
    """The blocks with their candidates, and what was refused."""
    rows = []
    for block in discovery.blocks:
        for index, candidate in enumerate(block.candidates):
            facts = (
                block.path,
                block.module,
                f"{_shape(block.input_shape)} to {_shape(block.output_shape)}",
                f"{block.num_parameters:,} ({block.share_of_parameters:.0%})",
                f"{block.macs:,} ({block.share_of_macs:.0%})",
            )
            smaller = f"{candidate.num_parameters:,} / {candidate.macs:,}"
            rows.append((*(facts if index == 0 else ("",) * 5), candidate.name, smaller))
    heads = ("block", "module", "shapes", "parameters", "MACs", "candidate", "parameters / MACs")
    tables = [Table("Blocks", heads, tuple(rows))]
    left_out = [(item.name, item.reason) for item in discovery.refused]
    for block in discovery.blocks:
        left_out += [(f"{block.path}: {item.name}", item.reason) for item in block.rejected]
    if left_out:
        tables.append(Table("Left out", ("what", "why"), tuple(left_out)))
    return tables


def plan_tables(plans: Mapping[int, list[Job]]) -> list[Table]:
    """The jobs for the largest number of workers, and the predicted gain for each number."""
    jobs = plans[max(plans)]
    total = sum(job.cost for job in jobs)
    job_rows = [
        (job.job_id, ", ".join(job.trainees), f"{job.cost / 1e9:.1f}", f"{job.cost / total:.0%}")
        for job in jobs
    ]
    gain_rows = []
    for number, own_jobs in plans.items():
        placed = place(own_jobs, number)
        gain_rows.append(
            (
                str(number),
                str(len(own_jobs)),
                f"{placed.makespan / 1e9:.1f}",
                f"{placed.bound / 1e9:.1f}",
                f"{placed.speedup:.2f}",
                f"{placed.speedup / number:.0%}",
            )
        )
    heads = ("workers", "jobs", "makespan (GMAC)", "bound (GMAC)", "speed-up", "efficiency")
    return [
        Table(
            f"Jobs for {max(plans)} workers", ("job", "trainees", "GMAC", "share"), tuple(job_rows)
        ),
        Table("Predicted, from multiply-accumulates", heads, tuple(gain_rows)),
    ]


def block_phase_sentence(measured: Measured) -> str:
    """What the parallel block phase gained."""
    phase = measured.block_phase
    if phase is None:
        return f"Block phase: {NOT_MEASURED} (no block was trained on this machine)."
    return (
        f"Block phase: {phase.num_jobs} jobs on {phase.num_workers} workers, {phase.wall_s:.1f} s; "
        f"{phase.jobs_s:.1f} s of work, speed-up {phase.speedup:.2f}."
    )


def _speedup(measured: Measured, student: str, batch_size: int) -> float | None:
    for teacher, own in zip(measured.latency["teacher"], measured.latency[student], strict=True):
        if teacher.batch_size == batch_size:
            return teacher.median_ms / own.median_ms
    return None


def _faster(speed: float) -> str:
    return f"{speed:.1f}x faster" if speed >= 1 else f"{1 / speed:.1f}x slower"


def _each(metrics: Metrics, text: Callable[[ModelFigures], str]) -> list[str]:
    return [text(metrics.teacher), *(text(student) for student in metrics.students.values())]


def _with_ratio(teacher: int, students: list[int]) -> list[str]:
    return [f"{teacher:,}", *(f"{value:,} ({teacher / value:.1f}x less)" for value in students)]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
