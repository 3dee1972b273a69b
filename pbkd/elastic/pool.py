"""The pool of elastic teachers: it starts them while students wait, and ends idle ones.

Ray places the actors, tells when one has died, and keeps the board's actor alive; the pool only
decides how many teachers there should be. It runs in the driver's process, in a thread of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pbkd.artifacts import write_json
from pbkd.elastic.actors import (
    AUTH_MODE,
    NAMESPACE,
    BoardActor,
    TeacherActor,
    connect,
    ray_module,
)
from pbkd.elastic.board import Stats, TeacherState
from pbkd.elastic.label_plan import LabelPlan
from pbkd.elastic.status import TeachersStatus, TeacherStatus

_log = logging.getLogger(__name__)

_TICK_S = 0.25
_GROW_S = 0.5  # a student that waits longer gets a teacher more
_SHRINK_S = 10.0  # a teacher without work for so long is one too many
_HANG_S, _HANG = 20.0, 20.0
"""A teacher is replaced that takes longer for a chunk: in seconds, and in mean durations."""
_MAX_FAILURES = 5


@dataclass(frozen=True)
class PoolSize:
    """How many teachers there may be, and what each takes of the cluster."""

    min_teachers: int = 1
    max_teachers: int = 4
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass
class _Teacher:
    """A living actor.

    Attributes:
        serving: Ray's reference of its work; it is ready when the actor has died.
        where: reference of host, process and device; ready once it has started.
    """

    actor: Any
    serving: Any
    where: Any
    place: tuple[str, int, str] | None = None
    started_s: float = field(default_factory=time.monotonic)


class TeacherPool:
    """Starts teachers while students wait, ends idle ones, replaces those that die or hang.

    A context manager. ``board``, ``address`` and ``auth_mode`` are what students need.

    Args:
        status: file that tells what goes on, once a second; for `pbkd teachers`.
        threads: CPU threads of a teacher.
        on_status: gets the same, in the pool's thread.
    """

    def __init__(
        self,
        plan: LabelPlan,
        size: PoolSize,
        status: Path,
        threads: int = 1,
        on_status: Callable[[TeachersStatus], None] = lambda _: None,
    ) -> None:
        self.plan, self.size, self.status, self.threads = plan, size, status, threads
        self.on_status = on_status
        self._started_ray = connect()
        self._ray = ray_module()
        self.address: str = self._ray.get_runtime_context().gcs_address
        self.auth_mode = os.environ.get(AUTH_MODE, "")
        self.board = f"board-{os.getpid()}-{time.monotonic_ns()}"
        # restarts: its state is what students say, and files
        self._actor = (
            self._ray.remote(BoardActor)
            .options(
                name=self.board,
                namespace=NAMESPACE,
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=-1,
            )
            .remote(plan)
        )
        self._ray.get(self._actor.look.remote(0))  # it is there before anybody asks for it
        self._teachers: dict[str, _Teacher] = {}
        self._count = self._failures = 0
        self._last_error = ""
        self._is_closed = threading.Event()
        self._written_s = 0.0
        # in a copy of the context: there the caller's loggers are found
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._manage,), name="teachers", daemon=True
        )

    def __enter__(self) -> Self:
        for _ in range(self.size.min_teachers):
            self._hire()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all teachers and the board; Ray itself only if it was started here."""
        self._is_closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10.0)
        for name in list(self._teachers):
            self._dismiss(name)
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)
        self.status.unlink(missing_ok=True)
        if self._started_ray:
            self._ray.shutdown()

    def wait_for_one(self, deadline_s: float) -> None:
        """Wait until a teacher has started, or cannot, and so long at most."""
        end_s = time.monotonic() + deadline_s
        while time.monotonic() < end_s and self._failures < _MAX_FAILURES:
            if any(self.places().values()):
                return
            time.sleep(_TICK_S)

    def places(self) -> dict[str, tuple[str, int, str] | None]:
        """Teacher to its host, process and device; None: it has not started yet."""
        return {name: teacher.place for name, teacher in self._teachers.items()}

    # ------------------------------------------------------------ the thread

    def _manage(self) -> None:
        while not self._is_closed.wait(_TICK_S):
            try:
                self._tick()
            except Exception as error:  # noqa: BLE001 - Ray raises anything while a node goes
                _log.warning("teachers: %s", str(error).splitlines()[0])

    def _tick(self) -> None:
        self._bury()
        num_living = sum(teacher.place is not None for teacher in self._teachers.values())
        stats = self._ray.get(self._actor.look.remote(num_living), timeout=10)
        self._tell(stats.failure)
        self._end_hanging(stats)
        self._fit(stats)
        if time.monotonic() - self._written_s >= 1:
            self._written_s = time.monotonic()
            report = self._report(stats)
            write_json(self.status, report)
            self.on_status(report)

    def _bury(self) -> None:
        """Notice who has started, and who has died."""
        for name, teacher in list(self._teachers.items()):
            if teacher.place is None and self._is_ready(teacher.where):
                with contextlib.suppress(self._ray.exceptions.RayError):
                    teacher.place = self._ray.get(teacher.where)
                    _log.info("teacher %s: process %d on %s, %s", name, *_shown(teacher.place))
            if self._is_ready(teacher.serving):
                self._lost(name, teacher)

    def _lost(self, name: str, teacher: _Teacher) -> None:
        try:
            self._ray.get(teacher.serving)
            reason = "it ended"
        except Exception as error:  # noqa: BLE001 - of Ray, or of a teacher that cannot be loaded
            reason = str(error).strip().splitlines()[-1].split(". ")[0]  # Ray adds a page of advice
        self._last_error = reason
        _log.warning("teacher %s is lost: %s", name, reason)
        self._failures = self._failures + 1 if teacher.place is None else 0
        self._dismiss(name)

    def _tell(self, failure: str) -> None:
        if failure and failure != self._last_error:
            self._last_error = failure
            _log.warning("labels could not be written and are tried again: %s", failure)

    def _end_hanging(self, stats: Stats) -> None:
        limit_s = max(_HANG_S, _HANG / 3 * stats.patience_s)
        for name, state in stats.teachers.items():
            if state.chunks and stats.now_s - state.since_s > limit_s:
                if name in self._teachers:
                    _log.warning("teacher %s hangs for %.0f s: replaced", name, limit_s)
                self._dismiss(name)

    def _fit(self, stats: Stats) -> None:
        """Start or end a teacher."""
        num, size = len(self._teachers), self.size
        if self._failures >= _MAX_FAILURES:
            return  # the students' deadline says it
        is_starting = any(teacher.place is None for teacher in self._teachers.values())
        waits = max(stats.waiting.values(), default=0.0) > _GROW_S
        if num < size.min_teachers or (waits and not is_starting and num < size.max_teachers):
            self._hire()
            return
        idle = [
            name
            for name, state in stats.teachers.items()
            if name in self._teachers
            and not state.chunks
            and stats.now_s - state.since_s > _SHRINK_S
        ]
        if idle and num > size.min_teachers:
            _log.info("teacher %s has nothing to do and ends", idle[-1])
            self._dismiss(idle[-1])

    def _hire(self) -> None:
        self._count += 1
        name = f"teacher-{self._count}"
        actor = (
            self._ray.remote(TeacherActor)
            .options(
                num_cpus=self.size.cpus,
                num_gpus=self.size.gpus,
                max_restarts=0,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self.threads)}},
            )
            .remote(self.plan, self.threads, list(sys.path))
        )
        where = actor.where.remote()
        self._teachers[name] = _Teacher(actor, actor.serve.remote(name, self._actor), where)

    def _dismiss(self, name: str) -> None:
        teacher = self._teachers.pop(name, None)
        with contextlib.suppress(Exception):
            if teacher is not None:
                self._ray.kill(teacher.actor)
            self._ray.get(self._actor.leave.remote(name), timeout=5)

    def _is_ready(self, reference: Any) -> bool:
        ready, _ = self._ray.wait([reference], timeout=0)
        return bool(ready)

    def _report(self, stats: Stats) -> TeachersStatus:
        return TeachersStatus(
            time=time.time(),
            teachers={
                name: self._status(teacher, stats.teachers.get(name), stats.now_s)
                for name, teacher in self._teachers.items()
            },
            waiting=stats.waiting,
            num_wanted=stats.num_wanted,
            chunk_images=self.plan.chunk,
            last_error=self._last_error,
        )

    def _status(self, teacher: _Teacher, state: TeacherState | None, now_s: float) -> TeacherStatus:
        host, pid, device = teacher.place or ("", 0, "")
        if state is None:
            for_s = time.monotonic() - teacher.started_s
            return TeacherStatus(host=host, pid=pid, device=device, for_s=for_s)
        num_images = state.num_done * self.plan.chunk
        view, chunk = state.chunks[0] if state.chunks else (None, None)
        return TeacherStatus(
            host=host,
            pid=pid,
            device=device,
            view=view,
            chunk=chunk,
            for_s=now_s - state.since_s,
            num_images=num_images,
            rate=num_images / state.busy_s if state.busy_s else None,
        )


def _shown(place: tuple[str, int, str] | None) -> tuple[int, str, str]:
    assert place is not None
    host, pid, device = place
    return pid, host, device
