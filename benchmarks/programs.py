"""pbkd's programs in workspaces of their own, to be watched and killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
LONGEST_S = 600.0
_FOREIGN = ("PREFECT_", "MLFLOW_", "PBKD_", "DVC_", "OMP_")


def environment_of(root: Path) -> dict[str, str]:
    """Of all programs of a workspace; PBKD_LOCK_DIR tells whose they are."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(_FOREIGN)}
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{kept.get('PATH', '')}",
        "PREFECT_HOME": str(root / "prefect-home"),
        "PBKD_WORKERS": "2",
        "PBKD_DEVICE": "cpu",
        "PBKD_LOCK_DIR": str(root / "locks"),
    }


def start(
    root: Path, command: str, procs: Path | None = None, **environment: str
) -> subprocess.Popen[bytes]:
    """Start a program in a workspace, in a session of its own; it writes into ``log.txt``.

    Args:
        procs: file of a control group that the program joins.
    """
    program, *arguments = command.split()
    with (root / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [str(BIN / program), *arguments],
            cwd=root, env=environment_of(root) | environment, stdout=log, stderr=log,
            start_new_session=True,
            preexec_fn=(lambda: procs.write_text(str(os.getpid()))) if procs else None,
        )  # fmt: skip


def wait_for(root: Path, process: subprocess.Popen[bytes], longest_s: float = LONGEST_S) -> None:
    """Wait for a program's good end."""
    code: int | str
    try:
        code = process.wait(longest_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        code = f"not within {longest_s:.0f} s"
    if code:
        log = (root / "log.txt").read_text()
        sys.exit(f"{process.args} in {root} failed ({code}):\n{log[-3000:]}")


def run(
    root: Path,
    command: str,
    procs: Path | None = None,
    longest_s: float = LONGEST_S,
    **environment: str,
) -> None:
    """Run a program to its good end; arguments as above."""
    wait_for(root, start(root, command, procs, **environment), longest_s)


def output_of(root: Path, command: str) -> str:
    """What a program prints."""
    program, *arguments = command.split()
    return subprocess.run(
        [str(BIN / program), *arguments],
        cwd=root, env=environment_of(root), capture_output=True, text=True,
    ).stdout  # fmt: skip


def processes_of(root: Path) -> Iterator[psutil.Process]:
    """Living processes of a workspace."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            own = process.environ().get("PBKD_LOCK_DIR") == str(root / "locks")
            if own and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def seconds_until_gone(root: Path) -> float:
    """How long a workspace's processes live on; at most 60."""
    began = time.perf_counter()
    while any(True for _ in processes_of(root)) and time.perf_counter() - began < 60:
        time.sleep(0.2)
    return time.perf_counter() - began
