"""The worker pool: runs jobs in one spawned process per device, kept alive between jobs.

It stands between the flow, whose tasks call ``run`` from many threads, and the library's jobs,
which know nothing of it. The flow's own process never imports torch and never touches a device.

A slot's process is a plain ``Process`` behind a pipe. ``ProcessPoolExecutor`` would not do: when
its child dies and leaves a forked process behind, it notices neither the death nor, for that
reason, the end of the interpreter.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from multiprocessing import resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

import psutil

from flows.slots import Slot
from flows.worker import RESULT, log_line, name_of, serve
from pbkd.errors import JobError, PoolClosedError, WorkspaceBusyError
from pbkd.locks import device_lock_dir, file_lock
from pbkd.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_S = 0.1  # how often a running job is looked at
_WAKE_S = 0.5  # how often a waiting run looks whether the pool was closed
_CPU_STEP_S, _CPU_SHARE = 0.1, 0.002  # far more than the watchdog of a hung child takes
_REAP_S = 2.0  # how long a killed child may take to go

_SPAWN = multiprocessing.get_context("spawn")


class WorkerPool(Protocol):
    """What the flow needs of a pool; slots here, Ray as well."""

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

    def close(self) -> None:
        """End all jobs and take no more."""
        ...


def make_pool(slots: Sequence[Slot], settings: Settings) -> SlotPool:
    """The pool of this machine's slots."""
    return SlotPool(
        slots,
        lock_dir=settings.lock_dir or device_lock_dir(),
        job_timeout_s=settings.job_timeout_s,
        hang_timeout_s=settings.hang_timeout_s,
    )


def run_all(pool: WorkerPool, calls: Sequence[Callable[[WorkerPool], T]]) -> list[T]:
    """Let calls use a pool at the same time, each in a thread of its own; results in their order.

    Raises:
        PbkdError: of the first call that failed; the others go on to their end.
    """
    with ThreadPoolExecutor(max(1, len(calls))) as threads:
        # each in a copy of the context: there the caller's loggers are found
        futures = [threads.submit(copy_context().run, call, pool) for call in calls]
        try:
            return [future.result() for future in futures]
        except Exception:
            raise
        except BaseException:  # Ctrl-C: the threads would wait for their jobs
            pool.close()
            raise


