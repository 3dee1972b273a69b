"""The pull rule: who labels what next, when teachers and students come and go."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbkd.elastic.board import Board, Chunk


class Desk:
    """A board, and the files of what is done."""

    def __init__(self, patience_s: float = 10.0) -> None:
        self.files: set[Chunk] = set()
        self.board = Board(self.files.__contains__, patience_s)

    def finish(self, teacher: str, chunk: Chunk, now_s: float) -> None:
        self.files.add(chunk)
        self.board.finish(teacher, chunk, now_s)


def chunks(*numbers: int, view: int = 0) -> list[Chunk]:
    return [(view, number) for number in numbers]


def test_teachers_take_in_the_order_in_which_a_student_reads() -> None:
    desk = Desk()
    assert desk.board.want("s", chunks(3, 1, 2), 0.0) == []
    assert [desk.board.take(name, 0.0) for name in "abcd"] == [(0, 3), (0, 1), (0, 2), None]


def test_what_one_student_needs_now_goes_before_what_another_needs_later() -> None:
    desk = Desk()
    desk.board.want("one", chunks(0, 1, 2), 0.0)
    desk.board.want("two", chunks(2, 9), 0.0)
    assert [desk.board.take(name, 0.0) for name in "abcd"] == [(0, 0), (0, 2), (0, 1), (0, 9)]


def test_what_is_done_is_told_and_never_given_out_again() -> None:
    desk = Desk()
    desk.board.want("s", chunks(0, 1), 0.0)
    chunk = desk.board.take("a", 0.0)
    assert chunk is not None
    desk.finish("a", chunk, 1.0)
    assert desk.board.want("s", chunks(0, 1), 1.0) == [(0, 0)]
    assert desk.board.want("other", chunks(0), 1.0) == [(0, 0)]
    assert desk.board.take("a", 1.0) == (0, 1)
    assert desk.board.take("b", 1.0) is None


def test_what_a_lost_teacher_had_taken_is_the_next_ones() -> None:
    desk = Desk()
    desk.board.want("s", chunks(0, 1), 0.0)
    assert desk.board.take("a", 0.0) == (0, 0)
    desk.board.leave("a")
    assert desk.board.take("b", 0.0) == (0, 0)


def test_a_teacher_may_take_one_ahead_and_all_it_had_is_open_when_it_is_gone() -> None:
    desk = Desk(patience_s=10.0)
    desk.board.want("s", chunks(0, 1, 2), 0.0)
    assert [desk.board.take("a", time_s) for time_s in (0.0, 1.0)] == [(0, 0), (0, 1)]
    assert desk.board.take("b", 1.0) == (0, 2)
    desk.finish("a", (0, 0), 4.0)
    state = desk.board.stats(4.0).teachers["a"]
    assert (state.chunks, state.since_s, state.busy_s) == ([(0, 1)], 4.0, 4.0)
    desk.board.leave("a")
    assert desk.board.take("b", 5.0) == (0, 1)


def test_labels_that_could_not_be_written_are_open_again() -> None:
    desk = Desk(patience_s=10.0)
    desk.board.want("s", chunks(0), 0.0)
    assert desk.board.take("a", 0.0) == (0, 0)
    assert desk.board.stats(1.0).failure == ""
    desk.board.fail("a", (0, 0), "the disk is full", 2.0)
    stats = desk.board.stats(2.0)
    assert (stats.failure, stats.num_wanted) == ("a: the disk is full", 1)
    assert (stats.teachers["a"].chunks, stats.teachers["a"].num_done) == ([], 0)
    assert desk.board.take("b", 3.0) == (0, 0)


def test_a_late_chunk_is_done_again_by_one_idle_teacher_at_a_time() -> None:
    desk = Desk(patience_s=10.0)
    desk.board.want("s", chunks(0), 0.0)
    assert desk.board.take("slow", 0.0) == (0, 0)
    assert desk.board.take("b", 9.0) is None
    assert desk.board.take("b", 11.0) == (0, 0)
    assert desk.board.take("c", 12.0) is None
    desk.finish("b", (0, 0), 13.0)
    assert desk.board.want("s", chunks(0), 13.0) == [(0, 0)]
    desk.finish("slow", (0, 0), 14.0)  # late, and harmless
    assert desk.board.take("slow", 14.0) is None


def test_patience_grows_with_what_a_chunk_takes() -> None:
    desk = Desk(patience_s=1.0)
    desk.board.want("s", chunks(0, 1), 0.0)
    chunk = desk.board.take("a", 0.0)
    assert chunk is not None
    desk.finish("a", chunk, 5.0)
    assert desk.board.patience_s == 15.0


def test_a_board_that_is_lost_is_made_anew_from_what_students_say() -> None:
    desk = Desk()
    desk.board.want("s", chunks(0, 1), 0.0)
    assert desk.board.take("a", 0.0) == (0, 0)
    desk.board = Board(desk.files.__contains__, 10.0)
    desk.finish("a", (0, 0), 1.0)  # of the old board
    assert desk.board.want("s", chunks(0, 1), 1.0) == [(0, 0)]
    assert desk.board.take("a", 1.0) == (0, 1)


def test_stats_tell_who_waits_for_whom() -> None:
    desk = Desk()
    desk.board.want("s", chunks(0, 1, 2), 1.0)
    desk.board.want("s", chunks(0, 1, 2), 2.0)
    desk.board.take("a", 2.0)
    stats = desk.board.stats(4.0)
    assert stats.waiting == {"s": 3.0}
    assert stats.num_wanted == 2
    assert stats.teachers["a"].chunks == [(0, 0)]
    desk.finish("a", (0, 0), 5.0)
    desk.board.want("s", chunks(0, 1, 2), 5.0)
    stats = desk.board.stats(6.0)
    assert stats.waiting == {}
    assert (stats.teachers["a"].num_done, stats.teachers["a"].busy_s) == (1, 3.0)
    assert desk.board.stats(100.0).num_wanted == 0  # the student was not heard of for long
    desk.board.want("s", chunks(1), 101.0)
    desk.board.leave_student("s")
    assert desk.board.take("b", 101.0) is None


def simulate(
    rates: list[float], num_students: int, num_chunks: int, events: random.Random | None = None
) -> tuple[float, dict[str, list[Chunk]], list[Chunk]]:
    """Teachers that take 1 / rate seconds a chunk, fast students that ask for two per teacher.

    Returns the time at which all students have read all, what each read, and what was labelled.
    """
    desk, now, window = Desk(patience_s=5.0), 0.0, 2 * len(rates)
    read: dict[str, list[Chunk]] = {f"s{i}": [] for i in range(num_students)}
    ahead = {name: chunks(*range(num_chunks), view=i) for i, name in enumerate(read)}
    labelled: list[Chunk] = []
    queue: list[tuple[float, str, Chunk | None]] = [(0.0, f"t{i}", None) for i in range(len(rates))]
    heapq.heapify(queue)
    while any(ahead.values()):
        now, name, chunk = heapq.heappop(queue)
        if events is not None and chunk is not None and events.random() < 0.05:
            desk.board.leave(name)  # killed in the middle; another one comes
            heapq.heappush(queue, (now + 0.5, name, None))
            continue
        if chunk is not None:
            labelled.append(chunk)
            desk.finish(name, chunk, now)
        for student, left in ahead.items():
            for done in desk.board.want(student, left[:window], now):
                read[student].append(done)
                left.remove(done)
            desk.board.want(student, left[:window], now)
        taken = desk.board.take(name, now)
        wait_s = 1 / rates[int(name[1:])] if taken is not None else 0.05
        heapq.heappush(queue, (now + wait_s, name, taken))
    return now, read, labelled


@pytest.mark.parametrize(("num_teachers", "num_students"), [(16, 4), (64, 8)])
def test_the_teachers_rates_are_used_whatever_they_are(
    num_teachers: int, num_students: int
) -> None:
    rates = [(1.0, 2.0, 4.0, 8.0)[i % 4] for i in range(num_teachers)]
    num_chunks = 100 * num_teachers // num_students
    time_s, read, labelled = simulate(rates, num_students, num_chunks)
    assert all(len(own) == len(set(own)) == num_chunks for own in read.values())
    assert len(read) * num_chunks / time_s >= 0.97 * sum(rates)
    assert len(labelled) < 1.01 * len(read) * num_chunks


@given(seed=st.integers(0, 10**6), num_teachers=st.integers(1, 6), num_students=st.integers(1, 3))
def test_nothing_is_lost_or_doubled_when_teachers_die(
    seed: int, num_teachers: int, num_students: int
) -> None:
    events = random.Random(seed)
    rates = [events.choice([0.5, 1.0, 5.0]) for _ in range(num_teachers)]
    _, read, _ = simulate(rates, num_students, 20, events)
    for view, own in enumerate(read.values()):
        assert sorted(own) == chunks(*range(20), view=view)
