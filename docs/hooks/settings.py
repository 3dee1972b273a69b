"""Site: the page of all keys of params.yaml and of the environment, from the pydantic models."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

PAGE = "reference/settings.md"
_UNIONS = (Union, types.UnionType)
_PLAIN = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "`true`, `false`",
    type(None): "`null`",
}
_HEADS = "| key | type | default | meaning |\n|---|---|---|---|"
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_OPENING = """\
# Settings

Every key of params.yaml, with its type, range and default; a key that is not here is an error.
Whatever may change a result stands in params.yaml. What must not, comes from the
[environment](#environment).
"""
_ENVIRONMENT = """\
## Environment { #environment }

Read from `PBKD_` variables; an unknown one is an error. `MLFLOW_TRACKING_URI`, `PREFECT_API_URL`
and `RAY_ADDRESS` name servers to use instead of local files and processes.
"""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the page."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The page as markdown."""
    from pbkd.config import Params
    from pbkd.settings import Settings

    sections: list[str] = []
    inner: dict[type[BaseModel], None] = {}  # in order, each once
    seed = Params.model_fields["seed"]
    for key, field in Params.model_fields.items():
        if key != "seed":
            name, (section,) = field.alias or key, models_in(field.annotation)
            sections += list(_section(name, section, field.default))
            inner |= dict.fromkeys(_below(section))
    parts = [
        _OPENING,
        f"{_HEADS}\n| `seed` | {_type_of(seed)} | `{seed.default}` | of every random choice |",
        *sections,
    ]
    for model in inner:
        parts += list(_section(_title(model), model, None))
    rows = [
        f"| `PBKD_{name.upper()}` | {_type_of(field)} | {_default(field, field.default)} "
        f"| {_meaning(field)} |"
        for name, field in Settings.model_fields.items()
    ]
    parts += [_ENVIRONMENT, "\n".join([_HEADS, *rows])]
    return "\n\n".join(parts) + "\n"


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field's type names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in models_in(part)]


def _below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for name, field in model.model_fields.items():
        if name not in getattr(model, "settled", ()):
            for found in models_in(field.annotation):
                yield found
                yield from _below(found)


def _section(title: str, model: type[BaseModel], value: BaseModel | None) -> Iterator[str]:
    yield f"## {title} {{ #{_anchor(model)} }}"
    yield "\n".join(line.strip() for line in (model.__doc__ or "").splitlines()).replace("``", "`")
    settled = getattr(model, "settled", frozenset())
    rows = [
        f"| `{name}` | {_type_of(field)} "
        f"| {_default(field, field.default if value is None else getattr(value, name))} "
        f"| {_meaning(field)} |"
        for name, field in model.model_fields.items()
        if name not in settled
    ]
    yield "\n".join([_HEADS, *rows])


def _title(model: type[BaseModel]) -> str:
    """A section by the field that tells it apart from its siblings, else by its class."""
    fields = model.model_fields
    for tag, what in (("kind", "candidate"), ("method", "step")):
        if tag in fields and get_origin(fields[tag].annotation) is Literal:
            options = get_args(fields[tag].annotation)
            if len(options) == 1:
                return f"{what} `{options[0]}`"
        elif tag in fields:
            return f"{what} of your own"
    return model.__name__.removesuffix("Config").lower()


def _anchor(model: type[BaseModel]) -> str:
    return model.__name__.lower()


def _type_of(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(rule, name):,}"
        for rule in field.metadata
        for name, sign in _SIGNS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([_type(field.annotation), *limits])


def _type(annotation: Any) -> str:
    """A type in words; a section as a link to its table."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inside[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in _UNIONS:
        return " or ".join(dict.fromkeys(_type(part) for part in inside))
    if origin is tuple:
        return f"list of {_type(inside[0])}"
    if origin is dict:
        return f"text: {_type(inside[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{_title(annotation)}](#{_anchor(annotation)})"
    return _PLAIN.get(annotation, "path")


def _default(field: FieldInfo, value: Any) -> str:
    if value is PydanticUndefined and field.default_factory is None:
        return "required"
    if value is PydanticUndefined:
        value = field.get_default(call_default_factory=True)
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, BaseModel):
        given = value.model_dump(exclude_defaults=True) or {
            name: getattr(value, name) for name in ("kind", "method") if hasattr(value, name)
        }
        return _yaml(given)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_yaml(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return '""' if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def _meaning(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|")
