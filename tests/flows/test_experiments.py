"""DVC's experiments, and a clone that runs nothing, in a workspace under git."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.flows.project import Project

pytestmark = pytest.mark.slow


def git(project: Project, *command: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    project.run("git", *who, *command)


@pytest.fixture(scope="module")
def workspace(
    tmp_path_factory: pytest.TempPathFactory, _environment: dict[str, str], tiny_params: str
) -> Project:
    root = tmp_path_factory.mktemp("experiments") / "workspace"
    names = {f"GIT_{who}_{what}": "t@localhost"
             for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}  # fmt: skip
    outside = Project(root.parent, _environment | names)
    outside.run("pbkd", "init", root.name, "--preset", "digits")
    (root / "params.yaml").write_text(tiny_params)
    project = Project(root, outside.environment)
    project.run("pbkd", "run")
    git(project, "add", "-A")
    git(project, "commit", "--quiet", "-m", "first")
    return project


def stages_of(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_an_experiment_is_run_and_shown_and_compared(workspace: Project) -> None:
    output = workspace.run("dvc", "exp", "run", "-n", "longer", "-S", "finetune.epochs=2")
    assert stages_of(output)[0] == "finetune"
    assert "longer" in workspace.run("dvc", "exp", "show", "--only-changed", "--csv")
    assert "finetune.epochs" in workspace.run("dvc", "params", "diff", "HEAD", "longer")
    assert "val_accuracy" in workspace.run("dvc", "metrics", "diff", "--all", "HEAD", "longer")
    drawn = json.loads(workspace.run("dvc", "plots", "diff", "HEAD", "longer", "--json"))
    rows = json.dumps(drawn)
    assert all(text in rows for text in ("longer", "file_bytes", "test_accuracy", "teacher"))
    assert "finetune.epochs" in workspace.run("pbkd", "report", "--compare", "HEAD", "longer")


def test_queued_experiments_run_in_copies(workspace: Project) -> None:
    before = workspace.root.joinpath("params.yaml").read_text()
    for number in (3, 4):
        name = ("-n", f"queued-{number}")
        workspace.run("dvc", "exp", "run", "--queue", *name, "-S", f"finetune.epochs={number}")
    workspace.run("dvc", "exp", "run", "--run-all")
    shown = workspace.run("dvc", "exp", "show", "--only-changed", "--csv")
    assert "queued-3" in shown
    assert "queued-4" in shown
    assert workspace.root.joinpath("params.yaml").read_text() == before


def test_a_setting_of_the_report_trains_nothing(workspace: Project) -> None:
    workspace.edit("latency_seconds: 0.05", "latency_seconds: 0.06")
    assert stages_of(workspace.run("dvc", "repro")) == ["evaluate", "register"]


def test_a_clone_pulls_and_runs_nothing(workspace: Project, tmp_path: Path) -> None:
    workspace.run("dvc", "repro")
    workspace.run("dvc", "remote", "add", "-f", "-d", "here", str(tmp_path / "remote"))
    git(workspace, "add", "-A")
    git(workspace, "commit", "--quiet", "-m", "second")
    workspace.run("dvc", "push")
    git(workspace, "clone", "--quiet", ".", str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone", workspace.environment)
    clone.run("dvc", "pull", "--allow-missing")
    assert stages_of(clone.run("dvc", "repro", "--allow-missing")) == []
    assert clone.run("git", "status", "--short") == ""
