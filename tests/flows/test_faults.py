"""SIGKILL, SIGTERM and Ctrl-C in any stage: no process stays, and a run ends as if undisturbed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.flows.project import Project, wait_until
from tests.flows.test_drivers import children_of, finish

STAGES = ("prepare", "teacher", "activations", "distill", "finetune")
VICTIMS = ("worker", "flow", "repro")
QUICK = {("prepare", "flow"), ("teacher", "worker"), ("activations", "repro")}
CASES = [
    pytest.param(stage, victim, marks=[] if (stage, victim) in QUICK else pytest.mark.slow)
    for stage in STAGES
    for victim in VICTIMS
]
LONGER = {  # long enough to be met at work
    "path: data/raw, image_size: 8": "path: data/raw, image_size: 12",
    "epochs: 3, batch_size: 64": "epochs: 4, batch_size: 64",
    "views: 2": "views: 3",
    "distill: {epochs: 2}": "distill: {epochs: 3}",
    "finetune: {epochs: 1}": "finetune: {epochs: 3}",
}


def family_of(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def wait_until_gone(processes: list[psutil.Process], timeout_s: float) -> None:
    def gone() -> bool:
        return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)

    wait_until(gone, timeout_s=timeout_s)


def is_at_work(project: Project, stage: str) -> bool:
    """Whether a stage has begun to write."""
    root = project.root
    histories = list((root / ".pbkd" / "progress").glob("*.jsonl"))
    places = {
        "prepare": (root / "data").glob(".prepared.*.tmp"),
        "activations": (root / ".pbkd" / "store" / "activations").glob("*.parts/item/*"),
        "distill": iter(histories),
        "finetune": (path for path in histories if "val_accuracy" in path.read_text()),
    }
    default = (root / "artifacts").glob(f".{stage}.*.tmp/**/history.jsonl")
    return any(True for _ in places.get(stage, default))


def leftovers(project: Project) -> list[Path]:
    found = [*project.root.rglob(".*.tmp"), *project.root.rglob("*.parts")]
    return [path for path in found if ".dvc" not in path.parts]


def edited(project: Project) -> Project:
    for old, new in LONGER.items():
        project.edit(old, new)
    for path in (project.root / ".pbkd" / "progress").glob("*"):
        path.unlink()
    return project


@pytest.fixture(scope="session")
def undisturbed(_finished_project: Project, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """metrics.json of a run that nobody disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(["cp", "-r", f"{_finished_project.root}/.", str(root)], check=True)
    project = edited(Project(root, _finished_project.environment))
    project.run("pbkd", "run")
    return (root / "results" / "metrics.json").read_bytes()


@pytest.mark.parametrize(("stage", "victim"), CASES)
def test_a_kill_at_any_stage_costs_nothing_but_time(
    project: Project, undisturbed: bytes, stage: str, victim: str
) -> None:
    edited(project)
    command = ("dvc", "repro") if victim == "repro" else ("pbkd", "run")
    process = project.start(*command)
    wait_until(lambda: is_at_work(project, stage), timeout_s=120)
    if victim == "worker":
        for worker in children_of(process.pid):
            worker.send_signal(signal.SIGKILL)
        finish(process)
    else:
        family = family_of(process.pid)
        for member in family if victim == "repro" else family[:1]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        wait_until_gone(family, timeout_s=10)
        process.communicate()
        project.run(*command)
    assert (project.root / "results" / "metrics.json").read_bytes() == undisturbed
    assert project.is_clean()
    assert leftovers(project) == []


def test_a_worker_that_hangs_is_killed_and_its_job_tried_again(
    project: Project, undisturbed: bytes
) -> None:
    edited(project)
    project = Project(project.root, project.environment | {"PBKD_HANG_TIMEOUT_S": "8"})
    process = project.start("pbkd", "run")
    wait_until(lambda: is_at_work(project, "distill"), timeout_s=120)
    for worker in children_of(process.pid):
        worker.suspend()
    finish(process)
    assert (project.root / "results" / "metrics.json").read_bytes() == undisturbed
    assert project.is_clean()


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("teacher", "SIGTERM"),
        ("distill", "SIGINT"),
        pytest.param("teacher", "SIGINT", marks=pytest.mark.slow),
        pytest.param("distill", "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_within_ten_seconds(project: Project, stage: str, name: str) -> None:
    edited(project)
    process = project.start("pbkd", "run")
    wait_until(lambda: is_at_work(project, stage), timeout_s=120)
    family = family_of(process.pid)
    began = time.monotonic()
    os.kill(process.pid, getattr(signal, name))
    output, _ = process.communicate(timeout=20)
    wait_until_gone(family, timeout_s=10)
    assert time.monotonic() - began < 10
    assert process.returncode != 0
    # the signal may come in a callback whose exceptions Python only prints
    told = re.sub(r"Exception ignored in.*?KeyboardInterrupt", "", output, flags=re.DOTALL)
    assert "Traceback" not in told
    project.run("pbkd", "run")
    assert project.is_clean()
    assert leftovers(project) == []
