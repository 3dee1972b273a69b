"""Parameters given to one run, such as from Prefect's form: written into params.yaml.

The file stays what says how the results came about, so that DVC's lock tells the truth.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pbkd.artifacts import atomic_path
from pbkd.config import load_params
from pbkd.errors import ConfigError


def write_overrides(params: Path, overrides: Mapping[str, Any]) -> list[str]:
    """Set values in params.yaml, and keep its comments; nothing is written unless all are valid.

    Call it under the workspace's lock.

    Args:
        params: params.yaml.
        overrides: dotted name to value: ``{"distill.epochs": 20}``. A value takes the place of a
            whole list or mapping.

    Returns:
        A line per value that changed: "distill.epochs: 10 -> 20".

    Raises:
        ConfigError: params.yaml is not valid, or would not be.
    """
    load_params(params)
    if not overrides:
        return []
    params = params.resolve()  # a link stays one
    text = params.read_text()
    wanted = _plain(text)
    changes = [
        f"{name}: {_shown(before)} -> {_shown(value)}"
        for name, value in overrides.items()
        if (before := _set(wanted, name, value)) != value
    ]
    if not changes:
        return []
    written = _edited(text, overrides)
    with atomic_path(params) as temporary:
        temporary.write_text(written)
        shutil.copymode(params, temporary)
        try:
            load_params(temporary)
        except ConfigError as error:
            said = str(error).replace(str(temporary), "with these overrides params.yaml")
            raise ConfigError(said) from None
        if _plain(written) != wanted:
            raise ConfigError(
                f"overrides {', '.join(overrides)}: setting them would change other values of "
                f"{params}, too; edit the file by hand"
            )
    return changes


def _edited(text: str, overrides: Mapping[str, Any]) -> str:
    """The text with the values in it; comments, quotes and layout stay."""
    from ruamel.yaml import YAML  # DVC brings it

    edit = YAML()
    edit.preserve_quotes = True
    edit.width = 4096
    dash = _dash_of(text)
    edit.indent(mapping=2, sequence=dash + 2, offset=dash)
    edit.representer.add_representer(type(None), _null)
    content = edit.load(text)
    for name, value in overrides.items():
        # by way of YAML 1.1, which pbkd reads: there a plain `no` is False, and 1e-05 a string
        line = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=4096)
        _set(content, name, edit.load(line))
    written = io.StringIO()
    edit.dump(content, written)
    return written.getvalue()


def _dash_of(text: str) -> int:
    """How far the file's first list stands to the right of its key, in columns."""
    first = re.search(r"^( *)[^\s#][^#\n]*:[ \t]*(?:#.*)?\n(?:[ \t]*(?:#.*)?\n)*( *)- ", text, re.M)
    return max(len(first[2]) - len(first[1]), 0) if first else 2


def _null(representer: Any, _: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _plain(text: str) -> Any:
    """The values, and no part shared with another, as an alias in YAML makes it."""
    return json.loads(json.dumps(yaml.safe_load(text)))


def _set(content: Any, name: str, value: Any) -> Any:
    """Put a value in its place; sections on the way are made. Returns what stood there."""
    *parents, key = name.split(".")
    for number, part in enumerate(parents):
        if content.get(part) is None:
            content[part] = {}
        content = content[part]
        if not isinstance(content, dict):
            where = ".".join(parents[: number + 1])
            raise ConfigError(f"override `{name}`: `{where}` has no parts in params.yaml")
    before = content.get(key)
    content[key] = value
    return before


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
