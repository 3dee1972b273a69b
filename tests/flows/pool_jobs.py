"""Jobs that a pool's fresh process can import."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from pbkd.errors import MissingExtraError, TrainingError

TORCH_CAME_EARLY = "torch" in sys.modules


def add(left: int, right: int) -> int:
    return left + right


def pid() -> int:
    return os.getpid()


def can_import(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def torch_is_loaded() -> bool:
    return "torch.optim" in sys.modules


def sleep(duration_s: float) -> float:
    time.sleep(duration_s)
    return duration_s


def work(duration_s: float) -> float:
    """Keep the processor busy."""
    end = time.monotonic() + duration_s
    while time.monotonic() < end:
        pass
    return duration_s


def log(message: str) -> str:
    logging.getLogger("pbkd.models.training").info(message)
    return message


def hold(pid_file: Path) -> None:
    """Say who runs, then run for longer than any test."""
    write(pid_file, str(os.getpid()))
    time.sleep(30)


def hold_with_offspring(pid_file: Path) -> None:
    """As hold, with a forked process that outlives its parent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
    hold(pid_file)


def beat(heartbeat: Path, num_beats: int) -> int:
    """Touch the file every 0.1 s, then hang if it was told to beat 0 times, else return."""
    for _ in range(num_beats):
        heartbeat.touch()
        time.sleep(0.1)
    if num_beats == 0:
        time.sleep(30)
    return num_beats


def environment() -> tuple[dict[str, str], bool, int]:
    import torch

    return dict(os.environ), TORCH_CAME_EARLY, torch.get_num_threads()


def change_threads() -> None:
    import torch

    torch.set_num_threads(1)


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def leave() -> None:
    os._exit(7)


def give_up() -> None:
    sys.exit(3)


def diverge() -> None:
    raise TrainingError("block layer1.0: loss is NaN")


def miss() -> None:
    raise MissingExtraError("rays", "ray", "the other pool")


def divide() -> float:
    return 1 / 0


def unpicklable() -> object:
    return lambda: None


def span(folder: Path) -> None:
    """Leave the start and end of this job, in seconds of the machine's monotonic clock."""
    start_s = time.monotonic()
    time.sleep(0.2)
    write(folder / f"{os.getpid()}-{start_s}", f"{start_s} {time.monotonic()}")


def ignored_signals() -> bool:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def hold_everything(pid_file: Path) -> None:
    """As hold, without ever letting another thread of the process run."""
    write(pid_file, str(os.getpid()))
    ctypes.PyDLL(None).sleep(30)
