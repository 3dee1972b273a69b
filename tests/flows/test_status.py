"""What is known of a run: stages, candidates and blocks, epochs, and the planned time."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from flows import status as module
from flows.status import IS_EVENT, CandidateStatus, RunStatus, seconds_text

NAMES = ["a/x", "a/y", "b/x"]


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def status(clock: Clock) -> RunStatus:
    status = RunStatus(clock)
    status.begin_phase(candidates(), max_epochs=10, planned_s=20.0)
    return status


@pytest.fixture
def events() -> Iterator[list[str]]:
    """Messages of all events."""
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert getattr(record, IS_EVENT)
            texts.append(record.getMessage())

    handler, level = Keep(), module.log.level
    module.log.addHandler(handler)
    module.log.setLevel(logging.INFO)
    yield texts
    module.log.setLevel(level)
    module.log.removeHandler(handler)


def candidates(state: str = "waiting") -> list[CandidateStatus]:
    return [CandidateStatus(*name.split("/"), state=state) for name in NAMES]  # type: ignore[arg-type]


def states(status: RunStatus) -> dict[str, str]:
    assert status.phase is not None
    return {block.name: block.state for block in status.phase.blocks}


def finish(status: RunStatus, *names: str) -> None:
    for name in names:
        status.finish(name, 4, 0.25, 0.5, 0.01, training_s=2.0)


def test_a_block_is_what_its_candidates_are(status: RunStatus) -> None:
    assert states(status) == {"a": "waiting", "b": "waiting"}
    status.start_job(["a/x", "a/y"], "cpu-0")
    assert states(status) == {"a": "running", "b": "waiting"}
    finish(status, "a/x")
    assert states(status)["a"] == "running"
    finish(status, "a/y")
    status.start_job(["b/x"], "cpu-1")
    status.fail_job(["b/x"], "killed")
    assert states(status) == {"a": "done", "b": "failed"}
    assert status.phase is not None
    assert status.phase.counts == {"done": 1, "failed": 1}


def test_a_job_that_is_tried_again_leaves_alone_what_is_done(
    status: RunStatus, events: list[str]
) -> None:
    status.start_job(["a/x", "a/y"], "cpu-0")
    finish(status, "a/x")
    status.fail_job(["a/x", "a/y"], "killed")
    status.start_job(["a/x", "a/y"], "cpu-1")
    assert status.phase is not None
    (a, _) = status.phase.blocks
    assert [(c.state, c.worker) for c in a.candidates] == [("done", "cpu-0"), ("running", "cpu-1")]
    assert a.workers == ("cpu-0", "cpu-1")
    assert events == ["failed: a/y: killed"]


def test_a_block_takes_from_its_first_start_to_its_last_end(
    status: RunStatus, clock: Clock, events: list[str]
) -> None:
    assert status.phase is not None
    assert status.phase.blocks[0].duration_s(clock()) is None
    status.start_job(["a/x"], "cpu-0")
    clock.now_s += 9
    status.begin("a/x")
    clock.now_s += 3
    finish(status, "a/x")
    clock.now_s += 2
    status.start_job(["a/y"], "cpu-0")
    status.begin("a/y")
    clock.now_s += 1
    status.begin("a/y")
    assert status.phase.blocks[0].duration_s(clock()) == 6
    finish(status, "a/y")
    clock.now_s += 50
    assert status.phase.blocks[0].duration_s(clock()) == 6
    assert events == ["block a: done in 6.0 s, 1 of 2"]


def test_the_share_counts_epochs_and_leaves_out_what_was_there(status: RunStatus) -> None:
    status.advance("a/x", 5, 0.5)
    assert status.phase is not None
    assert status.phase.share() == pytest.approx(5 / 30)
    finish(status, "a/x")  # after 4 of 10 epochs: it stopped early
    assert status.phase.share() == pytest.approx(10 / 30)
    assert status.phase.share(status.phase.blocks[0].candidates) == pytest.approx(10 / 20)
    status.begin_phase(candidates("stored"), max_epochs=10, planned_s=None)
    assert status.phase.share() == 1.0


def test_what_is_left_is_the_plan_from_the_first_training_on(
    status: RunStatus, clock: Clock
) -> None:
    assert status.phase is not None
    clock.now_s += 7
    status.start_job(["a/x", "b/x"], "cpu-0")
    clock.now_s += 7  # the worker loads torch
    assert status.phase.left_s(clock()) == 20
    status.begin("a/x")
    clock.now_s += 5
    status.begin("b/x")
    assert status.phase.left_s(clock()) == 15
    clock.now_s += 17
    assert status.phase.left_s(clock()) == -2
    status.begin_phase(candidates(), max_epochs=10, planned_s=None)
    assert status.phase.left_s(clock()) is None


def test_what_a_caller_has_of_a_phase_does_not_change(status: RunStatus) -> None:
    before = status.phase
    status.start_job(NAMES, "cpu-0")
    assert before is not None
    assert before.counts == {"waiting": 2}


def test_stages_and_their_events(clock: Clock, events: list[str]) -> None:
    status = RunStatus(clock)
    status.list_stages(["prepare", "distill", "stitch", "evaluate"])
    with status.stage("prepare"):
        status.skip("prepare")
    with status.stage("distill"):
        clock.now_s += 65
        with status.stage("distill"):  # the sub-flow, which may run alone
            clock.now_s += 1
        assert status.stages[1].state == "running"
    with pytest.raises(ZeroDivisionError), status.stage("stitch"):
        raise ZeroDivisionError
    assert [stage.state for stage in status.stages] == ["up to date", "done", "failed", "waiting"]
    assert status.stages[1].duration_s(clock()) == 66
    assert events == [
        "prepare: up to date",
        "distill: done in 1 min 06 s",
        "stitch: failed after 0.0 s",
    ]


def test_after_the_phase_nothing_is_counted(status: RunStatus) -> None:
    status.end_phase()
    finish(status, "a/x")
    status.start_job(["a/x"], "cpu-0")
    assert status.phase is None


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (-1, "0.0 s"),
        (4.24, "4.2 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (187, "3 min 07 s"),
        (7384, "2 h 03 min"),
    ],
)
def test_durations_as_text(duration_s: float, text: str) -> None:
    assert seconds_text(duration_s) == text
