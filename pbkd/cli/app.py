"""The command line's root: global options, and errors as one line and an exit code."""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from typer.core import TyperGroup

from pbkd._version import __version__
from pbkd.allocator import keep_freed_memory
from pbkd.cli.common import end_with_dvc, stderr_console
from pbkd.errors import ConfigError, PbkdError, disk_errors_explained
from pbkd.redaction import without_secrets

_EXIT_ERROR = 1
_EXIT_USAGE = 2
_EXIT_BUG = 70
_ANYWHERE = ("--debug", "--quiet", "-q")


class _Root(TyperGroup):
    """Takes the global options behind a command, too, where people type them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move them to the front."""
        ours = [word for word in args if word in _ANYWHERE]
        return super().parse_args(ctx, ours + [word for word in args if word not in _ANYWHERE])


app = typer.Typer(
    name="pbkd",
    cls=_Root,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress a trained CNN by parallel blockwise knowledge distillation.\n\n"
    "`dvc repro` or `pbkd run` goes through all stages; each stage is a verb, too. "
    "Parameters come from params.yaml, settings of this machine from PBKD_ variables.\n\n"
    "Examples: `pbkd inspect` · `pbkd run` · `PBKD_WORKERS=4 pbkd distill` · `pbkd report`",
)
_debug = False


def main() -> None:
    """Entry point: errors of ours become one line and an exit code."""
    keep_freed_memory()
    try:
        with disk_errors_explained():
            app()
    except PbkdError as error:
        if _debug:
            _print_trace()
        else:
            stderr_console().print(f"[bold red]error:[/] {_plain(error)}", soft_wrap=True)
        sys.exit(_EXIT_USAGE if isinstance(error, ConfigError) else _EXIT_ERROR)
    except Exception as error:  # noqa: BLE001  the last resort: said, with an exit code
        if _debug:
            _print_trace()
        else:
            said = without_secrets(f"unexpected {type(error).__name__}: {error}")
            print(f"{said}\nrun it again with --debug to see where", file=sys.stderr)
        sys.exit(_EXIT_BUG)


def _print_trace() -> None:
    print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)


def _plain(error: PbkdError) -> str:
    return str(error).replace("[", r"\[")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pbkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Stack traces and detailed logs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings only.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    global _debug
    _debug = debug
    end_with_dvc()
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    handler = _handler(debug=debug)
    handler.addFilter(_redacted)
    for name in ("pbkd", "flows"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False


def _handler(*, debug: bool) -> logging.Handler:
    console = stderr_console()
    if console.is_terminal:
        return RichHandler(
            console=console, show_path=debug, show_level=debug, log_time_format="%H:%M:%S"
        )
    handler = _Lines()
    level = " %(levelname)s" if debug else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s{level} %(message)s", "%H:%M:%S"))
    return handler


def _redacted(record: logging.LogRecord) -> bool:
    """Takes passwords out of a record; Prefect's handlers, which come later, get it so, too."""
    record.msg, record.args = without_secrets(record.getMessage()), None
    return True


class _Lines(logging.Handler):
    """A line per record, however long; to what is standard error at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # noqa: BLE001  as logging's own handlers
            self.handleError(record)
