"""A Prefect server and a finished DVC workspace, both made here, once per session."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.project import BIN, Project, wait_until

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of all commands, with a Prefect server of our own behind it."""
    home = tmp_path_factory.mktemp("home")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "DVC_"))}
    environment = inherited | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PBKD_LOCK_DIR": str(home / "locks"),
        "PBKD_DEVICE": "cpu",
        "PBKD_WORKERS": "2",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    server = subprocess.Popen(
        [BIN / "prefect", "server", "start", "--port", str(port), "--no-ui"],
        env={k: v for k, v in environment.items() if k != "PREFECT_API_URL"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: _answers(f"{environment['PREFECT_API_URL']}/health"), timeout_s=120)
        yield environment
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="session")
def _finished_project(
    tmp_path_factory: pytest.TempPathFactory, _environment: dict[str, str], tiny_params: str
) -> Project:
    root = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(REPOSITORY / name, root)
    (root / "params.yaml").write_text(tiny_params)
    (root / "data" / "raw").mkdir(parents=True)
    project = Project(root, _environment)
    project.run("dvc", "init", "--no-scm", "--quiet")
    for key, value in (
        ("core.analytics", "false"),
        ("core.check_update", "false"),
        ("cache.type", "hardlink,symlink"),
    ):
        project.run("dvc", "config", key, value)
    project.run("pbkd", "run")
    return project


@pytest.fixture
def project(_finished_project: Project, tmp_path: Path) -> Project:
    """A copy of a workspace in which `pbkd run` has run."""
    root = tmp_path / "project"
    shutil.copytree(_finished_project.root, root)
    return Project(root, _finished_project.environment)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
