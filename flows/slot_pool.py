"""The pool of this machine: one spawned process per slot, under machine-wide device locks.

A slot's process is a plain ``Process`` behind a pipe. ``ProcessPoolExecutor`` would not do: when
its child dies and leaves a forked process behind, it notices neither the death nor, for that
reason, the end of the interpreter.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path

import psutil

from flows.pool import WAKE_S, JobPool
from flows.slots import Slot
from flows.worker import serve
from pbkd.errors import WorkspaceBusyError
from pbkd.locks import file_lock

log = logging.getLogger(__name__)

_REAP_S = 2.0  # how long a killed child may take to go

_SPAWN = multiprocessing.get_context("spawn")


class SlotPool(JobPool["_Child"]):
    """A ``JobPool`` of spawned processes.

    Args:
        slots: where to run; names are unique.
        lock_dir: folder of the machine-wide device locks.
        job_timeout_s: a job that runs longer is killed, in seconds.
        hang_timeout_s: see ``JobPool``.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        lock_dir: Path,
        job_timeout_s: float,
        hang_timeout_s: float,
    ) -> None:
        super().__init__(slots, job_timeout_s=job_timeout_s, hang_timeout_s=hang_timeout_s)
        self._lock_dir = lock_dir

    def _start(self, slot: Slot, *, preload: bool) -> _Child:
        return _Child(slot, preload=preload)

    @contextmanager
    def _held(self, slot: Slot) -> Iterator[None]:
        with ExitStack() as locks:
            for name in sorted(slot.locks):  # one order for everybody, or two runs block each other
                self._lock_device(slot, name, locks)
            yield

    def _lock_device(self, slot: Slot, name: str, locks: ExitStack) -> None:
        path, what = self._lock_dir / f"{name}.lock", f"device {name}"
        told = False
        while True:
            self._refuse_if_closed()
            try:
                locks.enter_context(file_lock(path, what, timeout_s=WAKE_S))
                return
            except WorkspaceBusyError as busy:
                if not told:
                    log.warning("slot %s is waiting: %s", slot.name, busy)
                told = True


class _Child:
    """The living process of a slot and the pipe to it."""

    def __init__(self, slot: Slot, *, preload: bool) -> None:
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

    def send(self, payload: bytes) -> None:
        self.pipe.send_bytes(payload)

    def receive(self, timeout_s: float) -> bytes | None:
        return self.pipe.recv_bytes() if self.pipe.poll(timeout_s) else None

    def is_alive(self) -> bool:
        # A forked grandchild can hold the pipe open, so its end is no sure sign of death.
        return self.process.is_alive()

    def cpu_s(self) -> float | None:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:
            return None
        return times.user + times.system

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

    def release(self) -> None:
        self.pipe.close()

    def death(self) -> str:
        code = self.wait()
        how = f"ended with status {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        return f"its process {self.process.pid} {how}"


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    # A child inherits the mask: Ctrl-C while it still imports would print a traceback.
    resource_tracker.ensure_running()  # its own start would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
