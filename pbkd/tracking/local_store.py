"""MLflow's default store: a sqlite file in the state folder, made whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from pbkd.artifacts import temporary_path


def make_store(path: Path, artifacts: Path) -> None:
    """Make the database where there is none.

    MLflow makes it by some dozens of migrations in place; a kill amid them leaves tables that it
    refuses from then on. So they run elsewhere.

    Args:
        path: of the database.
        artifacts: where experiments that name no place keep files.
    """
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = temporary_path(path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        made = folder / f"{uuid4().hex}.db"  # MLflow keeps connections by path
        untyped: Any = SqlAlchemyStore
        untyped(f"sqlite:///{made}", artifacts.as_uri()).engine.dispose()
        with suppress(FileExistsError):  # somebody else was faster
            os.link(made, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
