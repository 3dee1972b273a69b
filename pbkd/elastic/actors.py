"""What elastic teachers run on Ray: a board that all meet at, teachers, and a student's way to it.

Nobody polls: who has nothing to do or to read is held by the board's actor until that changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from pbkd.elastic.board import Board, Chunk, Stats
from pbkd.elastic.label_plan import LabelPlan
from pbkd.errors import MissingExtraError
from pbkd.orphans import end_with_parent

_log = logging.getLogger(__name__)

NAMESPACE = "pbkd"
AUTH_MODE = "RAY_AUTH_MODE"
_PATIENCE_S = 2.0
_HOLD_S = 0.5  # then a question is answered with what there is, and asked again
_PAUSE_S = 1.0  # of a teacher whose labels could not be written


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


class _Bell:
    """Wakes all who listen at the time; for one event loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def heard_before(self, end_s: float) -> bool:
        """Listen; false: the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), end_s - time.monotonic())
        return time.monotonic() < end_s


class BoardActor:
    """The board in a process of its own; what it knows comes back after a restart."""

    def __init__(self, plan: LabelPlan) -> None:
        end_with_parent(os.getppid())  # its node: Ray lets an actor at work go on without
        self._board = Board(plan.is_done, _PATIENCE_S)
        self._num_teachers = 0
        self._gone: set[str] = set()
        self._work, self._labels = _Bell(), _Bell()

    async def want(
        self, student: str, chunks: Sequence[Chunk], hold_s: float = 0.0
    ) -> tuple[list[Chunk], int]:
        """See ``Board``; held until the first one is done, and so long at most."""
        end_s = time.monotonic() + hold_s
        done = self._board.want(student, chunks, time.monotonic())
        self._work.ring()
        while chunks and chunks[0] not in done and await self._labels.heard_before(end_s):
            done = self._board.want(student, chunks, time.monotonic())
        return done, self._num_teachers

    async def leave_student(self, student: str) -> None:
        self._board.leave_student(student)

    async def turn(
        self, teacher: str, labelled: Chunk | None = None, failure: str = ""
    ) -> Chunk | None:
        """What a teacher labels next; one with nothing in work is held until there is something.

        Args:
            labelled: what it has labelled since it asked the last time.
            failure: why these labels could not be written.
        """
        end_s, chunk = time.monotonic() + _HOLD_S, None
        if labelled is not None:
            self._end(teacher, labelled, failure)
        if teacher in self._gone:  # it may outlive its node for a moment
            await asyncio.sleep(_HOLD_S)
        while teacher not in self._gone:  # its last question may outlive it
            chunk = self._board.take(teacher, time.monotonic())
            if chunk is not None or self._board.is_busy(teacher):
                break
            if not await self._work.heard_before(end_s):
                break
        return chunk

    def _end(self, teacher: str, chunk: Chunk, failure: str) -> None:
        if failure:
            self._board.fail(teacher, chunk, failure, time.monotonic())
            self._work.ring()
        else:
            self._board.finish(teacher, chunk, time.monotonic())
            self._labels.ring()

    async def leave(self, teacher: str) -> None:
        self._gone.add(teacher)
        self._board.leave(teacher)
        self._work.ring()

    async def look(self, num_teachers: int) -> Stats:
        """What goes on; the pool says how many teachers live."""
        self._num_teachers = num_teachers
        return self._board.stats(time.monotonic())


class TeacherActor:
    """Labels chunks until it is told to end."""

    def __init__(self, plan: LabelPlan, threads: int, path: list[str]) -> None:
        end_with_parent(os.getppid())  # its node: Ray lets an actor at work go on without
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
    """Take chunks and label them, for ever; the next one is asked for while one is in work.

    Labels that cannot be written (a full disk) are tried again, by whoever is free.
    """
    ray = ray_module()
    chunk: Chunk | None = None
    labelled, failure = None, ""
    while True:
        ahead = board.turn.remote(name, labelled, failure)
        labelled, failure = chunk, ""
        if chunk is not None:
            try:
                label(chunk)
            except OSError as error:
                failure = str(error)
                time.sleep(_PAUSE_S)
        chunk = ray.get(ahead)


class RayBoard:
    """A student's way to the board: it waits while the board's actor comes back.

    Args:
        name, address, auth_mode: of ``TeacherPool``.
    """

    def __init__(self, name: str, address: str, auth_mode: str = "") -> None:
        if auth_mode:  # Ray sets it in the process that starts a cluster, and in no other
            os.environ[AUTH_MODE] = auth_mode
        self._ray = ray_module()
        self._joined = not self._ray.is_initialized()
        connect(address)
        self._actor = self._ray.get_actor(name, namespace=NAMESPACE)

    def want(self, student: str, chunks: Sequence[Chunk], *, wait: bool) -> tuple[list[Chunk], int]:
        """See ``LabelBoard``; nothing is done while the board is away."""
        hold_s = _HOLD_S if wait else 0.0
        try:
            question = self._actor.want.remote(student, list(chunks), hold_s)
            done, num_teachers = self._ray.get(question)
        except self._ray.exceptions.RayError as error:
            _log.debug("the board does not answer: %s", error)
            time.sleep(hold_s)
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
