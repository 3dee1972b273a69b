"""The pool on Ray, on two nodes of which one is lost; whole runs give what slots give."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pool_jobs
import psutil
import pytest

from flows.pools import pools
from pbkd.errors import JobError
from pbkd.settings import Settings
from tests.flows.project import Project, wait_until
from tests.flows.test_drivers import LONG_DISTILL, finish, last_flow_tasks, trainee_results

cluster_utils = pytest.importorskip("ray.cluster_utils")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster whose head has one CPU, at RAY_ADDRESS."""
    made = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()


def actors_at_work(node: Any) -> list[int]:
    """The processes on a node that run a job now."""
    [raylet] = node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children()
    return [child.pid for child in children if "RemoteWorker.run" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_lost_node_fails_its_job_and_others_take_over(cluster: Any, tmp_path: Path) -> None:
    second = cluster.add_node(num_cpus=1)
    settings = Settings(runner="ray", device="cpu")
    with pools(settings) as opened, ThreadPoolExecutor(4) as threads:
        pool = opened.workers
        assert [slot.threads for slot in pool.slots] == [1, 1]
        files = [tmp_path / "a", tmp_path / "b"]
        jobs = {path: threads.submit(pool.run, pool_jobs.hold, path) for path in files}
        wait_until(lambda: all(path.exists() for path in files))
        [lost] = [path for path in files if int(path.read_text()) in actors_at_work(second)]
        [kept] = [path for path in files if path != lost]

        cluster.remove_node(second, allow_graceful=False)

        with pytest.raises(JobError, match=r"hold on slot cpu-\d: its process .* was lost: "):
            jobs[lost].result(timeout=120)
        orphan = int(lost.read_text())
        wait_until(lambda: not psutil.pid_exists(orphan))
        waiting = [threads.submit(pool.run, pool_jobs.add, 1, 1) for _ in range(2)]
        assert jobs[kept].result(timeout=120) is None
        assert [job.result(timeout=120) for job in waiting] == [2, 2]

        cluster.add_node(num_cpus=1)
        both = [threads.submit(pool.run, pool_jobs.sleep, 15.0) for _ in range(2)]
        wait_until(lambda: len(actors_of(cluster)) == 2)
        assert [job.result(timeout=120) for job in both] == [15.0, 15.0]


def actors_of(cluster: Any) -> list[int]:
    return [pid for node in cluster.list_all_nodes() for pid in actors_at_work(node)]


def on_ray(project: Project, **environment: str) -> Project:
    """The project run on Ray, with this process's token where there is one."""
    kept = {k: v for k, v in project.environment.items() if not k.startswith("RAY_")}
    token = {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH_")}
    path = Path.home() / ".ray" / "auth_token"
    if path.is_file():
        token.setdefault("RAY_AUTH_TOKEN_PATH", str(path))
    return Project(project.root, kept | token | {"PBKD_RUNNER": "ray"} | environment)


def tensors_of(root: Path) -> dict[str, bytes]:
    """Weights and cached activations of all stages, by file."""
    found = [*(root / ".pbkd" / "store").rglob("*"), *(root / "artifacts").rglob("*")]
    kinds = {".safetensors", ".npy", ".bin"}
    return {
        str(path.relative_to(root)): path.read_bytes() for path in found if path.suffix in kinds
    }


@pytest.mark.slow
def test_a_run_on_ray_gives_the_same_weights(project: Project) -> None:
    before = tensors_of(project.root)
    for name in ("artifacts", "data/prepared", "results", ".pbkd", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(project.root / name)
    (project.root / "dvc.lock").unlink()

    on_ray(project).run("pbkd", "run")

    after = tensors_of(project.root)
    assert any("trainees" in name for name in after)
    assert after == before


@pytest.mark.slow
def test_elastic_teachers_and_students_share_two_cpus(project: Project) -> None:
    project.edit("finetune: {epochs: 1}", "finetune: {epochs: 2, teachers: elastic}")
    on_ray(project).run("pbkd", "run")
    [record] = (project.root / "artifacts" / "finetune").glob("*/finetune.json")
    assert json.loads(record.read_text())["num_lacking"] == 0
    assert project.is_clean()


@pytest.mark.slow
def test_a_run_whose_node_is_lost_ends_well(project: Project, cluster: Any) -> None:
    second = cluster.add_node(num_cpus=1)
    earlier = trainee_results(project)
    project.edit(*LONG_DISTILL)
    progress = project.root / ".pbkd" / "progress"
    shutil.rmtree(progress)
    flow = on_ray(project, RAY_ADDRESS=os.environ["RAY_ADDRESS"]).start("pbkd", "run")

    def trains_on_second() -> bool:
        assert flow.poll() is None, finish(flow)
        return bool(list(progress.glob("*.jsonl")) and actors_at_work(second))

    wait_until(trains_on_second, 120)
    done = set(trainee_results(project)) - set(earlier)
    assert len(done) < 5, "all trainees were done before the node was lost"

    cluster.remove_node(second, allow_graceful=False)

    output = finish(flow)
    names = re.findall(r"trained (\S+): epochs", output)
    assert len(names) == len(set(names)), "a finished trainee was trained again"
    assert len(set(trainee_results(project)) - set(earlier)) == 5
    assert set(last_flow_tasks(project, "distill").values()) == {"Completed"}
    assert project.is_clean()
