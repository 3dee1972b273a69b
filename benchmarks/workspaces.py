"""Workspaces that benchmarks make for themselves: the digits in scikit-learn, a network of ours."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pbkd.artifacts import Workspace
from pbkd.stages import StageContext, run_stage

ROOT = Path(__file__).resolve().parents[1]


def make_workspace(folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> Workspace:
    """A folder with params.yaml, dvc.yaml and DVC without git.

    Args:
        changes: per section, what differs from the repository's own params.yaml.
    """
    folder.mkdir(parents=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in changes.items():
        params[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    shutil.copy(ROOT / "dvc.yaml", folder / "dvc.yaml")
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (folder / "data" / "raw").mkdir(parents=True)
    (folder / "data" / "raw" / "README.md").write_text("The digits need no files.\n")
    return Workspace(folder, folder / ".pbkd")


def run_stages(workspace: Workspace, *names: str) -> None:
    """Run some stages in this process."""
    for name in names:
        run_stage(name, StageContext.load(workspace))
