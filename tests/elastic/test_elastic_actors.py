"""The board's actor holds who has nothing to do; teachers try again what could not be written."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pbkd.elastic import actors
from pbkd.elastic.actors import BoardActor, work_on
from pbkd.elastic.board import Chunk
from pbkd.elastic.label_plan import LabelPlan


@pytest.fixture
def plan(tmp_path: Path) -> LabelPlan:
    """Of ten chunks; a file in its place makes one done."""
    return LabelPlan(
        keys=("view",), teacher=tmp_path, prepared=tmp_path, seed=0, top=None, temperature=1.0,
        store=tmp_path / "store", folder=tmp_path / "labels", num_images=10, chunk=1,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "end_with_parent", lambda _: None)


def written(plan: LabelPlan, chunk: Chunk) -> None:
    plan.path(chunk).parent.mkdir(parents=True, exist_ok=True)
    plan.path(chunk).touch()


def answers(*questions: Coroutine[Any, Any, Any]) -> list[Any]:
    """What questions that are asked one after the other, none awaited, are answered with."""

    async def ask() -> list[Any]:
        tasks = []
        for question in questions:
            tasks.append(asyncio.ensure_future(question))
            await asyncio.sleep(0.02)
        return await asyncio.gather(*tasks)

    return asyncio.run(ask())


def test_an_idle_teacher_gets_a_chunk_as_soon_as_one_is_wanted(plan: LabelPlan) -> None:
    board = BoardActor(plan)
    began_s = time.monotonic()
    taken, _ = answers(board.turn("a"), board.want("s", [(0, 0)]))
    assert taken == (0, 0)
    assert time.monotonic() - began_s < 0.3
    (nothing,) = answers(board.turn("b"))
    assert nothing is None
    assert time.monotonic() - began_s > 0.5


def test_a_waiting_student_hears_when_its_first_chunk_is_done(plan: LabelPlan) -> None:
    board = BoardActor(plan)

    async def label(chunk: Chunk) -> None:
        written(plan, chunk)
        await board.turn("a", chunk)

    began_s = time.monotonic()
    (done, _), *_ = answers(
        board.want("s", [(0, 0), (0, 1)], 5.0),
        board.turn("a"),
        board.turn("a"),
        label((0, 1)),  # not the first one
        label((0, 0)),
    )
    assert done == [(0, 0), (0, 1)]
    assert time.monotonic() - began_s < 2.0
    ((done, _),) = answers(board.want("s", [(0, 2)]))  # not held
    assert done == []


def test_a_lost_teachers_last_question_takes_nothing(plan: LabelPlan) -> None:
    board = BoardActor(plan)
    answers(board.want("s", [(0, 0)]))
    lost, _, nothing = answers(board.turn("a"), board.leave("a"), board.turn("a"))
    assert (lost, nothing) == ((0, 0), None)
    (taken,) = answers(board.turn("b"))
    assert taken == (0, 0), "it is open again"


def test_a_board_loads_no_torch() -> None:
    code = "import sys, pbkd.elastic.actors; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


class Calls:
    """A board's actor in this process; every call is done at once."""

    def __init__(self, *chunks: Chunk) -> None:
        self.open = list(chunks)
        self.heard: list[tuple[Chunk | None, str]] = []
        self.turn = SimpleNamespace(remote=self._turn)

    def _turn(self, name: str, labelled: Chunk | None, failure: str) -> Chunk:
        assert name == "a"
        self.heard.append((labelled, failure))
        if not self.open:
            raise SystemExit  # killed
        return self.open.pop(0)


def test_a_teacher_that_cannot_write_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "ray_module", lambda: SimpleNamespace(get=lambda value: value))
    monkeypatch.setattr(actors, "_PAUSE_S", 0.0)
    board, is_full = Calls((0, 0), (0, 1), (0, 0), (0, 2)), [True, False, False]

    def label(chunk: Chunk) -> None:
        if is_full.pop(0):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit):
        work_on("a", board, label)
    assert board.heard[:2] == [(None, ""), (None, "")], "one chunk, and one ahead"
    chunk, failure = board.heard[2]
    assert chunk == (0, 0)
    assert "No space left" in failure
    assert board.heard[3:] == [((0, 1), ""), ((0, 0), "")]
