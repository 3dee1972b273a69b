"""Workspaces that benchmarks make for themselves, and go on with where they were stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pbkd.artifacts import Workspace, digest_of, read_json, write_json
from pbkd.config import FinetuneConfig, Params
from pbkd.elastic.label_plan import LabelPlan
from pbkd.stages import STAGES, StageContext, run_stage

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


def unlabelled(
    workspace: Workspace, name: str, views: int, num_images: int, chunk: int
) -> LabelPlan:
    """What elastic teachers are to label, under keys of its own."""
    return LabelPlan(
        keys=tuple(f"{name}-{view}" for view in range(views)),
        teacher=workspace.artifacts("teacher"),
        prepared=workspace.prepared,
        seed=0,
        top=None,
        temperature=FinetuneConfig().temperature,
        store=workspace.store.root,
        folder=workspace.state / "labels",
        num_images=num_images,
        chunk=chunk,
    )


def kept_workspace(folder: Path, changes: Mapping[str, Mapping[str, Any]], seed: int) -> Workspace:
    """A workspace in which earlier calls may have run; its params.yaml is written anew."""
    if not folder.is_dir():
        make_workspace(folder, changes)
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"seed": seed}
    for section, values in changes.items():
        params[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return Workspace(folder, folder / ".pbkd")


def go_on(workspace: Workspace) -> None:
    """Run the stages that are not finished under the present parameters; none is registered."""
    params = StageContext.load(workspace).params
    for name in STAGES[:-1]:  # the registry says nothing about a student
        done = workspace.state / "done" / f"{name}.json"
        wanted = digest_of(_up_to(name, params))
        if not done.is_file() or read_json(done) != wanted:
            run_stage(name, StageContext.load(workspace))
            write_json(done, wanted)


def _up_to(name: str, params: Params) -> dict[str, Any]:
    """The seed and the sections of a stage and of those before it."""
    sections = params.model_dump(mode="json", by_alias=True)
    return {key: sections[key] for key in ("seed", *STAGES[: STAGES.index(name) + 1])}
