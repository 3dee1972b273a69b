"""A temporary Prefect server that starts while this process still imports Prefect.

Prefect makes one by itself, but only once it is imported, and after importing the server's code
into this process, too: five seconds later.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from pbkd.errors import PbkdError

_TIMEOUT_S = 120.0
_POLL_S = 0.05
_END_S = 5.0  # how long the server may take to end

# PR_SET_PDEATHSIG: the server ends with this process, also where this process is killed
_LAUNCH = """
import ctypes, runpy, signal
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
runpy.run_module("uvicorn", run_name="__main__")
"""
_APP = "prefect.server.api.server:create_app"
_ENVIRONMENT = {  # as Prefect starts its own
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}


class TemporaryServer:
    """A server in a process of its own, at ``url``; None: Prefect is configured by the user."""

    def __init__(self, url: str | None, process: subprocess.Popen[bytes] | None) -> None:
        self.url = url
        self._process = process

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            PbkdError: it has ended, or does not answer in time.
        """
        if self._process is None:
            return
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):  # noqa: S310  our own URL
                return
            time.sleep(_POLL_S)
        raise PbkdError(
            f"the temporary Prefect server at {self.url} did not start; run it again, or start one "
            "by `prefect server start` and set PREFECT_API_URL"
        )

    def end(self) -> None:
        """End it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def temporary_server() -> TemporaryServer:
    """Start a server unless the user has configured one; call before Prefect is imported.

    It ends with this process: after Prefect, which sends its last logs at exit.
    """
    if _is_configured():
        return TemporaryServer(None, None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    process = subprocess.Popen(  # noqa: S603  no shell, our own words
        [sys.executable, "-c", _LAUNCH, "--factory", _APP, *options, "--lifespan", "on"],
        env=os.environ | _ENVIRONMENT,
    )
    server = TemporaryServer(f"http://127.0.0.1:{port}/api", process)
    atexit.register(server.end)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    return server


def _is_configured() -> bool:
    """Whether anything but the defaults may say where Prefect's API is; Prefect then finds it."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    signs = {  # file to what in it is meant for Prefect
        home / "profiles.toml": "",
        Path("prefect.toml"): "",
        Path("pyproject.toml"): "[tool.prefect",
        Path(".env"): "PREFECT_",
    }
    names = ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")
    return any(name in os.environ for name in names) or any(
        path.is_file() and sign in path.read_text(errors="replace") for path, sign in signs.items()
    )
