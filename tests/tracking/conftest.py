"""An empty MLflow store; making its tables takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbkd.artifacts import Workspace
from pbkd.tracking.mlflow_run import mlflow_client


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs."""
    root = tmp_path_factory.mktemp("mlflow")
    mlflow_client(Workspace(root, root / ".pbkd"))
    return root / ".pbkd" / "mlflow.db"
