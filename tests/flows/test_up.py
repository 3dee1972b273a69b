"""Services that start and end together, the deployment, and both with a real run."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.server import answers
from flows.up import Service, running, services_of, watch
from pbkd.artifacts import Workspace
from pbkd.errors import ConfigError, PbkdError, WorkspaceBusyError
from pbkd.locks import workspace_lock
from tests.flows.project import Project, wait_until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def web(folder: Path, name: str = "web") -> Service:
    port = free_port()
    return Service(
        name,
        ["http.server", str(port), "--bind", "127.0.0.1"],
        folder / f"{name}.log",
        lambda: answers(f"http://127.0.0.1:{port}/"),
    )


def test_services_answer_while_they_run_and_are_gone_afterwards(tmp_path):
    services = [web(tmp_path, "one"), web(tmp_path, "two")]
    with running(services):
        supervisors = [psutil.Process(service.process.pid) for service in services]
        programs = [child for each in supervisors for child in each.children(recursive=True)]
        assert len(programs) == 2
    assert not any(_lives(process) for process in (*supervisors, *programs))
    assert "GET /" in services[0].log.read_text()


def test_one_that_does_not_start_ends_the_others(tmp_path):
    good = web(tmp_path, "good")
    bad = Service("the bad one", ["http.server", "nonsense"], tmp_path / "bad.log", lambda: False)
    with pytest.raises(PbkdError, match=r"the bad one has ended .*bad\.log"), running([good, bad]):
        pytest.fail("it did not start")
    assert good.process.poll() is not None
    assert "invalid int value" in bad.log.read_text()


def test_one_that_ends_is_noticed(tmp_path):
    services = [web(tmp_path, "one"), web(tmp_path, "two")]
    with running(services):
        services[1].process.kill()
        with pytest.raises(PbkdError, match="two has ended"):
            watch(services)


def test_services_end_with_a_killed_parent(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from tests.flows.test_up import web, running\n"
        "service = web(Path(sys.argv[1]))\n"
        "with running([service]):\n"
        "    print(service.process.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    supervisor = psutil.Process(int(parent.stdout.readline()))
    services = [supervisor, *supervisor.children(recursive=True)]
    assert len(services) == 2
    parent.kill()
    parent.communicate()
    wait_until(lambda: not any(_lives(service) for service in services), timeout_s=20)


def test_a_port_in_use_is_told_beforehand(tmp_path, monkeypatch):
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    workspace = Workspace(tmp_path, tmp_path / ".pbkd")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--prefect-port {port}: .* cannot be used"):
            services_of(workspace, "gpu", "127.0.0.1", port, free_port())
        with pytest.raises(ConfigError, match=f"--mlflow-port {port}"):
            services_of(workspace, "gpu", "127.0.0.1", free_port(), port)


def test_servers_of_the_environment_are_used_and_not_started(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect:4200/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    services, addresses = services_of(
        Workspace(tmp_path, tmp_path / ".pbkd"), "gpu", "127.0.0.1", 4200, 5000
    )
    assert [service.name for service in services] == ["the worker"]
    assert services[0].environment == {"PREFECT_API_URL": "http://prefect:4200/api"}
    assert (addresses.prefect, addresses.mlflow) == ("http://prefect:4200", "http://mlflow:5000")


def test_the_workers_runs_link_to_the_pages_of_their_store(tmp_path, monkeypatch):
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PBKD_MLFLOW_URL"):
        monkeypatch.delenv(name, raising=False)
    workspace = Workspace(tmp_path, tmp_path / ".pbkd")
    ports = free_port(), free_port()
    expected = {
        "PREFECT_API_URL": f"http://127.0.0.1:{ports[0]}/api",
        "PBKD_MLFLOW_URL": f"http://127.0.0.1:{ports[1]}",
    }
    assert services_of(workspace, "gpu", "127.0.0.1", *ports)[0][-1].environment == expected
    monkeypatch.setenv("PBKD_MLFLOW_URL", "https://tunnel")
    expected["PBKD_MLFLOW_URL"] = "https://tunnel"
    assert services_of(workspace, "gpu", "127.0.0.1", *ports)[0][-1].environment == expected


# ---------------------------------------------------------------- the deployment


def deployment(project: Project, name: str) -> dict:
    return json.loads(project.run("prefect", "deployment", "inspect", name, "-o", "json"))


def test_a_deployment_names_module_workspace_and_schedule(project: Project) -> None:
    output = project.run(
        *("pbkd", "deploy", "--pool", "gpu", "--name", "here"),
        *("--cron", "0 2 * * *", "--timezone", "Europe/Berlin"),
    )
    assert "compress/here runs by itself at `0 2 * * *` (Europe/Berlin)" in output
    found = deployment(project, "compress/here")
    assert found["entrypoint"] == "flows.compress.compress"
    assert found["work_pool_name"] == "gpu"
    assert found["parameters"]["root"] == str(project.root)
    schedule = found["schedules"][0]["schedule"]
    assert (schedule["cron"], schedule["timezone"]) == ("0 2 * * *", "Europe/Berlin")
    properties = found["parameter_openapi_schema"]["properties"]
    assert set(properties) == {"root", "state", "overrides", "if_busy"}
    assert all(entry["description"] for entry in properties.values())
    assert properties["if_busy"]["enum"] == ["fail", "wait"]
    assert found["parameters"]["if_busy"] == "fail"
    project.run("pbkd", "deploy", "--pool", "gpu", "--name", "here", "--wait")  # renewed
    found = deployment(project, "compress/here")
    assert found["schedules"] == []
    assert found["parameters"]["if_busy"] == "wait"


def test_what_is_wrong_with_a_deployment_is_told(project: Project) -> None:
    assert "--cron: got `2 o'clock`" in project.run(
        "pbkd", "deploy", "--cron", "2 o'clock", expect=2
    )
    wrong = ("pbkd", "deploy", "--cron", "0 2 * * *", "--timezone", "Mars/Olympus")
    assert "--timezone: got" in project.run(*wrong, expect=2)
    alone = Project(project.root, project.environment | {"PREFECT_API_URL": ""})
    assert "PREFECT_API_URL is not set" in alone.run("pbkd", "deploy", expect=2)


@pytest.mark.slow
def test_up_deploy_run_cancel_and_down(project: Project) -> None:
    environment = {k: v for k, v in project.environment.items() if k != "PREFECT_API_URL"}
    ports = free_port(), free_port()
    alone = Project(project.root, environment)
    servers = alone.start(
        *("pbkd", "up", "--pool", "here"),
        *("--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1])),
    )
    try:
        while "Ctrl-C ends" not in (line := servers.stdout.readline()):
            assert line, "it ended"
        api = f"http://127.0.0.1:{ports[0]}/api"
        client = Project(project.root, environment | {"PREFECT_API_URL": api})
        client.run("pbkd", "deploy", "--pool", "here", "--name", "here")
        run = ("prefect", "deployment", "run", "compress/here")
        output = client.run(*run, "-p", 'overrides={"finetune.epochs": 2}', "--watch")
        assert "Completed" in output
        assert client.is_clean()
        assert "epochs: 2" in project.root.joinpath("params.yaml").read_text()

        output = client.run(*run, "-p", 'overrides={"teacher.epochs": 5000}', "-p", "if_busy=wait")
        run_id = re.search(r"UUID: (\S+)", output)[1]
        wait_until(lambda: "Prefect's flow run" in _holder(project), timeout_s=120)
        client.run("prefect", "flow-run", "cancel", run_id)
        began = time.monotonic()
        wait_until(lambda: not _holder(project), timeout_s=60)
        assert time.monotonic() - began < 10
        children = psutil.Process(servers.pid).children(recursive=True)
    finally:
        os.kill(servers.pid, signal.SIGINT)
        output, _ = servers.communicate(timeout=60)
    assert "ended" in output
    assert servers.returncode == 0
    assert not [child for child in children if _lives(child)]


def _lives(process: psutil.Process) -> bool:
    """Whether a process runs; one that nobody waited for does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _holder(project: Project) -> str:
    """What the lock says of the run that holds the workspace; empty: none does."""
    try:
        with workspace_lock(project.root, project.root / ".pbkd"):
            return ""
    except WorkspaceBusyError as error:
        return str(error)
