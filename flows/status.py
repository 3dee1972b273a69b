"""What is known of a run while it runs: its stages, and the candidates of its block phase.

The flows report here; the terminal (``live``) and Prefect's artifacts (``artifacts``) show it. Each
event is a log line as well: for Prefect, and where the terminal has no live display.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

log = logging.getLogger(__name__)

IS_EVENT = "is_event"
"""Attribute of the log records that say nothing but what a live display shows."""

State = Literal["waiting", "running", "done", "stored", "failed"]
"""Of a candidate or a block; "stored": an earlier run has made it."""

WORDS: dict[State, str] = {
    "waiting": "waiting",
    "running": "running",
    "done": "done",
    "stored": "from the store",
    "failed": "failed",
}

StageState = Literal["waiting", "running", "done", "up to date", "failed"]


@dataclass(frozen=True)
class StageStatus:
    """A stage; times are the status's, in seconds."""

    name: str
    state: StageState = "waiting"
    started_s: float = 0.0
    ended_s: float | None = None

    def duration_s(self, now_s: float) -> float:
        """Seconds since its start, or that it took."""
        return (now_s if self.ended_s is None else self.ended_s) - self.started_s


@dataclass(frozen=True)
class CandidateStatus:
    """A candidate of a block; times are the status's, in seconds.

    Attributes:
        worker: the slot that has or had it; None: none yet.
        num_epochs: that it has behind it in this run.
        val_loss: its latest; its best once it is done.
        damage_kl, accuracy_drop: once it is scored.
        training_s: what its training took; once it is done.
    """

    block: str
    name: str
    state: State = "waiting"
    worker: str | None = None
    num_epochs: int = 0
    val_loss: float | None = None
    damage_kl: float | None = None
    accuracy_drop: float | None = None
    training_s: float | None = None
    started_s: float | None = None
    ended_s: float | None = None

    @property
    def key(self) -> str:
        """``block/candidate``, as trainees are named."""
        return f"{self.block}/{self.name}"

    def duration_s(self, now_s: float) -> float | None:
        """Seconds since its start, or that its training took; None: it has not started."""
        if self.training_s is not None or self.started_s is None:
            return self.training_s
        return (now_s if self.ended_s is None else self.ended_s) - self.started_s


@dataclass(frozen=True)
class BlockStatus:
    """A block, by what its candidates are."""

    name: str
    candidates: tuple[CandidateStatus, ...]

    @property
    def state(self) -> State:
        """Failed or running as soon as one candidate is; done when all are."""
        states = {candidate.state for candidate in self.candidates}
        for state in ("failed", "running", "waiting", "done"):
            if state in states:
                return state
        return "stored"

    @property
    def workers(self) -> tuple[str, ...]:
        """The slots that have or had its candidates."""
        workers = (candidate.worker for candidate in self.candidates)
        return tuple(dict.fromkeys(worker for worker in workers if worker is not None))

    def duration_s(self, now_s: float) -> float | None:
        """Seconds since its first candidate began, or that it took; None: nothing has begun."""
        starts = [c.started_s for c in self.candidates if c.started_s is not None]
        if not starts:
            return None
        ends = [c.ended_s for c in self.candidates if c.ended_s is not None]
        is_over = self.state not in ("running", "waiting")
        return (max(ends) if is_over and ends else now_s) - min(starts)


@dataclass(frozen=True)
class Phase:
    """The block phase.

    Attributes:
        max_epochs: of a candidate's training.
        planned_s: predicted wall time from the first training's start; None: there is no plan.
        started_s: that start, in the status's seconds; None: workers still load, if any work.
    """

    candidates: dict[str, CandidateStatus]
    max_epochs: int
    planned_s: float | None
    started_s: float | None = None

    @property
    def blocks(self) -> list[BlockStatus]:
        """In the order of the network."""
        grouped: dict[str, list[CandidateStatus]] = {}
        for candidate in self.candidates.values():
            grouped.setdefault(candidate.block, []).append(candidate)
        return [BlockStatus(name, tuple(own)) for name, own in grouped.items()]

    @property
    def counts(self) -> dict[State, int]:
        """Blocks by state; only states that there are."""
        return dict(Counter(block.state for block in self.blocks))

    def share(self, candidates: Iterable[CandidateStatus] | None = None) -> float:
        """Share of all epochs that is behind these candidates, or behind all; in [0, 1]."""
        own = list(self.candidates.values() if candidates is None else candidates)
        todo = [candidate for candidate in own if candidate.state != "stored"]
        if not todo:
            return 1.0
        return sum(map(self._epochs, todo)) / (self.max_epochs * len(todo))

    def left_s(self, now_s: float) -> float | None:
        """What is left of the planned time, negative once it is over; None without a plan."""
        if self.planned_s is None:
            return None
        return self.planned_s - (0.0 if self.started_s is None else now_s - self.started_s)

    def _epochs(self, candidate: CandidateStatus) -> int:
        """One that stopped early counts as through."""
        is_through = candidate.state in ("done", "stored")
        return self.max_epochs if is_through else min(candidate.num_epochs, self.max_epochs)


