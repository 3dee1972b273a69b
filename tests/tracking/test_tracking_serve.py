"""The command of docs/registry.md serves a registered model over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
import torch

from pbkd.tracking import tracking_uri
from tests.tracking.registered import new_registry


@pytest.mark.slow
def test_a_served_version_answers_with_the_models_logits(new_store: Path, tmp_path: Path):
    registry = new_registry(new_store, tmp_path / "workspace")
    candidate = registry.candidate("half")
    registry.register(candidate)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow's uvicorn
    environment = {"MLFLOW_TRACKING_URI": tracking_uri(registry.workspace), "PATH": programs}
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/tiny@best-half"),
            *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
        ],
        env=os.environ | environment,
        start_new_session=True,
    )
    try:
        images = torch.rand(3, 1, 8, 8)
        answer = _post(f"http://127.0.0.1:{port}/invocations", {"inputs": images.tolist()}, server)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    expected = candidate.model(images)
    torch.testing.assert_close(torch.tensor(answer["predictions"]), expected, rtol=1e-4, atol=1e-4)


def _post(url: str, body: object, server: subprocess.Popen[bytes], within_s: float = 180) -> dict:
    """The answer, as soon as the server is up."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    until = time.monotonic() + within_s
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except HTTPError:
            raise
        except URLError:
            if server.poll() is not None or time.monotonic() > until:
                raise
            time.sleep(0.5)
