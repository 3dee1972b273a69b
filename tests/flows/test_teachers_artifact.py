"""Elastic teachers as a table in Prefect."""

from __future__ import annotations

import time
from typing import Any

import pytest

from flows import progress
from pbkd.elastic.status import TeachersStatus, TeacherStatus

STATUS = TeachersStatus(
    time=time.time(),
    teachers={"teacher-1": TeacherStatus(host="node", pid=7, device="cpu", rate=12.0)},
    waiting={},
    num_wanted=3,
    chunk_images=256,
)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(progress, "create_table_artifact", lambda **call: calls.append(call))
    return calls


def test_it_is_shown_now_and_then_within_a_task(
    shown: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.TaskRunContext, "get", lambda: object())
    show = progress.teachers_artifact()
    show(STATUS)
    show(STATUS)
    (call,) = shown
    assert call["key"] == "elastic-teachers"
    assert call["table"][0]["teacher"] == "teacher-1"
    assert call["table"][0]["images/s"] == "12"
    assert "3 chunks of 256 images" in call["description"]
    monkeypatch.setattr(progress, "_TEACHERS_PERIOD_S", 0.0)
    show(STATUS)
    assert len(shown) == 2


def test_outside_of_a_task_nothing_is_shown(shown: list[dict[str, Any]]) -> None:
    progress.teachers_artifact()(STATUS)
    assert shown == []
