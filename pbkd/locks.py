"""Locks between processes, held by the kernel, so that a killed holder never blocks anybody."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from pbkd.errors import ArtifactError, ConfigError, WorkspaceBusyError


def device_lock_dir() -> Path:
    """Default folder of the machine-wide device locks, one per user; made where missing.

    Raises:
        ConfigError: somebody else owns it or can write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"pbkd-locks-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_ours or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{folder} must be a folder of yours that nobody else can write to; delete it, or set "
            "PBKD_LOCK_DIR to another"
        )
    return folder


@contextmanager
def file_lock(
    path: Path, what: str, *, timeout_s: float = 0.0, command: str | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the file names the holder.

    Args:
        path: lock file; made where missing, never deleted (deleting would let two in).
        what: the thing that is locked, for the message ("workspace /x", "device cpu-0").
        timeout_s: how long to wait for another holder, in seconds.
        command: what holds it, for the message of those who want it, too; default: argv.

    Raises:
        WorkspaceBusyError: somebody else holds it; the message has pid, command, and since when.
        ArtifactError: ``path`` is a symbolic link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open(path)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise WorkspaceBusyError(
                        f"{what} is in use by {_holder(path)}; wait for it to end, or stop it"
                    ) from None
                time.sleep(0.05)
        holder = {
            "pid": os.getpid(),
            "command": command or " ".join(sys.argv),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def workspace_lock(
    root: Path, state: Path, *, command: str | None = None
) -> AbstractContextManager[None]:
    """Hold a workspace for a run; WorkspaceBusyError, as of ``file_lock``, where another has it."""
    name = hashlib.blake2b(str(root).encode(), digest_size=6).hexdigest()
    return file_lock(state / f"run-{name}.lock", f"workspace {root}", command=command)


def _open(path: Path) -> int:
    try:  # a link that somebody else put there would have us overwrite what it names
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ArtifactError(f"lock file {path} is a symbolic link; delete it") from None


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} ({holder['command']}) since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
