"""Settings from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbkd.errors import ConfigError
from pbkd.settings import Settings


def test_values_come_as_strings() -> None:
    settings = Settings.from_env(
        {
            "PBKD_WORKERS": "3",
            "PBKD_DEVICE": "cpu",
            "PBKD_RUNNER": "ray",
            "PBKD_JOB_TIMEOUT_S": "1.5",
            "PBKD_STATE_DIR": "/some/where",
            "HOME": "/not/ours",
        }
    )
    assert settings == Settings(
        workers=3, device="cpu", runner="ray", job_timeout_s=1.5, state_dir=Path("/some/where")
    )


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PBKD_RETRIES", "7")
    assert Settings.from_env().retries == 7


def test_an_empty_value_counts_as_absent() -> None:
    assert Settings.from_env({"PBKD_WORKERS": ""}) == Settings()


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({"PBKD_WORKER": "2"})
    message = str(caught.value)
    assert "unknown setting PBKD_WORKER;" in message
    for name in Settings.model_fields:
        assert f"PBKD_{name.upper()}" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PBKD_WORKERS", "two"),
        ("PBKD_WORKERS", "-1"),
        ("PBKD_WORKERS", "1.5"),
        ("PBKD_DEVICE", "tpu"),
        ("PBKD_JOB_TIMEOUT_S", "0"),
        ("PBKD_HANG_TIMEOUT_S", "nan"),
        ("PBKD_RETRIES", "-1"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"environment: {name}='{value}': Input should be"):
        Settings.from_env({name: value})
