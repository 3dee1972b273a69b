"""Secrets of an address stay out of what is shown and kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbkd.artifacts import Workspace
from pbkd.errors import TrackingError
from pbkd.redaction import redacted, without_secrets


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://host:5000/x"),
        ("postgresql://me:s%40cret@db/mlflow", "postgresql://db/mlflow"),
        ("postgresql://db/m?user=me&password=secret", "postgresql://db/m?user=me&password=***"),
        ("https://host/api?api_key=secret&page=2", "https://host/api?api_key=***&page=2"),
        ("http://me:se@cret@host/x", "http://host/x"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("/folder/mlruns", "/folder/mlruns"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_an_address_is_shown_without_its_secrets(uri, shown):
    assert without_secrets(uri) == shown


@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=8))
def test_no_password_is_left_in_an_error(password):
    uri = f"postgresql://somebody:{password}@db.example/mlflow"
    text = redacted(f"cannot connect to {uri} with password={password}", uri)
    assert password not in text.replace("postgresql://db.example/mlflow", "")
    assert "db.example" in text


def test_a_store_that_does_not_answer_is_named_without_password(tmp_path, monkeypatch):
    from pbkd.tracking.mlflow_run import mlflow_client

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2hunter2@127.0.0.1:9/base")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"MLflow at http://127\.0\.0\.1:9/base") as raised:
        mlflow_client(Workspace(tmp_path, tmp_path / ".pbkd"))
    assert "hunter2" not in str(raised.value)
