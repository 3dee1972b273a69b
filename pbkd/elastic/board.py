"""Which chunk of images a teacher labels next: a free teacher takes what a student needs first.

The board knows no clock and no network. Students say what they will read next, teachers take, and
what is done lies in files, so that a board that is lost is made anew from its students' next words.

A chunk that a teacher has taken is given to another one when that teacher leaves, and also when
nothing else is left to do and it has been out for longer than ``patience_s``: a teacher that hangs,
or is far slower than the others, holds nobody up. Whoever is first counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

Chunk = tuple[int, int]
"""(view, number of the chunk in the order in which the view is first shown)."""


_PATIENCE = 3.0
"""Times a chunk's mean duration after which one that is out is late."""
_SILENCE_S = 60.0


@dataclass
class TeacherState:
    """A teacher as the board sees it; times are the caller's, seconds.

    Attributes:
        since_s: when it took up its first chunk, or began to wait.
        chunks: that it has taken: one in work, and one or none ahead.
    """

    since_s: float
    chunks: list[Chunk] = field(default_factory=list)
    num_done: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class Stats:
    """What is going on.

    Attributes:
        teachers: name to its state.
        waiting: students that have nothing to read, to how long they have waited, in seconds.
        num_wanted: chunks that students want and nobody has taken.
        now_s: the caller's time.
        patience_s: see ``Board.patience_s``.
        failure: why labels could not be written the last time, with the teacher's name.
    """

    teachers: dict[str, TeacherState]
    waiting: dict[str, float]
    num_wanted: int
    now_s: float
    patience_s: float
    failure: str


@dataclass
class _Student:
    wanted: list[Chunk] = field(default_factory=list)
    waits_since_s: float | None = None
    heard_s: float = 0.0


class Board:
    """The pull rule.

    Args:
        is_done: whether a chunk's labels are there; asked only of what a student wants and of which
            no teacher has said so.
        patience_s: the least ``patience_s``; chunks that take long raise it.
    """

    def __init__(self, is_done: Callable[[Chunk], bool], patience_s: float) -> None:
        self._is_done = is_done
        self._patience_s = patience_s
        self._students: dict[str, _Student] = {}
        self._teachers: dict[str, TeacherState] = {}
        self._missing: set[Chunk] = set()
        self._failure = ""

    def want(self, student: str, chunks: Iterable[Chunk], now_s: float) -> list[Chunk]:
        """A student will read these next, in this order; returns those that are done.

        It waits while the first one is not.
        """
        wanted = list(chunks)
        done = [chunk for chunk in wanted if self._look(chunk)]
        state = self._students.setdefault(student, _Student())
        state.heard_s = now_s
        state.wanted = [chunk for chunk in wanted if chunk not in done]
        if not wanted or wanted[0] in done:
            state.waits_since_s = None
        elif state.waits_since_s is None:
            state.waits_since_s = now_s
        return done

    def leave_student(self, student: str) -> None:
        """A student has all it wants, or is gone."""
        self._students.pop(student, None)

    def take(self, teacher: str, now_s: float) -> Chunk | None:
        """What a teacher is to label next, or after what it has; None: nothing, ask again."""
        state = self._teachers.setdefault(teacher, TeacherState(now_s))
        chunk = next(self._open(now_s), None)
        if chunk is not None:
            if not state.chunks:
                state.since_s = now_s
            state.chunks.append(chunk)
        return chunk

    def is_busy(self, teacher: str) -> bool:
        """Whether a teacher has a chunk in work."""
        return bool(self._teachers[teacher].chunks)

    def finish(self, teacher: str, chunk: Chunk, now_s: float) -> None:
        """A teacher's labels of a chunk are written."""
        self._missing.discard(chunk)
        state = self._teachers.get(teacher)
        if state is None or chunk not in state.chunks:  # a new board, or it was thought lost
            return
        state.chunks.remove(chunk)
        state.num_done += 1
        state.busy_s += now_s - state.since_s
        state.since_s = now_s

    def fail(self, teacher: str, chunk: Chunk, reason: str, now_s: float) -> None:
        """A teacher's labels of a chunk could not be written; it is open again."""
        self._failure = f"{teacher}: {reason}"
        state = self._teachers.get(teacher)
        if state is not None and chunk in state.chunks:
            state.chunks.remove(chunk)
            state.since_s = now_s

    def leave(self, teacher: str) -> None:
        """A teacher is gone; what it had taken is open again."""
        self._teachers.pop(teacher, None)

    @property
    def patience_s(self) -> float:
        """After which an idle teacher does again what another one has not finished."""
        num_done = sum(state.num_done for state in self._teachers.values())
        busy_s = sum(state.busy_s for state in self._teachers.values())
        return max(self._patience_s, _PATIENCE * busy_s / num_done if num_done else 0.0)

    def stats(self, now_s: float) -> Stats:
        """The present state; students that have died without a word are forgotten."""
        for name, student in list(self._students.items()):
            if now_s - student.heard_s > _SILENCE_S:
                self.leave_student(name)
        waiting = {
            name: now_s - state.waits_since_s
            for name, state in self._students.items()
            if state.waits_since_s is not None
        }
        taken = {chunk for state in self._teachers.values() for chunk in state.chunks}
        num_wanted = sum(chunk not in taken for chunk in self._wanted())
        return Stats(
            dict(self._teachers), waiting, num_wanted, now_s, self.patience_s, self._failure
        )

    def _open(self, now_s: float) -> Iterator[Chunk]:
        """What may be taken, the most urgent first."""
        since: dict[Chunk, float] = {}
        for state in self._teachers.values():
            for chunk in state.chunks:
                since[chunk] = max(state.since_s, since.get(chunk, state.since_s))
        wanted = self._wanted()
        yield from (chunk for chunk in wanted if chunk not in since)
        late = [chunk for chunk in wanted if chunk in since]
        yield from (chunk for chunk in late if now_s - since[chunk] > self.patience_s)

    def _wanted(self) -> list[Chunk]:
        """What students want and is not done, by how soon one of them reads it."""
        places: dict[Chunk, int] = {}
        for student in self._students.values():
            for place, chunk in enumerate(student.wanted):
                if chunk in self._missing:
                    places[chunk] = min(place, places.get(chunk, place))
        return sorted(places, key=places.__getitem__)

    def _look(self, chunk: Chunk) -> bool:
        """Whether a chunk is done; a file that was there may have been damaged, and deleted."""
        if chunk in self._missing:
            return False
        if not self._is_done(chunk):
            self._missing.add(chunk)
            return False
        return True
