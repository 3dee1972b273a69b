"""Pages made from the program itself, and links of the repository that a site does not have."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from typing import Any

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pbkd.cli import app
from pbkd.config import Params
from pbkd.settings import Settings

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]*)(?:#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference of parameters, settings and commands."""
    for path, content in (
        ("reference/settings.md", settings_page()),
        ("reference/cli.md", commands_page()),
    ):
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Name files of the repository outside of docs/ instead of linking them."""

    if "/" in page.file.src_uri:
        return markdown

    def named(found: re.Match[str]) -> str:
        text, path = found[1], found[2]
        is_path = text.strip("`").endswith(path.rsplit("/", 1)[-1])
        return f"`{path}`" if is_path else f"{text} (`{path}`)"

    return _OUTSIDE.sub(named, markdown)


# ---------------------------------------------------------------- parameters


def settings_page() -> str:
    """Every key of params.yaml and every PBKD_ variable, from their models."""
    lines = [
        "# Parameters and settings",
        "",
        "What may change a result is a key of params.yaml, what must not is in the environment.",
        "",
        "## params.yaml",
        "",
    ]
    for name, field in Params.model_fields.items():
        model = _model_of(field.annotation)
        if model is None:
            lines += [
                "### " + name,
                "",
                f"{field.description or ''} Default: `{field.default}`.",
                "",
            ]
            continue
        lines += [f"### {name}", "", *_table(name, model), ""]
        for key, kind in _nested(name, model):
            lines += [f"#### {key}", "", *_table(key, kind), ""]
    lines += ["## Environment", "", "| variable | meaning | default |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        lines.append(f"| `PBKD_{name.upper()}` | {_escaped(field.description or '')} | {default} |")
    return "\n".join([*lines, ""])


def _table(name: str, model: type[BaseModel]) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in model.model_fields.items():
        shown = field.alias or key
        bounds = ", ".join(str(bound) for bound in field.metadata if str(bound)[:2] in _BOUNDS)
        kind = _kind(field.annotation) + (f" ({_bounds(bounds)})" if bounds else "")
        yield (
            f"| `{shown}` | {_escaped(kind)} | {_escaped(_default(field))} "
            f"| {_escaped(field.description or '')} |"
        )


_BOUNDS = {"Gt", "Ge", "Lt", "Le"}
_SIGNS = {"Gt(gt=": "> ", "Ge(ge=": ">= ", "Lt(lt=": "< ", "Le(le=": "<= "}


def _bounds(text: str) -> str:
    for written, sign in _SIGNS.items():
        text = text.replace(written, sign)
    return text.replace(")", "")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None:
        return "`null`"
    if isinstance(value, BaseModel) or (
        isinstance(value, tuple) and value and isinstance(value[0], BaseModel)
    ):
        return "see below"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value}`" if value != "" else "empty"


def _kind(annotation: Any) -> str:
    """A type as a reader of YAML would call it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (tuple, list):
        return f"list of {_kind(arguments[0])}"
    if (
        origin is not None
        and isinstance(origin, type)
        and issubclass(origin, dict | typing.Mapping)
    ):  # type: ignore[arg-type]
        return f"{_kind(arguments[0])} to {_kind(arguments[1])}"
    if arguments:
        return " or ".join(dict.fromkeys(_kind(argument) for argument in arguments))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _title(annotation)
    return {"int": "integer", "str": "text", "bool": "true or false", "float": "number"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def _title(model: type[BaseModel]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", " ", model.__name__.removesuffix("Config")).lower()


def _nested(name: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Models within a section, each once, with the key that leads there."""
    seen: set[type[BaseModel]] = set()

    def inside(key: str, annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation not in seen:
                seen.add(annotation)
                kind = annotation.model_fields.get("kind") or annotation.model_fields.get("method")
                suffix = f" ({_title(annotation)})" if kind is not None else ""
                yield key + suffix, annotation
                for own, field in annotation.model_fields.items():
                    yield from inside(f"{key}.{own}", field.annotation)
            return
        for argument in typing.get_args(annotation):
            yield from inside(key, argument)

    for own, field in model.model_fields.items():
        yield from inside(f"{name}.{own}", field.annotation)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


# ---------------------------------------------------------------- commands


def commands_page() -> str:
    """Every verb with its arguments and options, as `--help` shows them."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    lines = ["# Command line", "", "```", "pbkd [--quiet] [--debug] VERB [OPTIONS]", "```", ""]
    for name, command in group.commands.items():
        if command.hidden:
            continue
        lines += [f"## pbkd {name}", "", _prose(command.help or ""), ""]
        rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            lines += ["| | meaning | default |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    shown = parameter.metavar or ""
    if parameter.param_type_name == "argument":
        name = f"`{(parameter.metavar or parameter.name or '').upper()}`"
    else:
        flags = ", ".join([*parameter.opts, *parameter.secondary_opts])
        name = f"`{flags}{' ' + shown if shown else ''}`"
    default = parameter.default
    text = (
        "required" if parameter.required else "" if default in (None, False, ()) else f"`{default}`"
    )
    return f"| {name} | {_escaped(getattr(parameter, 'help', None) or '')} | {text} |"


def _prose(text: str) -> str:
    return re.sub(r"\n(?!\n)(?<!\n\n)", " ", text.replace("\f", "")).strip()
