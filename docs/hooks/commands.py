"""Site: the page of the command line, from what `pbkd --help` knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGE = "reference/commands.md"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the page."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The page as markdown."""
    from pbkd.cli import app

    root = typer.main.get_command(app)
    parts = ["# Commands", root.help or "", *_parameters(root), "`pbkd VERB --help` has the same."]
    for names, command in commands(root):
        parts += [
            f"## pbkd {' '.join(names)}",
            f"```\n{' '.join(['pbkd', *names, *_usage(command)])}\n```",
            command.help or "",
            *_parameters(command),
        ]
    return "\n\n".join(parts) + "\n"


def commands(group: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command by its names, those of sub-commands included."""
    for name, command in getattr(group, "commands", {}).items():
        if not command.hidden:
            yield (*names, name), command
            yield from commands(command, (*names, name))


def _usage(command: Any) -> Iterator[str]:
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            name = parameter.name.upper().rstrip("_")
            yield name if parameter.required else f"[{name}]"
    if any(parameter.param_type_name == "option" for parameter in command.params):
        yield "[OPTIONS]"


def _parameters(command: Any) -> Iterator[str]:
    rows = [_row(parameter) for parameter in command.params if not parameter.hidden]
    if rows:
        yield "\n".join(["| | | default |", "|---|---|---|", *rows])


def _row(parameter: Any) -> str:
    help_text = (parameter.help or "").strip()
    default = "" if parameter.default in (None, False) else f"`{parameter.default}`"
    if "[default: " in help_text:
        help_text, _, default = help_text.removesuffix("]").partition("[default: ")
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper().rstrip('_')}`"
        default = "required" if parameter.required else default
    else:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return f"| {names} | {help_text.strip()} | {default} |".replace("|  |", "| |")
