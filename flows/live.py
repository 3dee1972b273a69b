"""The terminal while a run goes on: one display that is redrawn in place, log lines above it.

Where standard error is no terminal, and with ``--quiet``, there is none: the events of ``status``
are log lines then. It imports neither Prefect nor torch, so that it is there before them.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.status import (
    IS_EVENT,
    WORDS,
    BlockStatus,
    Phase,
    RunStatus,
    StageStatus,
    State,
    seconds_text,
)

_PER_S = 3.0
_LEFT = 10  # width of the words at the left, in characters
_BAR = 16
_SPARE = 2  # lines of the screen that stay free
_PATIENCE_S = 1.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_COMPATIBLE = (
    "TTY_COMPATIBLE"  # rich's: "0" is no terminal, so that a worker draws no bar of its own
)


class LiveDisplay:
    """Shows a run until the block ends; a context manager, for the main thread.

    It is taken away after a run that ended well, and left where it failed. The cursor comes back
    in any case, also on SIGINT and SIGTERM, whose handlers before are called then.

    Args:
        title: what runs, "pbkd run".
        console: of standard error, its ``force_terminal`` set; what handlers of our loggers write
            to it appears above.
    """

    def __init__(self, status: RunStatus, console: Console, title: str) -> None:
        self._status = status
        self._console = console
        self._title = title
        self._handlers: list[logging.Handler] = []
        self._before: dict[int, Any] = {}
        self._live: Live | None = None
        self._stopping: threading.Thread | None = None
        self._compatible: str | None = None

    def __enter__(self) -> Self:
        if not _is_wanted(self._console):
            return self
        for logger in map(logging.getLogger, ("pbkd", "flows")):
            self._handlers += [h for h in logger.handlers if _console_of(h) is self._console]
        for handler in self._handlers:
            handler.addFilter(_is_no_event)
        live = Live(
            get_renderable=self.render,
            console=self._console,
            refresh_per_second=_PER_S,
            redirect_stdout=False,
            vertical_overflow="crop",
        )
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._on_signal) for n in _SIGNALS}
        self._compatible = os.environ.get(_COMPATIBLE)
        os.environ[_COMPATIBLE] = "0"
        self._live = live
        live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop(keep=error is not None)
        if self._stopping is not None:  # what it waited for may be let go only now
            self._stopping.join(_PATIENCE_S)
        for number, before in self._before.items():
            if signal.getsignal(number) == self._on_signal:  # somebody may have set another
                signal.signal(number, before)
        for handler in self._handlers:
            handler.removeFilter(_is_no_event)

    def render(self) -> RenderableType:
        """The display as it is now, no higher than the screen."""
        now_s, stages, phase = self._status.now_s(), self._status.stages, self._status.phase
        head = Table.grid(expand=True)
        head.add_column(no_wrap=True)
        head.add_column(no_wrap=True, justify="right")
        elapsed = seconds_text(now_s - self._status.began_s)
        head.add_row(Text(self._title, "bold"), Text(elapsed, "dim"))
        lines = _grid()
        for word, text in _stage_lines(stages, now_s):
            lines.add_row(word, text)
        if phase is None:
            return Group(head, lines)
        for word, text in _phase_lines(phase, now_s):
            lines.add_row(word, text)
        # words that do not fit go on in further lines
        wrapped = self._console.render_lines(lines, pad=False)
        num_rows = self._console.height - len(wrapped) - 1 - _SPARE
        return Group(head, lines, *_block_rows(phase, now_s, num_rows))

    def _stop(self, *, keep: bool) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.transient = not keep
            live.stop()
            os.environ.pop(_COMPATIBLE)
            if self._compatible is not None:
                os.environ[_COMPATIBLE] = self._compatible

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # not here: the line below this handler may hold what the redrawing thread waits for
        self._stopping = threading.Thread(target=self._stop, kwargs={"keep": True}, daemon=True)
        self._stopping.start()
        self._stopping.join(_PATIENCE_S)
        before = self._before[number]
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _is_wanted(console: Console) -> bool:
    is_terminal = console.is_terminal and not console.is_dumb_terminal and console.file.isatty()
    return is_terminal and logging.getLogger("flows").isEnabledFor(logging.INFO)


def _console_of(handler: logging.Handler) -> object:
    return getattr(handler, "console", None)


def _is_no_event(record: logging.LogRecord) -> bool:
    return not getattr(record, IS_EVENT, False)


def _grid() -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=_LEFT, style="dim", no_wrap=True)
    grid.add_column()
    return grid


def _stage_lines(stages: list[StageStatus], now_s: float) -> list[tuple[str, Text]]:
    if not stages:
        return [("now", Text("starting"))]

    def timed(stage: StageStatus) -> str:
        return f"{stage.name} {seconds_text(stage.duration_s(now_s))}"

    texts: dict[str, tuple[str, Callable[[StageStatus], str], str]] = {
        "up to date": ("", lambda stage: stage.name, ""),
        "done": ("", timed, "green"),
        "failed": ("", timed, "bold red"),
        "running": ("now", timed, "bold"),
        "waiting": ("next", lambda stage: stage.name, "dim"),
    }
    lines = []
    for state, (word, text, style) in texts.items():
        if own := [text(stage) for stage in stages if stage.state == state]:
            lines.append((word or state, Text(", ".join(own), style)))
    return lines


def _phase_lines(phase: Phase, now_s: float) -> list[tuple[str, Text]]:
    counts = phase.counts
    states: tuple[State, ...] = ("done", "stored", "running", "waiting", "failed")
    texts = [f"{counts[state]} {WORDS[state]}" for state in states if state in counts]
    blocks = Text(f"{', '.join(texts)} of {len(phase.blocks)}" if texts else "")
    lines = [("blocks", blocks)]
    if failed := [block.name for block in phase.blocks if block.state == "failed"]:
        text = Text(f"failed: {', '.join(failed)}", "bold red", no_wrap=True, overflow="ellipsis")
        lines.append(("", text))
    if (left_s := phase.left_s(now_s)) is not None and phase.planned_s is not None:
        planned = f"planned {seconds_text(phase.planned_s)}"
        left = f", about {seconds_text(left_s)} left"
        over = f", {seconds_text(-left_s)} over"
        has_begun = phase.started_s is not None
        lines.append(("time", Text(planned + (left if left_s >= 0 else over) * has_begun)))
    return lines


def _block_rows(phase: Phase, now_s: float, num_rows: int) -> list[RenderableType]:
    """The running blocks, as many as there is room for, and how many more there are."""
    running = [block for block in phase.blocks if block.state == "running"]
    if not running or num_rows < 1:
        return []
    num_shown = len(running) if len(running) <= num_rows else num_rows - 1
    rows = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in range(6):
        rows.add_column(no_wrap=True, overflow="ellipsis")
    rows.columns[3].justify = rows.columns[4].justify = "right"
    rows.columns[5].ratio = 1
    for block in running[:num_shown]:
        rows.add_row(*_cells(block, phase, now_s))
    if left := len(running) - num_shown:
        return [rows, Text(f"and {left} more", "dim")]
    return [rows]


def _cells(block: BlockStatus, phase: Phase, now_s: float) -> list[RenderableType]:
    share = phase.share(block.candidates)
    took_s = block.duration_s(now_s)
    losses = [
        f"{candidate.name} {candidate.val_loss:.3g}"
        for candidate in block.candidates
        if candidate.val_loss is not None
    ]
    return [
        Text(block.name),
        Text(", ".join(block.workers), "dim"),
        ProgressBar(total=1.0, completed=share, width=_BAR),
        Text(f"{share:.0%}"),
        Text("" if took_s is None else seconds_text(took_s)),
        Text(", ".join(losses), "dim"),
    ]