class SlotPool:
    """A ``WorkerPool`` of spawned processes, one per slot; a context manager.

    Args:
        slots: where to run; names are unique.
        lock_dir: folder of the machine-wide device locks.
        job_timeout_s: a job that runs longer is killed, in seconds.
        hang_timeout_s: a job is killed whose heartbeat file stays unchanged so long, or, if it has
            none, that takes no processor time, in seconds.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        lock_dir: Path,
        job_timeout_s: float,
        hang_timeout_s: float,
    ) -> None:
        assert slots, "a pool without slots would wait for ever"
        assert len({slot.name for slot in slots}) == len(slots), "slot names must be unique"
        self.slots: Sequence[Slot] = tuple(slots)
        self._lock_dir = lock_dir
        self._job_timeout_s = job_timeout_s
        self._hang_timeout_s = hang_timeout_s
        self._free = list(slots)
        self._children: dict[Slot, _Child] = {}
        self._waiting: list[tuple[float, int]] = []
        self._numbers = itertools.count()
        # Its lock is reentrant: a signal handler may call close() on top of any line below.
        self._condition = threading.Condition()
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
        payload = _pack_call(job, function, args)
        slot = self._take_slot(priority)
        try:
            with ExitStack() as locks:
                self._lock_devices(slot, locks)
                if on_start is not None:
                    on_start(slot)
                outcome = self._run_on(slot, job, payload, heartbeat)
        finally:
            with self._condition:
                self._free.append(slot)
                self._condition.notify_all()
        result, failure = pickle.loads(outcome)
        if failure is not None:
            raise failure.error(job, slot)
        return result  # type: ignore[no-any-return]

    def preload(self) -> None:
        """Start all processes now; they import what jobs need while this one goes on."""
        for slot in self.slots:
            self._child_of(slot, preload=True)

    def close(self) -> None:
        """Refuse new work and kill all children; safe to call twice and from signal handlers."""
        with self._condition:
            self._closed = True
            children = [child for child in self._children.values() if child.process.is_alive()]
            self._condition.notify_all()
        for child in children:
            child.kill()
        for child in children:
            child.wait()
        atexit.unregister(self.close)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise PoolClosedError("the worker pool is closed and takes no job; start the run again")

    def _take_slot(self, priority: float) -> Slot:
        with self._condition:
            ticket = (-priority, next(self._numbers))
            heapq.heappush(self._waiting, ticket)
            try:
                self._refuse_if_closed()
                while not (self._free and self._waiting[0] == ticket):
                    # Not for ever: a close() from a signal handler can miss a waiter.
                    self._condition.wait(_WAKE_S)
                    self._refuse_if_closed()
                # A slot with a living child has torch loaded.
                slot = min(self._free, key=lambda free: free not in self._children)
                self._free.remove(slot)
                return slot
            finally:
                self._waiting.remove(ticket)
                heapq.heapify(self._waiting)
                self._condition.notify_all()

    def _lock_devices(self, slot: Slot, locks: ExitStack) -> None:
        for name in sorted(slot.locks):  # one order for everybody, or two runs block each other
            path, what = self._lock_dir / f"{name}.lock", f"device {name}"
            told = False
            while True:
                self._refuse_if_closed()
                try:
                    locks.enter_context(file_lock(path, what, timeout_s=_WAKE_S))
                    break
                except WorkspaceBusyError as busy:
                    if not told:
                        log.warning("slot %s is waiting: %s", slot.name, busy)
                    told = True

    def _run_on(self, slot: Slot, job: str, payload: bytes, heartbeat: Path | None) -> bytes:
        child = self._child_of(slot)
        try:
            return self._watch(child, job, payload, heartbeat)
        except BaseException:  # also Ctrl-C: the child must not work on in a slot that is free
            with self._condition:
                self._children.pop(slot, None)
            child.kill()
            child.wait()
            child.pipe.close()
            raise

    def _child_of(self, slot: Slot, *, preload: bool = False) -> _Child:
        with self._condition:  # so that close() sees every child
            self._refuse_if_closed()
            child = self._children.get(slot)
            if child is None or not child.process.is_alive():
                child = self._children[slot] = _Child(slot, preload=preload)
            return child

    def _watch(self, child: _Child, job: str, payload: bytes, heartbeat: Path | None) -> bytes:
        where = f"job {job} on slot {child.slot.name}"
        started = last_sign = time.monotonic()
        step_s = max(_CPU_STEP_S, _CPU_SHARE * self._hang_timeout_s)
        sent_ns = time.time_ns()
        beat = _signs_of_life(child, heartbeat, step_s, sent_ns)
        try:
            child.pipe.send_bytes(payload)
            while True:
                if child.pipe.poll(_POLL_S):
                    kind, content = _received(child)
                    if kind == RESULT:
                        return content
                    log_line(content)
                    last_sign = time.monotonic()
                now = time.monotonic()
                if (seen := _signs_of_life(child, heartbeat, step_s, sent_ns)) != beat:
                    beat, last_sign = seen, now
                self._check_limits(where, now - started, heartbeat, now - last_sign)
                # A forked grandchild can hold the pipe open, so its end is no sure sign of death.
                if not child.process.is_alive() and not child.pipe.poll():
                    raise EOFError
        except (EOFError, OSError):
            duration_s = time.monotonic() - started
            if self._closed:
                raise PoolClosedError(f"{where} was stopped: the worker pool is closed") from None
            raise JobError(
                f"{where}: its process {child.process.pid} {child.end()} after {duration_s:.1f} s; "
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


def _received(child: _Child) -> tuple[bytes, bytes]:
    message = child.pipe.recv_bytes()
    return message[:1], message[1:]


class _Child:
    """The living process of a slot and the pipe to it."""

    def __init__(self, slot: Slot, *, preload: bool) -> None:
        self.slot = slot
        self.pipe, theirs = _SPAWN.Pipe()
        # Not daemonic: a daemonic process may not have children, such as a data loader's.
        self.process = _SPAWN.Process(
            target=serve,
            args=(theirs, slot, os.getpid()),
            kwargs={"preload": preload},
            name=f"pbkd {slot.name}",
            daemon=False,
        )
        with _sigint_blocked():
            self.process.start()
        theirs.close()

    def kill(self) -> None:
        """Kill the child and whatever it started; the child must have been alive just now."""
        pid = self.process.pid
        assert pid is not None
        # Before its first instruction of ours the child is in our own group: then no group `pid`.
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self.process.kill()

    def wait(self) -> int | None:
        """Wait until the child is gone and return its exit code; None after two seconds."""
        deadline = time.monotonic() + _REAP_S
        while self.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)  # join() would wait for forked grandchildren too
        return self.process.exitcode

    def end(self) -> str:
        """Say how the child ended."""
        code = self.wait()
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with status {code}"


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    # A child inherits the mask: Ctrl-C while it still imports would print a traceback.
    resource_tracker.ensure_running()  # its own start would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signs_of_life(
    child: _Child, heartbeat: Path | None, step_s: float, sent_ns: int
) -> int | None:
    """What changes while a job is alive: its file, or else its processor time in steps.

    A job that has not touched its file yet may still be importing torch in a fresh process.
    """
    try:
        if heartbeat is not None and heartbeat.is_file():
            touched_ns = heartbeat.stat().st_mtime_ns
            if touched_ns > sent_ns:
                return touched_ns
        times = psutil.Process(child.process.pid).cpu_times()
        return int((times.user + times.system) / step_s)
    except (OSError, psutil.Error):  # not there yet, or out of reach: no sign of life
        return None


def _pack_call(job: str, function: Callable[..., object], args: tuple[object, ...]) -> bytes:
    try:
        return pickle.dumps((sys.path, pickle.dumps((function, args))))
    except Exception as error:
        raise JobError(
            f"job {job} cannot be sent to a worker: {error}; use a function at the top level of a "
            "module, and paths and plain values as arguments"
        ) from error
