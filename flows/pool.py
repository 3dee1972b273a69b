"""The worker pool: runs jobs on slots, each in a process of its own that is kept between jobs.

It stands between the flow, whose tasks call ``run`` from many threads, and the library's jobs,
which know nothing of it. The flow's own process never imports torch and never touches a device.
Here are the queue and the limits; ``slot_pool`` and ``ray_pool`` have the processes.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from flows.slots import Slot
from flows.worker import RESULT, log_line, name_of, pack_call, unpack_result
from pbkd.errors import JobError, PoolClosedError

T = TypeVar("T")

POLL_S = 0.1  # how often a running job, and the first of the waiting ones, is looked at
WAKE_S = 0.5  # how often any other waiting run looks whether the pool was closed
_CPU_STEP_S, _CPU_SHARE = 0.1, 0.002  # far more than the watchdog of a hung child takes


class WorkerPool(Protocol):
    """What the flow needs of a pool; slots of this machine, or Ray's."""

    @property
    def slots(self) -> Sequence[Slot]:
        """Places that run jobs at the same time."""
        ...

    def run(
        self,
        function: Callable[..., T],
        *args: object,
        priority: float = 0.0,
        heartbeat: Path | None = None,
        on_start: Callable[[Slot], None] | None = None,
    ) -> T:
        """Run one job and wait for its result; called from many threads at once."""
        ...

    def leave_room(self, cpus: int) -> int:
        """Let idle workers go where others want CPUs; returns the jobs that may run beside these.

        Raises:
            ConfigError: none can.
        """
        ...

    def close(self) -> None:
        """End all jobs and take no more."""
        ...


def run_all(
    pool: WorkerPool, calls: Sequence[Callable[[WorkerPool], T]], at_once: int | None = None
) -> list[T]:
    """Let calls use a pool at the same time, each in a thread of its own; results in their order.

    Args:
        at_once: calls at the same time; None: all of them.

    Raises:
        PbkdError: of the first call that failed; the others go on to their end.
    """
    with ThreadPoolExecutor(at_once or max(1, len(calls))) as threads:
        # each in a copy of the context: there the caller's loggers are found
        futures = [threads.submit(copy_context().run, call, pool) for call in calls]
        try:
            return [future.result() for future in futures]
        except Exception:
            raise
        except BaseException:  # Ctrl-C: the threads would wait for their jobs
            pool.close()
            raise


class Worker(Protocol):
    """The process of a slot, as its pool sees it."""

    def send(self, payload: bytes) -> None:
        """Give it a job."""
        ...

    def receive(self, timeout_s: float) -> bytes | None:
        """Its next message, None if there is none in time; EOFError or OSError: it is gone."""
        ...

    def is_alive(self) -> bool:
        """Whether it is there, as far as is known."""
        ...

    def cpu_s(self) -> float | None:
        """Processor time that it has taken, in seconds; None where that is not known."""
        ...

    def kill(self) -> None:
        """Kill it and whatever it started; it must have been alive just now."""
        ...

    def wait(self) -> object:
        """Wait a moment until a killed one is gone."""
        ...

    def release(self) -> None:
        """Give back what this process holds of a killed one; nobody may use it any more."""
        ...

    def death(self) -> str:
        """Say who is gone and how: "its process 12 was killed by SIGKILL"."""
        ...


W = TypeVar("W", bound=Worker)


