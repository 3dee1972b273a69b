"""Teachers on Ray: actors that take chunks from a board, and the pool that starts and ends them.

Ray places the actors, tells when one has died, and keeps the board's actor alive; the pool only
decides how many teachers there should be. It runs in the driver's process, in a thread of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pbkd.artifacts import write_json
from pbkd.elastic.board import Board, Chunk, Stats, TeacherState
from pbkd.elastic.chunks import LabelPlan
from pbkd.elastic.status import TeachersStatus, TeacherStatus
from pbkd.errors import MissingExtraError

_log = logging.getLogger(__name__)

NAMESPACE = "pbkd"
_AUTH_MODE = "RAY_AUTH_MODE"
_TICK_S = 0.25
_IDLE_S = 0.05  # how long a teacher waits before it asks again
_GROW_S = 0.5  # a student that waits longer gets a teacher more
_SHRINK_S = 10.0  # a teacher without work for so long is one too many
_PATIENCE_S = 2.0
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


def ray_module() -> Any:
    """Import Ray; MissingExtraError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray", "elastic teachers") from None
    return ray


def connect(address: str | None = None) -> bool:
    """Connect this process to a cluster, or start one; returns whether it was started here.

    Args:
        address: of the cluster; None: RAY_ADDRESS, else a new one on this machine.
    """
    ray = ray_module()
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    quiet = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **quiet)
    else:  # "local", or it would join whatever cluster it finds on this machine
        ray.init(address="local", include_dashboard=False, **quiet)
    return not address


class _BoardActor:
    """The board in a process of its own; what it knows comes back after a restart."""

    def __init__(self, plan: LabelPlan) -> None:
        self._board = Board(plan.is_done, _PATIENCE_S)
        self._num_teachers = 0

    def want(self, student: str, chunks: Sequence[Chunk]) -> tuple[list[Chunk], int]:
        return self._board.want(student, chunks, time.monotonic()), self._num_teachers

    def leave_student(self, student: str) -> None:
        self._board.leave_student(student)

    def take(self, teacher: str) -> Chunk | None:
        return self._board.take(teacher, time.monotonic())

    def finish(self, teacher: str, chunk: Chunk) -> None:
        self._board.finish(teacher, chunk, time.monotonic())

    def leave(self, teacher: str) -> None:
        self._board.leave(teacher)

    def look(self, num_teachers: int) -> tuple[Stats, float, float]:
        """Stats, the present time and patience; the pool says how many teachers live."""
        self._num_teachers = num_teachers
        now_s = time.monotonic()
        return self._board.stats(now_s), now_s, self._board.patience_s


class _TeacherActor:
    """Labels chunks until it is told to end."""

    def __init__(self, plan: LabelPlan, threads: int, path: list[str]) -> None:
        sys.path[:] = path  # a network of the user's own lies in the workspace
        os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        import torch

        from pbkd.data import Stream, load_prepared
        from pbkd.devices import best_device
        from pbkd.models import load_teacher

        torch.set_num_threads(threads)
        teacher, card = load_teacher(plan.teacher, allow_code=True)
        self._device = best_device()
        self._teacher = teacher.to(self._device).eval()
        split = load_prepared(plan.prepared).split("train")
        self._train = Stream(split, seed=plan.seed, augment=card.augment, device=self._device)
        self._plan = plan
        self._view, self._order = -1, torch.empty(0)

    def where(self) -> tuple[str, int, str]:
        """Host, process and device."""
        return socket.gethostname(), os.getpid(), str(self._device)

    def serve(self, name: str, board: Any) -> None:
        from pbkd.elastic.chunks import label_chunk

        def label(chunk: Chunk) -> None:
            if chunk[0] != self._view:
                self._view, self._order = chunk[0], self._train.order(chunk[0])
            label_chunk(self._plan, self._teacher, self._train, self._order, chunk)

        work_on(name, board, label)


def work_on(name: str, board: Any, label: Callable[[Chunk], None]) -> None:
    """Take chunks and label them, for ever; the next one is asked for while one is in work."""
    ray = ray_module()
    chunk = None
    while True:
        if chunk is None:
            chunk = ray.get(board.take.remote(name))
        if chunk is None:
            time.sleep(_IDLE_S)
            continue
        ahead = board.take.remote(name)
        label(chunk)
        board.finish.remote(name, chunk)
        chunk = ray.get(ahead)


class RayBoard:
    """A student's way to the board: it waits while the board's actor comes back.

    Args:
        name, address, auth_mode: of ``TeacherPool``.
    """

    def __init__(self, name: str, address: str, auth_mode: str = "") -> None:
        if auth_mode:  # Ray sets it in the process that starts a cluster, and in no other
            os.environ[_AUTH_MODE] = auth_mode
        self._ray = ray_module()
        self._joined = not self._ray.is_initialized()
        connect(address)
        self._actor = self._ray.get_actor(name, namespace=NAMESPACE)

    def want(self, student: str, chunks: Sequence[Chunk]) -> tuple[list[Chunk], int]:
        """See ``LabelBoard``; nothing is done while the board is away."""
        try:
            done, num_teachers = self._ray.get(self._actor.want.remote(student, list(chunks)))
        except self._ray.exceptions.RayError as error:
            _log.debug("the board does not answer: %s", error)
            return [], 0
        return done, num_teachers

    def leave_student(self, student: str) -> None:
        """See ``LabelBoard``."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._actor.leave_student.remote(student))

    def close(self) -> None:
        """Leave the cluster if it was joined for this: it would take this process down with it."""
        if self._joined:
            self._ray.shutdown()


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
        self.auth_mode = os.environ.get(_AUTH_MODE, "")
        self.board = f"board-{os.getpid()}-{time.monotonic_ns()}"
        # restarts: its state is what students say, and files
        self._actor = (
            self._ray.remote(_BoardActor)
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
        stats, now_s, patience_s = self._ray.get(self._actor.look.remote(num_living), timeout=10)
        self._end_hanging(stats, now_s, patience_s)
        self._fit(stats, now_s)
        if time.monotonic() - self._written_s >= 1:
            self._written_s = time.monotonic()
            report = self._report(stats, now_s)
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

    def _end_hanging(self, stats: Stats, now_s: float, patience_s: float) -> None:
        limit_s = max(_HANG_S, _HANG / 3 * patience_s)
        for name, state in stats.teachers.items():
            if state.chunks and now_s - state.since_s > limit_s:
                if name in self._teachers:
                    _log.warning("teacher %s hangs for %.0f s: replaced", name, limit_s)
                self._dismiss(name)

    def _fit(self, stats: Stats, now_s: float) -> None:
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
            if name in self._teachers and not state.chunks and now_s - state.since_s > _SHRINK_S
        ]
        if idle and num > size.min_teachers:
            _log.info("teacher %s has nothing to do and ends", idle[-1])
            self._dismiss(idle[-1])

    def _hire(self) -> None:
        self._count += 1
        name = f"teacher-{self._count}"
        actor = (
            self._ray.remote(_TeacherActor)
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

    def _report(self, stats: Stats, now_s: float) -> TeachersStatus:
        return TeachersStatus(
            time=time.time(),
            teachers={
                name: self._status(teacher, stats.teachers.get(name), now_s)
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
