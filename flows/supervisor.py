"""A program that ends with its parent, and takes with it whatever it has started.

`python -m flows.supervisor PARENT_PID MODULE [ARGUMENT]...` runs ``python -m MODULE`` and stands
between it and the parent. A signal at the parent's death would not do: Prefect's worker waits for
its flow runs when it is told to end, and they are in sessions of their own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil

GRACE_S = 8.0
"""What is told to end is killed after so long."""
_POLL_S = 0.2
_PR_SET_CHILD_SUBREAPER = 36


def supervise(parent_pid: int, command: list[str]) -> int:
    """Run a command until it ends, SIGTERM comes, or the parent is gone; then end its descendants.

    Returns:
        The command's status, negative for a signal; 0 where it was told to end.
    """
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: told.set())
    _adopt_orphans()
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None and os.getppid() == parent_pid and not told.wait(_POLL_S):
        _bury(process.pid)
    status = process.poll() or 0
    _end_descendants()
    return status


def _adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies; Linux has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _bury(but: int | None = None) -> None:
    """Collect children that have ended, up to ``but``, whose status somebody else collects."""
    with suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == but:
                return
            os.waitpid(ended.si_pid, 0)


def _end_descendants() -> None:
    me = psutil.Process()
    # the command and what it has started, not what they have: a flow run ends its own workers,
    # and says in Prefect that it was ended
    with suppress(psutil.NoSuchProcess):
        for process in me.children():
            for told in (process, *process.children()):
                with suppress(psutil.NoSuchProcess):
                    told.terminate()
    until = time.monotonic() + GRACE_S
    while living := me.children(recursive=True):
        if time.monotonic() > until:
            for process in living:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(_POLL_S)
        _bury()


if __name__ == "__main__":
    sys.exit(abs(supervise(int(sys.argv[1]), [sys.executable, "-m", *sys.argv[2:]])))
