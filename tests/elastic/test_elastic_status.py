"""What `pbkd teachers` shows, and where it comes from."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pbkd.artifacts import write_json
from pbkd.elastic.status import TeachersStatus, TeacherStatus, read_status
from pbkd.errors import ArtifactError
from pbkd.report.teachers import teacher_lines, teacher_table


def status(age_s: float = 0.0, **changes: object) -> TeachersStatus:
    teachers = {
        "teacher-1": TeacherStatus(
            host="node", pid=7, device="cuda:0", view=1, chunk=5, for_s=0.5, num_images=512, rate=99
        ),
        "teacher-2": TeacherStatus(host="node", pid=8, device="cpu", for_s=3.0),
        "teacher-3": TeacherStatus(for_s=2.0),
    }
    values = {"teachers": teachers, "waiting": {}, "num_wanted": 4, "chunk_images": 256} | changes
    return TeachersStatus.model_validate({"time": time.time() - age_s, **values})


def test_a_row_says_who_does_what_and_how_fast() -> None:
    rows = {row[0]: row[1:] for row in teacher_table(status()).rows}
    assert rows["teacher-1"] == (
        "node, cuda:0, process 7",
        "view 1, chunk 5",
        "0.5",
        "512",
        "99",
    )
    assert rows["teacher-2"][1:] == ("waits for work", "3.0", "0", "")
    assert rows["teacher-3"][:2] == ("", "starts")


def test_lines_say_who_waits_and_what_went_wrong() -> None:
    assert teacher_lines(status()) == [
        "Queue: 4 chunks of 256 images wanted and not taken.",
        "No student waits.",
    ]
    lines = teacher_lines(status(waiting={"abcdefghijk": 2.5}, last_error="killed"))
    assert lines[1] == "Students without labels: abcdefgh for 2.5 s."
    assert lines[2] == "Last trouble: killed"


def test_a_file_that_nobody_writes_any_more_is_no_pool(tmp_path: Path) -> None:
    path = tmp_path / "teachers.json"
    assert read_status(path) is None
    write_json(path, status())
    found = read_status(path)
    assert found is not None
    assert found.teachers == status().teachers
    write_json(path, status(age_s=60.0))
    assert read_status(path) is None
    path.write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        read_status(path)
