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
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self, TypeVar

from pbkd.errors import ConfigError, JobError, MissingExtraError, PbkdError, WorkspaceBusyError
from pbkd.locks import file_lock
from pbkd.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_S = 0.1  # how often a running job is looked at
_WAKE_S = 0.5  # how often a waiting run looks whether the pool was closed
_WATCHDOG_S = 0.5  # how often a child looks for its parent
_REAP_S = 2.0  # how long a killed child may take to go

_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Slot:
    """One place to run a job.

    Attributes:
        name: short name for logs and plans, "gpu-0" or "cpu-1".
        device: the torch device as the job sees it, "cpu" or "cuda".
        visible_devices: CUDA_VISIBLE_DEVICES of the job; "" hides every GPU, None leaves it.
        threads: CPU threads for torch, OpenMP and MKL, at least 1.
        locks: machine-wide device locks to hold while a job runs.
    """

    name: str
    device: str
    visible_devices: str | None
    threads: int
    locks: tuple[str, ...]


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


def worker_slots(settings: Settings) -> list[Slot]:
    """List the slots of this machine: one per GPU, else the usable cores in equal shares.

    Raises:
        ConfigError: a GPU is asked for and none is there.
    """
    cores = sorted(os.sched_getaffinity(0))
    if gpus := _usable_gpus(settings):
        num_slots = min(settings.workers or len(gpus), len(gpus))
        if settings.workers > len(gpus):
            log.warning(
                "PBKD_WORKERS=%d: there are %d GPUs and a GPU takes one worker; using %d",
                settings.workers,
                len(gpus),
                num_slots,
            )
        threads = max(1, len(cores) // num_slots)
        named = list(gpus.items())[:num_slots]
        return [
            Slot(f"gpu-{i}", "cuda", visible, threads, (f"gpu-{uuid}",))
            for i, (visible, uuid) in enumerate(named)
        ]
    num_slots = settings.workers or len(cores)
    threads = max(1, len(cores) // num_slots)
    locks = _core_locks(cores, num_slots)
    return [
        Slot(f"cpu-{i}", "cpu", "", threads, tuple(locks[i * threads : (i + 1) * threads]))
        for i in range(num_slots)
    ]


def whole_machine_slot(settings: Settings) -> Slot:
    """Return the slot of a stage that is one job: the first GPU, or all usable cores.

    Raises:
        ConfigError: a GPU is asked for and none is there.
    """
    cores = sorted(os.sched_getaffinity(0))
    for visible, uuid in _usable_gpus(settings).items():
        return Slot("gpu-0", "cuda", visible, len(cores), (f"gpu-{uuid}",))
    return Slot("cpu-all", "cpu", "", len(cores), tuple(_core_locks(cores, settings.workers)))


def _core_locks(cores: Sequence[int], num_slots: int) -> list[str]:
    # By core number, so that runs pinned to different cores do not wait for each other.
    # More workers than cores are the user's wish: those beyond get a lock of their own.
    extra = range(num_slots - len(cores))
    return [f"cpu-{core}" for core in cores] + [f"cpu-extra-{i}" for i in extra]


def _usable_gpus(settings: Settings) -> dict[str, str]:
    """Map each name that fits CUDA_VISIBLE_DEVICES to its GPU's UUID; empty: use the CPU."""
    if settings.device == "cpu":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    uuids = _nvml_uuids(required=settings.device == "cuda")
    gpus = _select_gpus(uuids, visible)
    if not gpus and settings.device == "cuda":
        raise ConfigError(
            f"PBKD_DEVICE=cuda: got {len(uuids)} GPUs from the driver with CUDA_VISIBLE_DEVICES="
            f"{'(unset)' if visible is None else repr(visible)}, expected at least one usable; "
            "look at nvidia-smi, change CUDA_VISIBLE_DEVICES, or set PBKD_DEVICE=cpu"
        )
    return gpus


def _nvml_uuids(*, required: bool) -> list[str]:
    # NVML, because torch would make a CUDA context in the flow's process.
    try:
        import pynvml
    except ImportError:
        if required:
            raise MissingExtraError("nvidia-ml-py", "pipeline", "finding GPUs") from None
        log.warning("nvidia-ml-py is not installed: no GPU can be found, using the CPU")
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("no GPU driver: %s", error)
        return []
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _select_gpus(uuids: Sequence[str], visible: str | None) -> dict[str, str]:
    # Entries stay as the user wrote them: CUDA and NVML may count unequal GPUs differently.
    if visible is None:
        return {uuid: uuid for uuid in uuids}
    found: dict[str, str] = {}
    for entry in map(str.strip, visible.split(",")):
        same = [uuid for uuid in uuids if entry.startswith("GPU-") and uuid.startswith(entry)]
        if entry.isdigit() and int(entry) < len(uuids):
            found[entry] = uuids[int(entry)]
        elif same:
            found[entry] = same[0]
        elif entry.startswith("MIG-") and uuids:
            found[entry] = entry
        else:
            break  # as CUDA does: what follows a wrong entry is not visible
    return found


class SlotPool:
    """A ``WorkerPool`` of spawned processes, one per slot; a context manager.

    Args:
        slots: where to run; names are unique.
        lock_dir: folder of the machine-wide device locks.
        job_timeout_s: a job that runs longer is killed, in seconds.
        hang_timeout_s: a job whose heartbeat file stays unchanged so long is killed, in seconds.
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
        job = _name_of(function)
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
            raise JobError("the worker pool is closed and takes no job; start the run again")

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

    def _child_of(self, slot: Slot) -> _Child:
        with self._condition:  # so that close() sees every child
            self._refuse_if_closed()
            child = self._children.get(slot)
            if child is None or not child.process.is_alive():
                child = self._children[slot] = _Child(slot)
            return child

    def _watch(self, child: _Child, job: str, payload: bytes, heartbeat: Path | None) -> bytes:
        where = f"job {job} on slot {child.slot.name}"
        started = last_sign = time.monotonic()
        beat = _mtime_ns(heartbeat)
        try:
            child.pipe.send_bytes(payload)
            while not child.pipe.poll(_POLL_S):
                now = time.monotonic()
                if (seen := _mtime_ns(heartbeat)) != beat or heartbeat is None:
                    beat, last_sign = seen, now
                self._check_limits(where, now - started, heartbeat, now - last_sign)
                # A forked grandchild can hold the pipe open, so its end is no sure sign of death.
                if not child.process.is_alive() and not child.pipe.poll():
                    raise EOFError
            return child.pipe.recv_bytes()
        except (EOFError, OSError):
            duration_s = time.monotonic() - started
            if self._closed:
                raise JobError(f"{where} was stopped: the worker pool is closed") from None
            raise JobError(
                f"{where}: its process {child.process.pid} {child.end()} after {duration_s:.1f} s; "
                "the slot gets a fresh process: run the job again (SIGKILL from outside often "
                "means out of memory: see dmesg)"
            ) from None

    def _check_limits(
        self, where: str, running_s: float, heartbeat: Path | None, silent_s: float
    ) -> None:
        if self._closed:
            raise JobError(f"{where} was stopped: the worker pool is closed")
        if running_s > self._job_timeout_s:
            raise JobError(
                f"{where} was killed after {running_s:.0f} s, the limit is "
                f"{self._job_timeout_s:g} s; raise PBKD_JOB_TIMEOUT_S or make the job smaller"
            )
        if silent_s > self._hang_timeout_s:
            raise JobError(
                f"{where} was killed: no change of {heartbeat} for {silent_s:.0f} s, the limit is "
                f"{self._hang_timeout_s:g} s; raise PBKD_HANG_TIMEOUT_S or run the job again"
            )


class _Child:
    """The living process of a slot and the pipe to it."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.pipe, theirs = _SPAWN.Pipe()
        # Not daemonic: a daemonic process may not have children, such as a data loader's.
        self.process = _SPAWN.Process(
            target=_serve, args=(theirs, slot, os.getpid()), name=f"pbkd {slot.name}", daemon=False
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


def _mtime_ns(path: Path | None) -> int | None:
    try:
        return None if path is None else path.stat().st_mtime_ns
    except OSError:  # not there yet, or out of reach: no sign of life
        return None


def _name_of(function: Callable[..., object]) -> str:
    return getattr(function, "__qualname__", repr(function))


def _pack_call(job: str, function: Callable[..., object], args: tuple[object, ...]) -> bytes:
    try:
        return pickle.dumps((function, args))
    except Exception as error:
        raise JobError(
            f"job {job} cannot be sent to a worker: {error}; use a function at the top level of a "
            "module, and paths and plain values as arguments"
        ) from error


# What follows runs in the child.


def _serve(pipe: Connection, slot: Slot, parent_pid: int) -> None:
    # Before anything can import torch: OpenMP and CUDA read the environment once.
    threads = str(slot.threads)
    os.environ |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    os.environ["MKL_DYNAMIC"] = "FALSE"  # or MKL takes fewer, at most one per physical core
    if slot.visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.visible_devices
    # A group of its own: what a job starts can be killed with it, even after a crash.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, args=(parent_pid,), daemon=True).start()
    while True:
        try:
            payload = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        pipe.send_bytes(_call(payload, slot.threads))


def _end_with_parent(parent_pid: int) -> NoReturn:
    # PR_SET_PDEATHSIG would not do: it follows the thread that made the child.
    while os.getppid() == parent_pid:
        time.sleep(_WATCHDOG_S)
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _call(payload: bytes, threads: int) -> bytes:
    try:
        function, args = pickle.loads(payload)
        # Again for each job: __main__ may have loaded torch early, a job may have changed it.
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(threads)
        return _pack_result(function, function(*args))
    except BaseException as error:  # noqa: BLE001  sys.exit() in a job must not end the worker
        return _pack_failure(error)


def _pack_result(function: Callable[..., object], result: object) -> bytes:
    try:
        return pickle.dumps((result, None))
    except Exception as error:
        raise JobError(
            f"job {_name_of(function)}: its result, of type {type(result).__name__}, cannot be "
            f"pickled: {error}; return paths and plain values"
        ) from error


@dataclass(frozen=True)
class _Failure:
    """An exception on its way to the parent; rebuilt without __init__, whose arguments may differ.

    ``kind`` is None for an exception that is not ours.
    """

    kind: type[PbkdError] | None
    args: tuple[Any, ...]
    state: dict[str, Any]
    traceback: str

    def error(self, job: str, slot: Slot) -> PbkdError:
        error: PbkdError
        if self.kind is None:
            error = JobError(f"job {job} on slot {slot.name} failed: {self.args[0]}; see the note")
        else:
            error = self.kind.__new__(self.kind, *self.args)
            vars(error).update(self.state)
        error.add_note(f"In the process of slot {slot.name}:\n{self.traceback}")
        return error


def _pack_failure(error: BaseException) -> bytes:
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, PbkdError):
        with suppress(Exception):  # an error that holds what cannot pickle goes by its text
            return pickle.dumps((None, _Failure(type(error), error.args, vars(error), trace)))
    return pickle.dumps((None, _Failure(None, (f"{type(error).__name__}: {error}",), {}, trace)))
