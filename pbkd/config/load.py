"""Read params.yaml, with errors that name the file, the key, what was got and what is expected."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pbkd.config.sections import Params
from pbkd.errors import ConfigError, did_you_mean


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ConfigError: names the file, the key, what was got and what is expected.
    """
    try:
        content = yaml.load(path.read_text(), _UniqueKeys)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run pbkd where params.yaml lies") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {type(content).__name__}, expected sections like `seed: 0`")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        lines = [_explain(entry) for entry in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(lines)) from None


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


def _explain(entry: Any) -> str:
    *parents, key = [str(part) for part in entry["loc"]] or [""]
    where = ".".join([*parents, key])
    if entry["type"] != "extra_forbidden":
        return f"{where}: got {entry['input']!r}; {entry['msg']}"
    known = _field_names(Params, parents)
    hint = did_you_mean(key, known, f"known are {', '.join(known)}")
    return f"{where}: unknown key; {hint}"


def _field_names(model: type[BaseModel], location: list[str]) -> list[str]:
    """Names that are valid at a location, found by walking the sections' annotations."""
    for part in location:
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        inner = _section_in(field.annotation) if field else None
        model = inner or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, dict, Annotated):
        return next((s for s in map(_section_in, get_args(annotation)) if s), None)
    return None
