"""Elastic teachers as a table: who labels what, how fast, and who waits for whom."""

from __future__ import annotations

from pbkd.elastic.status import TeachersStatus, TeacherStatus
from pbkd.report.tables import Table

_HEADS = ("teacher", "where", "does", "for (s)", "images", "images/s")


def teacher_table(status: TeachersStatus) -> Table:
    """A row per teacher."""
    rows = tuple((name, *_cells(teacher)) for name, teacher in status.teachers.items())
    return Table("Elastic teachers", _HEADS, rows)


def teacher_lines(status: TeachersStatus) -> list[str]:
    """What students wait for, and the last thing that went wrong."""
    waiting = [f"{name[:8]} for {s:.1f} s" for name, s in status.waiting.items()]
    lines = [
        f"Queue: {status.num_wanted} chunks of {status.chunk_images} images wanted and not taken.",
        f"Students without labels: {', '.join(waiting)}." if waiting else "No student waits.",
    ]
    if status.last_error:
        lines.append(f"Last trouble: {status.last_error}")
    return lines


def _cells(teacher: TeacherStatus) -> tuple[str, ...]:
    where = f"{teacher.host}, {teacher.device}, process {teacher.pid}" if teacher.pid else ""
    if not teacher.pid:
        does = "starts"
    elif teacher.chunk is None:
        does = "waits for work"
    else:
        does = f"view {teacher.view}, chunk {teacher.chunk}"
    rate = f"{teacher.rate:.0f}" if teacher.rate is not None else ""
    return where, does, f"{teacher.for_s:.1f}", f"{teacher.num_images:,}", rate
