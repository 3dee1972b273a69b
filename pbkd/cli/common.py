"""What verbs share: workspace, pools, Prefect, and how tables and paths are shown."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable

if TYPE_CHECKING:
    import psutil

    from flows.pools import Pools
    from pbkd.artifacts import Workspace
    from pbkd.report import Table

_EXIT_INTERRUPTED = 130
_INTERRUPT_GRACE_S = 6.0
_WATCH_S = 0.5

# Prefect without a server starts a temporary one; it should be quiet, local, and in no hurry.
_PREFECT_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pbkd,flows",
}


def use_device() -> None:
    """Obey PBKD_DEVICE in this process; before torch is imported."""
    from pbkd.settings import Settings

    settings = Settings.from_env()
    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif settings.device == "cuda":
        from flows.slots import whole_machine_slot

        whole_machine_slot(settings)


def open_pools() -> AbstractContextManager[Pools]:
    """The pools; a verb lets their processes load while it imports what it needs itself."""
    from flows.pools import pools
    from pbkd.settings import Settings

    return pools(Settings.from_env())


def this_workspace() -> Workspace:
    """The workspace of the present folder, with the state folder of PBKD_STATE_DIR."""
    from pbkd.artifacts import Workspace
    from pbkd.settings import Settings

    return Workspace.find(state=Settings.from_env().state_dir)


def use_quiet_prefect() -> None:
    """Let Prefect send nothing home; before it is imported."""
    for name, value in _PREFECT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def use_prefect() -> None:
    """Quiet, local Prefect, and a Ctrl-C that ends it; before Prefect is imported."""
    use_quiet_prefect()
    # what went wrong is said once, by main(); Prefect would print a stack trace for it
    debug = logging.getLogger("pbkd").level == logging.DEBUG
    level = "ERROR" if debug else "CRITICAL"
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", level)
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: object) -> None:
    """Ctrl-C ends Prefect's temporary server, too; Prefect would wait long for its answers.

    Whatever is cut off here is safe: workers end with their parent, locks with their holder.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("interrupted; what is finished is kept", file=sys.stderr)
    timer = threading.Timer(_INTERRUPT_GRACE_S, os._exit, (_EXIT_INTERRUPTED,))
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def end_with_dvc() -> None:
    """As a stage of `dvc repro`: end when DVC is gone; its next run would find this one at work."""
    if "DVC_STAGE" not in os.environ:
        return
    import psutil

    with suppress(psutil.Error):
        for parent in psutil.Process().parents():  # between the two may be a shell
            if "DVC_STAGE" not in parent.environ():
                threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
                return


def _end_after(process: psutil.Process) -> None:
    import psutil

    with suppress(psutil.Error):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_WATCH_S)
    print("DVC is gone; what is finished is kept", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)


@cache
def stderr_console() -> Console:
    """Where log lines and the live display go: one console, so that they know of each other."""
    # settled now: the live display tells other processes by the environment that it is not theirs
    return Console(stderr=True, force_terminal=Console(stderr=True).is_terminal)


@contextmanager
def live_display(title: str) -> Iterator[None]:
    """What a run shows while it runs; after ``use_prefect``, whose Ctrl-C it passes on."""
    from flows.live import LiveDisplay
    from flows.status import RunStatus, shown

    status = RunStatus()
    with LiveDisplay(status, stderr_console(), title), shown(status):
        yield


def print_table(table: Table) -> None:
    """To standard output; as wide as the terminal, 140 columns in a pipe."""
    shown = RichTable(title=table.title, title_justify="left", title_style="bold")
    for index, head in enumerate(table.heads):
        shown.add_column(head, justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(shown)


def shown(path: Path) -> Path:
    """A path as a person would write it here: relative where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
