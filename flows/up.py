"""Prefect's server, MLflow's server and a worker on one machine, as one thing that starts and ends.

A server that the environment names (PREFECT_API_URL, MLFLOW_TRACKING_URI) is used, not started.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from flows.server import answers
from flows.supervisor import GRACE_S
from pbkd.artifacts import Workspace
from pbkd.errors import ConfigError, PbkdError
from pbkd.tracking import tracking_uri

_START_S = 180.0
_POLL_S = 0.2
_END_S = GRACE_S + 5.0
_EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - asks, does not bind


@dataclass
class Service:
    """A program that runs until it is told to end; ``flows.supervisor`` stands between.

    Attributes:
        module: Python's, with its arguments.
        log: file of its output.
        is_up: whether it answers.
    """

    name: str
    module: list[str]
    log: Path
    is_up: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its output goes to its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flows.supervisor", str(os.getpid()), *self.module],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which ends them in order
            )

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            PbkdError: it has ended, or does not answer in time.
        """
        until = time.monotonic() + _START_S
        while not self.is_up():
            self.check()
            if time.monotonic() > until:
                raise PbkdError(f"{self.name} does not answer; see {self.log}")
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Raise PbkdError where it has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise PbkdError(
                f"{self.name} has ended by itself (status {self.process.returncode}); "
                f"see {self.log}"
            )

    def end(self) -> None:
        """End it and whatever it has started."""
        if self.process is None:
            return
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Addresses:
    """Where the servers are; both may be somebody else's."""

    prefect_api: str
    mlflow: str

    @property
    def prefect(self) -> str:
        """Prefect's pages."""
        return self.prefect_api.removesuffix("/api")


def services_of(
    workspace: Workspace, pool: str, host: str, prefect_port: int, mlflow_port: int
) -> tuple[list[Service], Addresses]:
    """What to start, in order, and where it will be.

    Raises:
        ConfigError: a port is in use.
    """
    logs = workspace.state / "logs"
    near, far = _names_of(host)
    given_api = os.environ.get("PREFECT_API_URL") or None
    given_store = os.environ.get("MLFLOW_TRACKING_URI", "")
    is_given = given_store.startswith("http")
    addresses = Addresses(
        prefect_api=given_api or f"http://{far}:{prefect_port}/api",
        mlflow=given_store if is_given else f"http://{far}:{mlflow_port}",
    )
    services = []
    if given_api is None:
        _check_free(host, prefect_port, "--prefect-port")
        services.append(_prefect(logs, host, near, prefect_port))
    environment = {"PREFECT_API_URL": given_api or f"http://{near}:{prefect_port}/api"}
    if not is_given:
        _check_free(host, mlflow_port, "--mlflow-port")
        services.append(_mlflow(workspace, logs, host, mlflow_port))
        # the worker's runs use the store itself, as `pbkd run` does; links lead to the server
        environment["PBKD_MLFLOW_URL"] = os.environ.get("PBKD_MLFLOW_URL") or addresses.mlflow
    services.append(_worker(logs, pool, environment))
    return services, addresses


def _names_of(host: str) -> tuple[str, str]:
    """What this machine, and what others call the host that a server listens on."""
    return ("127.0.0.1", socket.gethostname()) if host in _EVERYWHERE else (host, host)


def _prefect(logs: Path, host: str, near: str, port: int) -> Service:
    environment = {
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": str(port),
        # relative: the pages then work under whatever name, and through a tunnel, too
        "PREFECT_SERVER_UI_API_URL": "/api",
    }
    health = f"http://{near}:{port}/api/health"
    return Service(
        "Prefect's server",
        ["prefect", "server", "start"],
        logs / "prefect.log",
        lambda: answers(health),
        environment,
    )


def _mlflow(workspace: Workspace, logs: Path, host: str, port: int) -> Service:
    near, far = _names_of(host)
    # its jobs are for language models, and take five processes
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # not an argument: everybody on the machine sees those, and it may hold a password
        "MLFLOW_BACKEND_STORE_URI": tracking_uri(workspace),
    }
    if near != far and "MLFLOW_SERVER_ALLOWED_HOSTS" not in os.environ:
        # MLflow refuses requests for other names than these; private networks are its own default
        names = ("localhost:*", "127.0.0.1:*", "10.*", "192.168.*", f"{far}:*")
        environment["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(names)
    return Service(
        "MLflow's server",
        [
            *("mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"),
            *("--artifacts-destination", (workspace.state / "mlartifacts").as_uri()),
        ],
        logs / "mlflow.log",
        lambda: answers(f"http://{near}:{port}/health"),
        environment,
    )


def _worker(logs: Path, pool: str, environment: dict[str, str]) -> Service:
    name = f"{socket.gethostname()}-{os.getpid()}"
    api = environment["PREFECT_API_URL"]
    return Service(
        "the worker",
        ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", name],
        logs / "worker.log",
        lambda: _is_at_work(api, pool, name),
        environment,
    )


@contextmanager
def running(services: list[Service]) -> Iterator[None]:
    """Start services one after another; end them in the opposite order, whatever happens.

    Raises:
        PbkdError: one does not start.
    """
    started: list[Service] = []
    try:
        for service in services:
            service.start()
            started.append(service)
            service.wait()
        yield
    finally:
        for service in reversed(started):
            service.end()


def watch(services: list[Service]) -> None:
    """Return never; raise PbkdError as soon as a service has ended."""
    while True:
        for service in services:
            service.check()
        time.sleep(_POLL_S)


def _check_free(host: str, port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{option} {port}: {host}:{port} cannot be used ({error.strerror}); take another"
            ) from None


def _is_at_work(api: str, pool: str, worker: str) -> bool:
    headers = {"Content-Type": "application/json"}
    if auth := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    asked = urllib.request.Request(  # noqa: S310 - what PREFECT_API_URL names
        f"{api}/work_pools/{urllib.parse.quote(pool)}/workers/filter",
        json.dumps({"workers": {"operator": "and_"}}).encode(),
        headers,
    )
    with suppress(OSError), urllib.request.urlopen(asked, timeout=5) as answer:  # noqa: S310
        return any(found["name"] == worker for found in json.load(answer))
    return False
