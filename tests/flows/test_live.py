"""The live display fits the screen, lets log lines through, and always gives the cursor back."""

from __future__ import annotations

import logging
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from io import StringIO
from types import FrameType

import pytest
from rich.console import Console
from rich.logging import RichHandler

from flows.live import LiveDisplay
from flows.status import CandidateStatus, RunStatus, event

HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"
WIDTH, HEIGHT = 100, 30


class Terminal:
    """A pseudo-terminal with a console on it, and all that was written there."""

    def __init__(self) -> None:
        self._primary, secondary = pty.openpty()
        self._file = os.fdopen(secondary, "w")
        self.console = Console(
            file=self._file, force_terminal=True, width=WIDTH, height=HEIGHT, _environ={}
        )
        self._written = bytearray()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                self._written += os.read(self._primary, 4096)
            except OSError:  # the other end is closed
                return

    def close(self) -> bytes:
        self._file.close()
        self._thread.join()
        os.close(self._primary)
        return bytes(self._written)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """Our loggers' root of the flows, at the command line's level."""
    logger = logging.getLogger("flows")
    before = logger.level, logger.propagate, logger.handlers[:]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    yield logger
    logger.setLevel(before[0])
    logger.propagate = before[1]
    logger.handlers[:] = before[2]


def running(num_blocks: int, num_running: int) -> RunStatus:
    status = RunStatus()
    status.list_stages(["prepare", "teacher", "distill", "stitch"])
    with status.stage("prepare"):
        status.skip("prepare")
    with status.stage("teacher"):
        pass
    names = [f"layer{number}.conv" for number in range(num_blocks)]
    candidates = [CandidateStatus(name, kind) for name in names for kind in ("narrow", "low_rank")]
    status.begin_phase(candidates, max_epochs=4, planned_s=90.0)
    for number in range(num_running):
        key = f"layer{number}.conv/narrow"
        status.start_job([key], f"gpu-{number}")
        status.begin(key)
        status.advance(key, 2, 0.125)
    return status


