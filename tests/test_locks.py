"""Locks between processes."""

from __future__ import annotations

import math
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pbkd.errors import ArtifactError, ConfigError, WorkspaceBusyError
from pbkd.locks import device_lock_dir, file_lock, workspace_lock

HOLDER = """\
import sys, time
from pathlib import Path
from pbkd.locks import file_lock
with file_lock(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def _held_by_another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(path), "--flag"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_with_pid_and_command(tmp_path: Path) -> None:
    path = tmp_path / "it.lock"
    with (
        _held_by_another_process(path) as holder,
        pytest.raises(WorkspaceBusyError) as caught,
        file_lock(path, "device cpu-0"),
    ):
        pass
    assert f"device cpu-0 is in use by process {holder.pid} (-c {path} --flag)" in str(caught.value)


def test_the_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    path = tmp_path / "it.lock"
    with _held_by_another_process(path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with file_lock(path, "it"):
            assert f'"pid": {os.getpid()}' in path.read_text()


def test_the_lock_is_free_after_an_exception_and_its_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "state" / "it.lock"
    with pytest.raises(ZeroDivisionError), file_lock(path, "it"):
        raise ZeroDivisionError
    assert path.is_file()
    with file_lock(path, "it"):
        pass


@pytest.mark.parametrize("timeout_s", [30.0, math.inf])
def test_waiting_ends_when_the_holder_does(tmp_path: Path, timeout_s: float) -> None:
    path = tmp_path / "it.lock"
    held = threading.Event()

    def hold_for_a_moment() -> None:
        with file_lock(path, "it"):
            held.set()
            time.sleep(0.15)

    holder = threading.Thread(target=hold_for_a_moment)
    holder.start()
    held.wait()
    with file_lock(path, "it", timeout_s=timeout_s):
        holder.join(timeout=5)
        assert not holder.is_alive()


def test_waiting_gives_up_after_the_timeout(tmp_path: Path) -> None:
    path = tmp_path / "it.lock"
    with file_lock(path, "it"):
        begin = time.monotonic()
        with pytest.raises(WorkspaceBusyError), file_lock(path, "it", timeout_s=0.2):
            pass
        assert 0.2 <= time.monotonic() - begin < 5


def test_a_shorter_command_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "it.lock"
    path.write_text('{"pid": 1, "command": "' + "x" * 1000 + '"}')
    with (
        file_lock(path, "it"),
        pytest.raises(WorkspaceBusyError, match=f"process {os.getpid()} "),
        file_lock(path, "it"),
    ):
        pass


def test_workspaces_that_share_a_state_folder_do_not_lock_each_other(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with (
        workspace_lock(tmp_path / "a", state),
        workspace_lock(tmp_path / "b", state),
        pytest.raises(WorkspaceBusyError, match=f"workspace {tmp_path / 'a'} is in use"),
        workspace_lock(tmp_path / "a", state),
    ):
        pass


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_in_place_of_a_lock_is_refused_and_its_target_kept(
    tmp_path: Path, is_there: bool
) -> None:
    target = tmp_path / "mine"
    if is_there:
        target.write_text("text")
    (tmp_path / "it.lock").symlink_to(target)
    with (
        pytest.raises(ArtifactError, match=r"it\.lock is a symbolic link"),
        file_lock(tmp_path / "it.lock", "it"),
    ):
        pass
    assert target.exists() == is_there
    assert not is_there or target.read_text() == "text"


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_of_device_locks_is_for_its_user_alone(temporary_folder: Path) -> None:
    folder = device_lock_dir()
    assert folder.parent == temporary_folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert device_lock_dir() == folder


def _let_others_write(folder: Path) -> None:
    folder.chmod(0o777)


def _let_the_group_write(folder: Path) -> None:
    folder.chmod(0o770)


def _put_a_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def _put_a_file(folder: Path) -> None:
    folder.rmdir()
    folder.touch(0o600)


@pytest.mark.parametrize(
    "change", [_let_others_write, _let_the_group_write, _put_a_link, _put_a_file]
)
def test_a_folder_of_device_locks_that_others_may_have_made_is_refused(
    temporary_folder: Path, change: Callable[[Path], None]
) -> None:
    folder = device_lock_dir()
    change(folder)
    with pytest.raises(ConfigError, match=f"{folder} must be .* PBKD_LOCK_DIR"):
        device_lock_dir()


def test_a_folder_of_device_locks_of_another_owner_is_refused(
    temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: user)
    (temporary_folder / f"pbkd-locks-{user}").mkdir(0o700)
    with pytest.raises(ConfigError, match="PBKD_LOCK_DIR"):
        device_lock_dir()
