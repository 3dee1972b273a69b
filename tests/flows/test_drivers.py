"""`dvc repro` and `pbkd run` drive the same stages and agree on what is up to date."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pbkd.artifacts import MARKER
from tests.flows.project import Project, wait_until

LONG_DISTILL = ("distill: {epochs: 2}", "distill: {epochs: 100, patience: 100}")


def trainee_results(project: Project) -> dict[str, Any]:
    """``block/candidate`` to the result of every finished trainee in the store."""
    results = {}
    for path in (project.root / ".pbkd" / "store" / "trainees").glob("[!.]*/result.json"):
        if (path.parent / MARKER).is_file():
            result = json.loads(path.read_text())
            results[f"{result['block']} {result['key']}"] = result
    return results


def contents(project: Project) -> dict[str, bytes]:
    folder = project.root / ".pbkd" / "store" / "trainees"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.glob("[!.]*/*.safetensors")
    }


def trained_line(output: str) -> str:
    """What the log says was trained, on one line."""
    text = re.sub(r"\s+", " ", output)
    found = re.search(r"trained (?:(?!trained ).)*; (\d+) taken from the store", text)
    assert found is not None, output
    return found.group(0)


def children_of(pid: int) -> list[psutil.Process]:
    """The worker processes of a flow."""
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if "multiprocessing.spawn" in " ".join(child.cmdline())
    ]


def api(project: Project, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        project.environment["PREFECT_API_URL"] + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def last_flow_tasks(project: Project, flow_name: str) -> dict[str, str]:
    """Task run to state name, of the newest run of a flow."""
    runs = api(
        project,
        "/flow_runs/filter",
        {"flows": {"name": {"any_": [flow_name]}}, "sort": "START_TIME_DESC", "limit": 1},
    )
    tasks = api(project, "/task_runs/filter", {"flow_runs": {"id": {"any_": [runs[0]["id"]]}}})
    return {task["name"]: task["state_name"] for task in tasks}


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


# ---------------------------------------------------------------- up to date, both ways


def test_repro_after_a_flow_runs_nothing_whatever_the_number_of_workers(project: Project) -> None:
    other = Project(project.root, project.environment | {"PBKD_WORKERS": "1"})

    output = other.run("dvc", "repro")

    assert "Running stage" not in output
    assert output.count("didn't change, skipping") == 10


def test_a_flow_after_repro_skips_every_stage_and_says_so_in_prefect(project: Project) -> None:
    project.edit("latency_batch_sizes: [1, 8]", "latency_batch_sizes: [1, 4]")
    assert "Running stage 'evaluate'" in project.run("dvc", "repro")
    results = project.root / "results"
    before = {path.name: path.read_bytes() for path in results.iterdir()}

    project.run("pbkd", "run")

    states = last_flow_tasks(project, "compress")
    assert len(states) == 10
    assert set(states.values()) == {"Skipped"}, states
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before
    assert project.is_clean()


def test_a_registry_that_lost_its_models_is_filled_again(project: Project) -> None:
    receipt = project.root / "results" / "registered.json"
    for name in ("mlflow.db", "mlflow.db-wal", "mlflow.db-shm"):
        (project.root / ".pbkd" / name).unlink(missing_ok=True)
    before = json.loads(receipt.read_text())["versions"]

    project.run("pbkd", "run")

    states = last_flow_tasks(project, "compress")
    assert states["evaluate"] == "Skipped"
    assert states["register"] == "Completed"
    after = json.loads(receipt.read_text())["versions"]
    assert {k: v["model_digest"] for k, v in before.items()} == {
        k: v["model_digest"] for k, v in after.items()
    }
    assert project.is_clean()


def test_another_image_size_is_no_old_result(project: Project) -> None:
    meta = json.loads((project.root / "data" / "prepared" / "meta.json").read_text())
    project.edit("image_size: 8", "image_size: 12")
    output = project.run("dvc", "repro", "prepare")
    assert "1x12x12" in output
    after = json.loads((project.root / "data" / "prepared" / "meta.json").read_text())
    assert after["digest"] != meta["digest"]


def test_one_blocks_settings_changed_trains_one_block(project: Project) -> None:
    before = trainee_results(project)
    project.edit(
        "exclude: [features.0]}",
        "exclude: [features.0], overrides: {features.7: [{kind: separable, init: random}]}}",
    )

    output = project.run("pbkd", "run")

    assert trained_line(output) == (
        "trained features.7/separable-init.random; 4 taken from the store"
    )
    after = trainee_results(project)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1
    phase = json.loads((project.root / ".pbkd" / "block_phase.json").read_text())
    assert [job["trained"] for job in phase["jobs"]] == [["features.7/separable-init.random"]]
    assert phase["speedup"] == pytest.approx(phase["jobs_s"] / phase["wall_s"])
    assert phase["num_workers"] == 2
    states = last_flow_tasks(project, "distill")
    assert states.pop("profile") == "Completed"
    assert states.pop("features.7") == "Completed"
    assert set(states.values()) == {"Skipped"}


def test_a_running_flow_keeps_others_out_and_locks_only_what_it_ran_with(
    project: Project,
) -> None:
    project.edit(*LONG_DISTILL)
    shutil.rmtree(project.root / ".pbkd" / "progress", ignore_errors=True)
    flow = project.start("pbkd", "run")
    wait_until(lambda: bool(list((project.root / ".pbkd" / "progress").glob("*.jsonl"))), 120)

    project.edit("patience: 100", "patience: 99")
    repro = project.run("dvc", "repro", expect=None)
    second = project.run("pbkd", "run", expect=None)
    output = finish(flow)

    assert str(flow.pid) in repro
    assert str(flow.pid) in second
    assert "Traceback" not in second
    assert "changed during the run" in re.sub(r"\s+", " ", output)
    assert "distill" in project.run("dvc", "status")


# ---------------------------------------------------------------- kills


def start_and_wait_for_the_first_trainee(
    project: Project, *command: str
) -> tuple[subprocess.Popen[str], dict[str, Any], dict[str, bytes]]:
    """Start a long distillation; return when one trainee is done and others are not."""
    earlier = set(trainee_results(project))
    project.edit(*LONG_DISTILL)
    process = project.start(*command)
    wait_until(lambda: bool(set(trainee_results(project)) - earlier), timeout_s=120)
    done = {k: v for k, v in trainee_results(project).items() if k not in earlier}
    assert len(done) < 5, "all trainees were done before the kill"
    return process, done, contents(project)


def test_a_killed_worker_is_replaced_and_its_block_tried_again(project: Project) -> None:
    flow, done, files = start_and_wait_for_the_first_trainee(project, "pbkd", "run")
    workers = children_of(flow.pid)
    for worker in workers:
        worker.send_signal(signal.SIGKILL)

    output = finish(flow)

    names = re.findall(r"trained (\S+): epochs", output)
    assert len(names) == len(set(names)), "a finished trainee was trained again"
    after = trainee_results(project)
    assert {name: after[name] for name in done} == done
    assert files.items() <= contents(project).items()
    assert project.is_clean()


@pytest.mark.parametrize(
    "driver", [("pbkd", "run"), ("dvc", "repro", "distill")], ids=["flow", "repro"]
)
def test_a_killed_driver_leaves_no_process_and_its_rerun_trains_the_rest(
    project: Project, driver: tuple[str, ...]
) -> None:
    process, done, files = start_and_wait_for_the_first_trainee(project, *driver)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    if driver[0] == "dvc":  # DVC's own child is the flow; it must go as well
        for child in family:
            with suppress(psutil.NoSuchProcess):
                if "pbkd" in " ".join(child.cmdline()):
                    child.kill()
    workers = [child for child in family if child.is_running()]
    wait_until(lambda: not any(_is_alive(worker) for worker in workers), timeout_s=10)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()

    output = project.run(*driver)

    after = trainee_results(project)
    assert {name: after[name] for name in done} == done
    assert files.items() <= contents(project).items()
    line = trained_line(output)
    for name in done:
        assert name.split()[0] + "/" not in line
    assert "distill" not in project.run("dvc", "status", "distill")
    _assert_no_leftovers(project.root)


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _assert_no_leftovers(root: Path) -> None:
    items = root / "artifacts" / "distill" / "trainees"
    assert len(list(items.iterdir())) == 5
    assert not list((root / "artifacts").rglob("*.tmp"))