def drawn(status: RunStatus, height: int = HEIGHT) -> list[str]:
    console = Console(file=StringIO(), force_terminal=True, width=WIDTH, height=height, _environ={})
    lines = console.render_lines(LiveDisplay(status, console, "pbkd run").render(), pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def test_sixty_running_blocks_fit_the_screen() -> None:
    lines = drawn(running(60, 60))
    assert len(lines) < HEIGHT
    shown = [line for line in lines if line.startswith("layer")]
    assert lines[-1] == f"and {60 - len(shown)} more"
    assert len(shown) > 15
    assert any(line.startswith("blocks") and "60 running of 60" in line for line in lines)


@pytest.mark.parametrize("height", [5, 8, 12])
def test_a_low_screen_is_not_exceeded_by_blocks(height: int) -> None:
    lines = drawn(running(60, 60), height)
    assert sum(line.startswith("layer") for line in lines) <= max(0, height - 6)


def test_it_says_what_runs_and_what_is_left() -> None:
    status = running(8, 1)
    status.fail_job(["layer5.conv/narrow"], "killed")
    lines = drawn(status)
    assert lines[0].startswith("pbkd run")
    text = "\n".join(lines)
    assert re.search(r"^up to date prepare$", text, re.MULTILINE)
    assert re.search(r"^done +teacher 0\.0 s$", text, re.MULTILINE)
    assert re.search(r"^next +distill, stitch$", text, re.MULTILINE)
    assert re.search(r"^blocks +1 running, 6 waiting, 1 failed of 8$", text, re.MULTILINE)
    assert "failed: layer5.conv" in text
    assert "planned 1 min 30 s, about 1 min 30 s left" in text
    assert re.search(r"^layer0\.conv +gpu-0 +\S+ +25% +0\.0 s +narrow 0\.125$", text, re.MULTILINE)


def test_without_a_plan_there_is_no_time_left() -> None:
    status = RunStatus()
    assert "starting" in "\n".join(drawn(status))
    status.begin_phase([CandidateStatus("a", "x")], max_epochs=4, planned_s=None)
    assert "left" not in "\n".join(drawn(status))


def test_while_workers_load_the_planned_time_does_not_run(logger: logging.Logger) -> None:
    status = running(3, 0)
    status.start_job(["layer0.conv/narrow"], "gpu-0")
    text = "\n".join(drawn(status))
    assert re.search(r"^time +planned 1 min 30 s$", text, re.MULTILINE)


def test_it_is_taken_away_after_a_good_end(logger: logging.Logger) -> None:
    terminal = Terminal()
    with LiveDisplay(running(3, 1), terminal.console, "pbkd run"):
        pass
    written = terminal.close()
    assert written.count(HIDE) == 1
    assert written.rfind(SHOW) > written.rfind(HIDE)
    erased = re.search(rb"(?:\x1b\[1A\x1b\[2K)+$", written)
    assert erased is not None


def test_it_stays_and_gives_the_cursor_back_after_an_error(logger: logging.Logger) -> None:
    terminal = Terminal()
    with (
        pytest.raises(ZeroDivisionError),
        LiveDisplay(running(3, 1), terminal.console, "pbkd run"),
    ):
        raise ZeroDivisionError
    written = terminal.close()
    assert written.rfind(SHOW) > written.rfind(HIDE)
    assert written.endswith(SHOW)


def test_log_lines_go_above_and_events_only_where_there_is_no_display(
    logger: logging.Logger,
) -> None:
    terminal = Terminal()
    handler = RichHandler(console=terminal.console)
    elsewhere = logging.StreamHandler(StringIO())
    logger.addHandler(handler)
    logger.addHandler(elsewhere)
    with LiveDisplay(running(3, 1), terminal.console, "pbkd run"):
        logger.info("the teacher is good")
        event("distill: done")
    event("afterwards")
    written = terminal.close()
    assert b"the teacher is good" in written
    assert b"distill: done" not in written
    assert b"afterwards" in written
    assert elsewhere.stream.getvalue().splitlines()[-2:] == ["distill: done", "afterwards"]


def test_without_a_terminal_nothing_is_drawn(logger: logging.Logger) -> None:
    file = StringIO()
    console = Console(file=file, force_terminal=True)  # as FORCE_COLOR does
    with LiveDisplay(running(3, 1), console, "pbkd run"):
        assert "TTY_COMPATIBLE" not in os.environ
    assert file.getvalue() == ""


def test_quiet_is_quiet(logger: logging.Logger) -> None:
    logger.setLevel(logging.WARNING)
    terminal = Terminal()
    with LiveDisplay(running(3, 1), terminal.console, "pbkd run"):
        pass
    assert terminal.close() == b""


def test_other_processes_are_told_that_the_terminal_is_not_theirs(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "from rich.console import Console; print(Console(stderr=True).is_terminal)"
    terminal = Terminal()
    monkeypatch.setenv("FORCE_COLOR", "1")
    with LiveDisplay(running(3, 1), terminal.console, "pbkd run"):
        inside = subprocess.check_output([sys.executable, "-c", script], text=True)
    outside = subprocess.check_output([sys.executable, "-c", script], text=True)
    terminal.close()
    assert (inside.strip(), outside.strip()) == ("False", "True")


def test_ctrl_c_gives_the_cursor_back_before_the_handler_is_called(
    logger: logging.Logger,
) -> None:
    terminal = Terminal()
    calls = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        terminal.console.file.write("handler called\n")
        calls.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with (
            pytest.raises(KeyboardInterrupt),
            LiveDisplay(running(3, 1), terminal.console, "pbkd run"),
        ):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGINT, before)
    written = terminal.close()
    assert calls == [signal.SIGINT]
    assert written.rfind(HIDE) < written.rfind(SHOW) < written.rfind(b"handler called")


def test_ctrl_c_in_the_middle_of_a_log_line_does_not_hang(logger: logging.Logger) -> None:
    terminal = Terminal()
    status = running(3, 1)
    display = LiveDisplay(status, terminal.console, "pbkd run")
    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt), display, terminal.console._lock:
            time.sleep(0.6)  # the redrawing thread waits for the line's end
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 5
    written = terminal.close()
    assert written.rfind(SHOW) > written.rfind(HIDE)


TERMINATED = """
import logging, os, signal
from flows.live import LiveDisplay
from flows.status import RunStatus
from pbkd.cli.common import stderr_console
logging.getLogger("flows").setLevel(logging.INFO)
with LiveDisplay(RunStatus(), stderr_console(), "pbkd run"):
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
"""


def test_sigterm_gives_the_cursor_back_and_ends_the_process() -> None:
    primary, secondary = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED], stderr=secondary, env=environment, timeout=60
    )
    os.close(secondary)
    written = os.read(primary, 65536)
    os.close(primary)
    assert done.returncode == -signal.SIGTERM
    assert HIDE in written
    assert written.rfind(SHOW) > written.rfind(HIDE)
