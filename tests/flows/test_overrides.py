"""Parameters of one run, written into params.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.overrides import write_overrides
from pbkd.config import load_params
from pbkd.errors import ConfigError

TEXT = """\
# what may change a result
seed: 3
distill:
  epochs: 10   # passes
  lr: 2.0e-3
stitch:
  students:
    half: {max_macs: 0.5}   # a share
"""


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    return path


def test_a_value_is_set_and_the_rest_stays_byte_for_byte(params):
    assert write_overrides(params, {"distill.epochs": 20}) == ["distill.epochs: 10 -> 20"]
    assert params.read_text() == TEXT.replace("epochs: 10", "epochs: 20")


def test_sections_and_values_that_are_not_there_are_made(params):
    said = write_overrides(
        params, {"teacher.augment.pad": 2, "stitch.students.small": {"max_bytes": "1MB"}}
    )
    assert said[0] == "teacher.augment.pad: not set -> 2"
    loaded = load_params(params)
    assert loaded.teacher.augment.pad == 2
    assert set(loaded.stitch.students) == {"half", "small"}
    assert "# a share" in params.read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"distill.epochs": 0}, r"these overrides params.yaml: distill.epochs: got 0"),
        ({"distill.epocs": 5}, r"distill.epocs: unknown key; did you mean `epochs`"),
        ({"distil.epochs": 5}, r"distil: unknown key; did you mean `distill`"),
        ({"seed.x": 5}, r"override `seed.x`: `seed` has no parts"),
        ({"": 5}, r"unknown key"),
        ({"distill.lr": [1, 2]}, r"distill.lr"),
        ({"distill.epochs": 20, "seed": "x"}, r"seed"),
    ],
)
def test_nothing_is_written_unless_all_is_valid(params, overrides: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        write_overrides(params, overrides)
    assert params.read_text() == TEXT
    assert [path.name for path in params.parent.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("overrides", [{}, {"distill.epochs": 10}])
def test_what_changes_nothing_writes_nothing(params, overrides):
    params.chmod(0o444)
    before = params.stat().st_mtime_ns
    assert write_overrides(params, overrides) == []
    assert params.stat().st_mtime_ns == before


def test_a_broken_file_is_told_before_anything_is_changed(params):
    params.write_text("distill: {epochs: -1}\n")
    with pytest.raises(ConfigError, match="epochs"):
        write_overrides(params, {"distill.epochs": 5})