class RunStatus:
    """The state of a run; called from many threads.

    Args:
        clock: seconds from any zero, never backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stages: dict[str, StageStatus] = {}
        self._phase: Phase | None = None
        self.began_s = clock()

    def now_s(self) -> float:
        """The time of all that it says, in seconds from any zero."""
        return self._clock()

    @property
    def stages(self) -> list[StageStatus]:
        """In their order; none until they are known."""
        with self._lock:
            return list(self._stages.values())

    @property
    def phase(self) -> Phase | None:
        """The block phase while it goes on, and when it failed."""
        with self._lock:
            return self._phase

    # ---------------------------------------------------------------- stages

    def list_stages(self, names: Sequence[str]) -> None:
        """The stages that will be gone through."""
        with self._lock:
            self._stages = {name: StageStatus(name) for name in names}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block is a stage; within itself it is nothing new."""
        with self._lock:
            known = self._stages.get(name)
            is_new = known is None or known.state != "running"
            if is_new:
                self._stages[name] = StageStatus(name, "running", self._clock())
        if not is_new:
            yield
            return
        try:
            yield
        except BaseException:
            self._end_stage(name, "failed")
            raise
        self._end_stage(name, "done")

    def skip(self, name: str) -> None:
        """A running stage is up to date."""
        self._end_stage(name, "up to date")

    def _end_stage(self, name: str, state: StageState) -> None:
        with self._lock:
            stage = self._stages[name]
            if stage.state != "running":
                return
            stage = replace(stage, state=state, ended_s=self._clock())
            self._stages[name] = stage
        took = seconds_text(stage.duration_s(self.now_s()))
        told = {"done": f"done in {took}", "failed": f"failed after {took}"}
        event(f"{name}: {told.get(state, state)}")

    # ---------------------------------------------------------------- the block phase

    def begin_phase(
        self, candidates: Iterable[CandidateStatus], max_epochs: int, planned_s: float | None
    ) -> None:
        """All candidates are known, and the plan for those that the store lacks."""
        phase = Phase({c.key: c for c in candidates}, max_epochs, planned_s)
        with self._lock:
            self._phase = phase
        left = sum(block.state != "stored" for block in phase.blocks)
        if left:
            planned = "" if planned_s is None else f", planned: {seconds_text(planned_s)}"
            event(f"{left} of {len(phase.blocks)} blocks to build{planned}")

    def end_phase(self) -> None:
        """It ended well."""
        with self._lock:
            self._phase = None

    def start_job(self, keys: Iterable[str], worker: str) -> None:
        """A worker has taken a job with these candidates, perhaps again; it may still load."""
        with self._lock:
            for key in keys:
                if self._state(key) in ("waiting", "running", "failed"):
                    self._set(key, state="running", worker=worker, started_s=None, ended_s=None)

    def begin(self, key: str) -> None:
        """A candidate's job is at work on it; to be called as often as that is seen."""
        with self._lock:
            phase = self._phase
            candidate = None if phase is None else phase.candidates.get(key)
            if phase is None or candidate is None:
                return
            if candidate.state == "running" and candidate.started_s is None:
                if phase.started_s is None:
                    self._phase = replace(phase, started_s=self._clock())
                self._set(key, started_s=self._clock())

    def fail_job(self, keys: Iterable[str], reason: str) -> None:
        """A job with these candidates failed; those that are done stay so."""
        with self._lock:
            lost = [key for key in keys if self._state(key) in ("waiting", "running")]
            for key in lost:
                self._set(key, state="failed", ended_s=self._clock())
        if lost:
            event(f"failed: {', '.join(lost)}: {reason}")

    def advance(self, key: str, num_epochs: int, val_loss: float | None) -> None:
        """A candidate has so many epochs behind it."""
        with self._lock:
            self._set(key, num_epochs=num_epochs, val_loss=val_loss)

    def finish(
        self,
        key: str,
        num_epochs: int,
        val_loss: float | None,
        damage_kl: float | None,
        accuracy_drop: float | None,
        training_s: float,
    ) -> None:
        """A candidate is in the store, scored."""
        with self._lock:
            self._set(
                key,
                state="done",
                num_epochs=num_epochs,
                val_loss=val_loss,
                damage_kl=damage_kl,
                accuracy_drop=accuracy_drop,
                training_s=training_s,
                ended_s=self._clock(),
            )
            phase = self._phase
        if phase is None or key not in phase.candidates:
            return
        name = phase.candidates[key].block
        block = next(block for block in phase.blocks if block.name == name)
        if block.state == "done":
            counts = phase.counts
            num = counts.get("done", 0) + counts.get("stored", 0)
            took = block.duration_s(self.now_s())
            event(
                f"block {block.name}: done{'' if took is None else f' in {seconds_text(took)}'}, "
                f"{num} of {len(phase.blocks)}"
            )

    def _state(self, key: str) -> State | None:
        known = self._phase.candidates.get(key) if self._phase is not None else None
        return None if known is None else known.state

    def _set(self, key: str, **changes: object) -> None:
        """Called with the lock held; readers keep the phase that they have."""
        if self._phase is None or key not in self._phase.candidates:
            return
        changed = replace(self._phase.candidates[key], **changes)  # type: ignore[arg-type]
        self._phase = replace(self._phase, candidates=self._phase.candidates | {key: changed})


def seconds_text(duration_s: float) -> str:
    """A duration whose text stays calm while it grows: 4.2 s, 42 s, 3 min 07 s, 2 h 03 min."""
    if duration_s < 9.95:
        return f"{max(duration_s, 0.0):.1f} s"
    whole = round(duration_s)
    if whole < 60:
        return f"{whole} s"
    minutes, seconds = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


_shown: ContextVar[RunStatus | None] = ContextVar("the status that is shown", default=None)


@contextmanager
def shown(status: RunStatus) -> Iterator[None]:
    """Flows within report to this one."""
    token = _shown.set(status)
    try:
        yield
    finally:
        _shown.reset(token)


def the_status() -> RunStatus:
    """The status that somebody shows, or else a new one: its events are logged all the same."""
    return _shown.get() or RunStatus()


def event(text: str) -> None:
    """A log line, but where a live display shows what it says."""
    log.info("%s", text, extra={IS_EVENT: True})
