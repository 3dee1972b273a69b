"""Whatever stands in params.yaml: a valid configuration, or an error that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pbkd.config import Params, load_params
from pbkd.errors import ConfigError

PRESETS = [
    yaml.safe_load(path.read_text())
    for path in (Path(__file__).parents[1] / "pbkd" / "presets").glob("*.yaml")
    if path.name != "pipeline.yaml"
]
KEYS = st.sampled_from(
    ["kind", "method", "bits", "epochs", "ratio", "max_bytes", "tune", "overrides", "recipe", "a.b"]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["separable", "low_rank", "prune", "1MB", "5ms", "-1", "1e999", "x:y", ":", "*"]
    ),
    st.dates(),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
QUIET = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def load(path: Path, text: str) -> None:
    path.write_text(text)
    said = str(path)
    try:
        load_params(path)
    except ConfigError as error:
        said = str(error)
    assert str(path) in said


def paths_of(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here] if here else []
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    for key, inner in items:
        found += paths_of(inner, (*here, key))
    return found


@QUIET
@given(content=VALUES)
def test_any_yaml(tmp_path: Path, content: Any) -> None:
    load(tmp_path / "params.yaml", yaml.safe_dump(content))


@QUIET
@given(text=st.text(max_size=40))
def test_any_text(tmp_path: Path, text: str) -> None:
    load(tmp_path / "params.yaml", text)


@QUIET
@given(data=st.data())
def test_a_preset_with_one_value_changed(tmp_path: Path, data: st.DataObject) -> None:
    content = yaml.safe_load(yaml.safe_dump(data.draw(st.sampled_from(PRESETS))))
    *parents, last = data.draw(st.sampled_from(paths_of(content)))
    where = content
    for key in parents:
        where = where[key]
    where[last] = data.draw(VALUES)
    load(tmp_path / "params.yaml", yaml.safe_dump(content))


@QUIET
@given(name=st.sampled_from(sorted(Params.model_fields)), value=VALUES)
def test_any_section(tmp_path: Path, name: str, value: Any) -> None:
    load(tmp_path / "params.yaml", yaml.safe_dump({name: value}))


@pytest.mark.parametrize(
    "text", ["&a [*a]", "a: &x {b: *x}", "!!python/object:os.system {}", "\x00"]
)
def test_yaml_that_is_no_plain_data(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        load_params(path)
