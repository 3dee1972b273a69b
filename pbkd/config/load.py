"""Read params.yaml, with errors that name the file, the key, what was got and what is expected."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from pbkd.config.candidates import KINDS
from pbkd.config.sections import Params
from pbkd.errors import ConfigError, did_you_mean

_UNIONS = (Union, types.UnionType)


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ConfigError: names the file, the key, what was got and what is expected.
    """
    try:
        content = yaml.load(path.read_text(), _UniqueKeys)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run pbkd where params.yaml lies") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {type(content).__name__}, expected sections like `seed: 0`")
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_explain(error.errors()))) from None
    if switches := list(_switches(content, params.model_dump(by_alias=True))):
        raise ConfigError(f"{path}: " + "; ".join(switches))
    return params


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; YAML's own loader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    None, None, f"key `{key.value}` stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _switches(content: Any, read: Any, where: tuple[str, ...] = ()) -> Iterator[str]:
    """A line per `true` or `false` that was read as a number, as pydantic does."""
    if isinstance(content, dict) and isinstance(read, dict):
        for key in filter(read.__contains__, content):
            yield from _switches(content[key], read[key], (*where, str(key)))
    elif isinstance(content, list) and isinstance(read, (list, tuple)):
        for index, pair in enumerate(zip(content, read, strict=False)):
            yield from _switches(*pair, (*where, str(index)))
    elif isinstance(content, bool) and type(read) in (int, float):
        yield f"{'.'.join(where)}: got {content}; expected a number"


def _explain(errors: list[Any]) -> list[str]:
    """A line per mistake; what only follows from another one is left out."""
    lines: dict[str, list[str]] = {}
    for entry in errors:
        inside = [e for e in errors if len(e["loc"]) > len(entry["loc"])]
        if entry["type"] == "too_short" and any(
            other["loc"][: len(entry["loc"])] == entry["loc"] for other in inside
        ):
            continue  # a list with wrong entries counts as one without them
        where, said = _explain_one(entry)
        lines.setdefault(where, []).append(said)
    return [f"{where}: {_alternatives(said)}" for where, said in lines.items()]


def _alternatives(said: list[str]) -> str:
    """What is said of one place: of a union's members, none of which fits, what each expects."""
    first, *others = dict.fromkeys(said)
    got = first.partition("; ")[0] + "; "
    return "; or ".join([first, *(other.removeprefix(got) for other in others)])


def _explain_one(entry: Any) -> tuple[str, str]:
    location = [str(part) for part in entry["loc"]] or [""]
    if entry["type"] == "unknown_kind":
        return _explain_kind(".".join(location), entry)
    if entry["type"] == "extra_forbidden":
        *parents, key = location
        where, section = _walk(parents)
        known = [field.alias or name for name, field in section.model_fields.items()]
        hint = did_you_mean(key, known, f"known are {', '.join(known)}")
        return ".".join([*where, key]), f"unknown key; {hint}"
    text = entry["msg"].removeprefix("Value error, ")
    if not entry["loc"]:
        where, _, said = text.partition(": ")  # of several sections, which the message names
        return where, said
    where, _ = _walk(location)
    if where[-1:] == ["kind"] and entry["type"] == "string_pattern_mismatch":
        text = "expected package.module:function"
    return ".".join(where), f"got {entry['input']!r}; {text}"


def _explain_kind(where: str, entry: Any) -> tuple[str, str]:
    if not isinstance(entry["input"], dict):
        example = "expected a mapping such as {kind: separable}"
        return where, f"got {entry['input']!r}; {example}; {entry['msg']}"
    kind = entry["input"].get("kind")
    hint = did_you_mean(str(kind), KINDS, entry["msg"])
    return f"{where}.kind", f"got {kind!r}; {hint}"


def _walk(location: list[str]) -> tuple[list[str], type[BaseModel]]:
    """Follow a location through the sections.

    Returns:
        The location as the file has it, without the names that unions give their members; and the
        innermost section on the way.
    """
    section: type[BaseModel] = Params
    annotation: Any = Params
    shown = []
    for part in location:
        members = _members(annotation)
        if part in members:
            annotation = members[part]
        else:
            shown.append(part)
            annotation = _inside(annotation, part)
        section = _as_section(annotation) or section
    return shown, section


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field's type names, at any depth of containers and unions."""
    section = _as_section(annotation)
    if section is not None:
        return [section]
    return [found for inner in get_args(annotation) for found in sections_in(inner)]


def _as_section(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is Annotated:
        return _as_section(get_args(annotation)[0])
    if get_origin(annotation) in _UNIONS:  # of a section and None
        found = [s for s in map(_as_section, get_args(annotation)) if s is not None]
        return found[0] if len(found) == 1 else None
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_section else None


def _members(annotation: Any, key: str | None = None) -> dict[str, Any]:
    """A union's members by the names that pydantic gives them in a location.

    Args:
        annotation: any type.
        key: the field that tells the members apart, where one does.
    """
    if get_origin(annotation) is Annotated:
        inner, *extras = get_args(annotation)
        fields = [extra for extra in extras if isinstance(extra, FieldInfo)]
        return _members(
            inner, *(f.discriminator for f in fields if isinstance(f.discriminator, str))
        )
    if get_origin(annotation) not in _UNIONS:
        return {}
    return {_member_name(member, key): member for member in get_args(annotation)}


def _member_name(member: Any, key: str | None) -> str:
    section = _as_section(member)
    if key is not None and section is not None:
        return str(section.model_fields[key].default)
    if get_origin(member) is Literal:
        return f"literal[{','.join(map(repr, get_args(member)))}]"
    tags = [extra.tag for extra in get_args(member)[1:] if isinstance(extra, Tag)]
    return tags[0] if tags else getattr(member, "__name__", str(member))


def _inside(annotation: Any, part: str) -> Any:
    """The type of a section's field, or of a container's items; None where there is none."""
    section = _as_section(annotation)
    if section is not None:
        fields = section.model_fields.items()
        return next((f.annotation for name, f in fields if part in (name, f.alias)), None)
    arguments = [a for a in get_args(annotation) if a is not Ellipsis]
    return arguments[-1] if get_origin(annotation) in (tuple, dict) and arguments else None