class JobPool(ABC, Generic[W]):
    """A ``WorkerPool``: the queue, the limits and the end of it; a context manager.

    Args:
        slots: where to run; names are unique.
        job_timeout_s: a job that runs longer is killed, in seconds.
        hang_timeout_s: a job is killed whose heartbeat file stays unchanged so long, or, if it has
            none, that takes no processor time, in seconds.
        condition: guards the pool; pools that look into each other share one. Its lock must be
            reentrant: a signal handler may call ``close`` on top of any line below.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        job_timeout_s: float,
        hang_timeout_s: float,
        condition: threading.Condition | None = None,
    ) -> None:
        assert slots, "a pool without slots would wait for ever"
        assert len({slot.name for slot in slots}) == len(slots), "slot names must be unique"
        self.slots: Sequence[Slot] = tuple(slots)
        self._job_timeout_s = job_timeout_s
        self._hang_timeout_s = hang_timeout_s
        self._free = list(slots)
        self._workers: dict[Slot, W] = {}
        self._waiting: list[tuple[float, int]] = []
        self._numbers = itertools.count()
        self._num_inside = 0
        self._condition = condition or threading.Condition()
        self._closed = False
        # multiprocessing waits at exit for children that nobody ended.
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _start(self, slot: Slot, *, preload: bool) -> W:
        """Start the process of a slot; called with the lock held."""

    def _pick(self) -> Slot | None:
        """A free slot that can take a job now, if there is one; called with the lock held."""
        # A slot with a living process has torch loaded.
        return min(self._free, key=lambda free: free not in self._workers, default=None)

    @contextmanager
    def _held(self, slot: Slot) -> Iterator[None]:
        """Hold the devices of a slot that was taken."""
        yield

    def _left(self) -> None:
        """Called when a closed pool has no thread in ``run`` any more, perhaps twice."""

    def leave_room(self, cpus: int) -> int:
        """See ``WorkerPool``; processes of one machine share its cores."""
        return len(self.slots)

    def run(
        self,
        function: Callable[..., T],
        *args: object,
        priority: float = 0.0,
        heartbeat: Path | None = None,
        on_start: Callable[[Slot], None] | None = None,
    ) -> T:
        """Run ``function(*args)`` in the process of the next free slot and return its result.

        Args:
            function: importable in a fresh process; its arguments and result are small and pickle.
            priority: the highest goes first; equals go in the order of their calls.
            heartbeat: file that the job touches; see ``hang_timeout_s``.
            on_start: called with the slot, in this thread, once slot and devices are held.

        Raises:
            JobError: the job crashed, hung, took too long, raised, or the pool is closed.
            PbkdError: as raised by the job, with the worker's traceback as a note.
        """
        job = name_of(function)
        payload = pack_call(job, function, args)
        with self._inside():
            slot = self._take_slot(priority)
            try:
                with self._held(slot):
                    if on_start is not None:
                        on_start(slot)
                    outcome = self._run_on(slot, job, payload, heartbeat)
            finally:
                with self._condition:
                    self._free.append(slot)
                    self._condition.notify_all()
        return unpack_result(outcome, job, slot)  # type: ignore[no-any-return]

    def preload(self) -> None:
        """Start all processes now; they import what jobs need while this one goes on."""
        for slot in self.slots:
            self._worker_of(slot, preload=True)

    def close(self) -> None:
        """Refuse new work and kill all workers; safe to call twice and from signal handlers."""
        with self._condition:
            self._closed = True
            workers = [worker for worker in self._workers.values() if worker.is_alive()]
            self._condition.notify_all()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()
        atexit.unregister(self.close)
        with self._condition:
            if not self._num_inside:
                self._left()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with self._condition:
            self._num_inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._num_inside -= 1
                if self._closed and not self._num_inside:
                    self._left()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise PoolClosedError("the worker pool is closed and takes no job; start the run again")

    def _take_slot(self, priority: float) -> Slot:
        with self._condition:
            ticket = (-priority, next(self._numbers))
            heapq.heappush(self._waiting, ticket)
            try:
                self._refuse_if_closed()
                while (slot := self._pick() if self._waiting[0] == ticket else None) is None:
                    # Not for ever: a close() from a signal handler can miss a waiter.
                    self._condition.wait(POLL_S if self._waiting[0] == ticket else WAKE_S)
                    self._refuse_if_closed()
                self._free.remove(slot)
                return slot
            finally:
                self._waiting.remove(ticket)
                heapq.heapify(self._waiting)
                self._condition.notify_all()

    def _run_on(self, slot: Slot, job: str, payload: bytes, heartbeat: Path | None) -> bytes:
        worker = self._worker_of(slot)
        try:
            return self._watch(worker, f"job {job} on slot {slot.name}", payload, heartbeat)
        except BaseException:  # also Ctrl-C: the job must not work on in a slot that is free
            with self._condition:
                self._workers.pop(slot, None)
            worker.kill()
            worker.wait()
            worker.release()
            raise

    def _worker_of(self, slot: Slot, *, preload: bool = False) -> W:
        with self._condition:  # so that close() sees every worker
            self._refuse_if_closed()
            worker = self._workers.get(slot)
            if worker is None or not worker.is_alive():
                worker = self._begin(slot, preload=preload)
            return worker

    def _begin(self, slot: Slot, *, preload: bool) -> W:
        worker = self._workers[slot] = self._start(slot, preload=preload)
        if self._closed:  # by a signal handler, which did not see it
            worker.kill()
            worker.wait()
            self._refuse_if_closed()
        return worker

    def _watch(self, worker: W, where: str, payload: bytes, heartbeat: Path | None) -> bytes:
        started = last_sign = time.monotonic()
        step_s = max(_CPU_STEP_S, _CPU_SHARE * self._hang_timeout_s)
        sent_ns = time.time_ns()
        beat = _sign_of_life(worker, heartbeat, step_s, sent_ns)
        try:
            worker.send(payload)
            while True:
                was_alive = worker.is_alive()
                if (message := worker.receive(POLL_S)) is not None:
                    kind, content = message[:1], message[1:]
                    if kind == RESULT:
                        return content
                    log_line(content)
                    last_sign = time.monotonic()
                elif not was_alive:
                    raise EOFError
                now = time.monotonic()
                if (seen := _sign_of_life(worker, heartbeat, step_s, sent_ns)) != beat:
                    beat, last_sign = seen, now
                self._check_limits(where, now - started, heartbeat, now - last_sign)
        except (EOFError, OSError):
            duration_s = time.monotonic() - started
            if self._closed:
                raise PoolClosedError(f"{where} was stopped: the worker pool is closed") from None
            raise JobError(
                f"{where}: {worker.death()} after {duration_s:.1f} s; "
                "the slot gets a fresh process: run the job again (SIGKILL from outside often "
                "means out of memory: see dmesg)"
            ) from None

    def _check_limits(
        self, where: str, running_s: float, heartbeat: Path | None, silent_s: float
    ) -> None:
        if self._closed:
            raise PoolClosedError(f"{where} was stopped: the worker pool is closed")
        if running_s > self._job_timeout_s:
            raise JobError(
                f"{where} was killed after {running_s:.0f} s, the limit is "
                f"{self._job_timeout_s:g} s; raise PBKD_JOB_TIMEOUT_S or make the job smaller"
            )
        if silent_s > self._hang_timeout_s:
            sign = "work" if heartbeat is None else f"change of {heartbeat}"
            raise JobError(
                f"{where} was killed: no {sign} for {silent_s:.0f} s, the limit is "
                f"{self._hang_timeout_s:g} s; raise PBKD_HANG_TIMEOUT_S or run the job again"
            )


def _sign_of_life(
    worker: Worker, heartbeat: Path | None, step_s: float, sent_ns: int
) -> int | None:
    """What changes while a job is alive: its file, or else its processor time in steps.

    A job that has not touched its file yet may still be importing torch in a fresh process.
    """
    try:
        if heartbeat is not None and heartbeat.is_file():
            touched_ns = heartbeat.stat().st_mtime_ns
            if touched_ns > sent_ns:
                return touched_ns
    except OSError:  # out of reach: no sign of life
        return None
    cpu_s = worker.cpu_s()
    return None if cpu_s is None else int(cpu_s / step_s)
