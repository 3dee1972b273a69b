"""What a worker does with its jobs, and the process of a slot, which takes them from a pipe.

Jobs, results, failures and log lines travel as bytes, packed and unpacked here for every pool.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flows.slots import Slot
from pbkd.allocator import keep_freed_memory
from pbkd.errors import ConfigError, JobError, JobFailedError, PbkdError
from pbkd.orphans import end_with_parent
from pbkd.redaction import without_secrets

RESULT, LOG = b"R", b"L"  # first byte of what a worker sends


def serve(pipe: Connection, slot: Slot, parent_pid: int, *, preload: bool = False) -> None:
    """Run jobs until the pipe or the parent is gone; the child's main function.

    Args:
        preload: import what the pipeline's jobs need before the first one comes.
    """
    sending = threading.Lock()

    def send(message: bytes) -> None:
        with sending:
            pipe.send_bytes(message)

    prepare(slot, send)
    # A group of its own: what a job starts can be killed with it, even after a crash.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_parent(parent_pid, _end_group)
    if preload:
        import_libraries()
    while True:
        try:
            payload = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        send(call(payload, slot.threads))


def prepare(slot: Slot, send: Callable[[bytes], object]) -> None:
    """Make this process a worker of the slot; before anything in it imports torch.

    Args:
        send: takes each line that the library logs, as a message to the pool's process.
    """
    # OpenMP and CUDA read the environment once
    threads = str(slot.threads)
    os.environ |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    os.environ["MKL_DYNAMIC"] = "FALSE"  # or MKL takes fewer, at most one per physical core
    if slot.visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.visible_devices
    keep_freed_memory()
    logging.getLogger("pbkd").setLevel(logging.INFO)
    logging.getLogger("pbkd").addHandler(_LogSender(send))


def import_libraries() -> None:
    """Import the stages, and what torch's first optimizer imports; a failure is left to the job."""
    with suppress(Exception):
        import torch

        from pbkd.stages import STAGES

        for name in STAGES:
            importlib.import_module(f"pbkd.stages.{name}")
        torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    # Its own lock is a semaphore of the system, which is told as leaked when the pool kills us.
    with suppress(ImportError):
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())


class _LogSender(logging.Handler):
    """Sends what the library logs; the pool's process knows where to show it."""

    def __init__(self, send: Callable[[bytes], object]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        line = pickle.dumps((record.name, record.levelno, record.getMessage()))
        with suppress(OSError):
            self._send(LOG + line)


def log_line(line: bytes) -> None:
    """Log in this process what a worker logged."""
    name, level, message = pickle.loads(line)  # noqa: S301 - our own pipe
    logging.getLogger(name).log(level, "%s", message)


def _end_group() -> None:
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def pack_call(job: str, function: Callable[..., object], args: tuple[object, ...]) -> bytes:
    """A job as a worker takes it, with this process's folder and path.

    Raises:
        JobError: function or arguments cannot be pickled.
    """
    try:
        return pickle.dumps((str(Path.cwd()), sys.path, pickle.dumps((function, args))))
    except Exception as error:
        raise JobError(
            f"job {job} cannot be sent to a worker: {error}; use a function at the top level of a "
            "module, and paths and plain values as arguments"
        ) from error


def call(payload: bytes, threads: int) -> bytes:
    """Run what ``pack_call`` has packed; a message with its result or its failure."""
    try:
        folder, path, packed = pickle.loads(payload)  # noqa: S301 - our own pipe
        _go_to(folder)
        # The parent's path may have grown since: a user's modules lie in the workspace.
        sys.path[:] = path
        function, args = pickle.loads(packed)  # noqa: S301 - our own pipe
        # Again for each job: __main__ may have loaded torch early, a job may have changed it.
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(threads)
        return RESULT + _pack_result(function, function(*args))
    except BaseException as error:  # noqa: BLE001  sys.exit() in a job must not end the worker
        return RESULT + _pack_failure(error)


def _go_to(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"{socket.gethostname()}: the folder of the run, {folder}, cannot be entered: "
            f"{error.strerror}; all machines need the workspace at the same path of a shared disk"
        ) from None


def unpack_result(outcome: bytes, job: str, slot: Slot) -> Any:
    """A job's result.

    Raises:
        PbkdError: as the job raised it, with the worker's traceback as a note.
        JobFailedError: the job raised something else.
    """
    result, failure = pickle.loads(outcome)  # noqa: S301 - our own pipe
    if failure is not None:
        raise failure.error(job, slot)
    return result


def _pack_result(function: Callable[..., object], result: object) -> bytes:
    try:
        return pickle.dumps((result, None))
    except Exception as error:
        raise JobError(
            f"job {name_of(function)}: its result, of type {type(result).__name__}, cannot be "
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
            error = JobFailedError(
                f"job {job} on slot {slot.name} failed: {self.args[0]}; see the note"
            )
        else:
            error = self.kind.__new__(self.kind, *self.args)
            vars(error).update(self.state)
        error.add_note(f"In the process of slot {slot.name}:\n{self.traceback}")
        return error


def _pack_failure(error: BaseException) -> bytes:
    trace = without_secrets("".join(traceback.format_exception(error)))
    if isinstance(error, PbkdError):
        with suppress(Exception):  # an error that holds what cannot pickle goes by its text
            return pickle.dumps((None, _Failure(type(error), error.args, vars(error), trace)))
    return pickle.dumps((None, _Failure(None, (f"{type(error).__name__}: {error}",), {}, trace)))


def name_of(function: Callable[..., object]) -> str:
    """How messages call a job's function."""
    return getattr(function, "__qualname__", repr(function))
