"""The marked blocks of README and tutorial, run as they stand, in order, in a new folder.

Markers are comments before a block: `run`; `serve: PORT`, which goes on in the background until
the document ends; `params`, which is merged into params.yaml. Networks and trainings are cut down:
what is tested is that the commands work one after the other.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.docs.documents import README, REPOSITORY, Block, blocks

TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
SHORT: dict[str, Any] = {
    "teacher": {"width": 0.5, "epochs": 8, "min_accuracy": 0.0},
    "distill": {"epochs": 3},
    "stitch": {"max_damage": 100.0},
    "finetune": {"epochs": 2},
    "shrink": {"recipe": [{"method": "quantize", "bits": 4}, {"method": "code"}]},
    "evaluate": {"latency_seconds": 0.05, "latency_batch_sizes": [1], "runtimes": ["pytorch"]},
}
SHORT_IMAGES: dict[str, Any] = {
    "prepare": {"image_size": 16, "resize": None},
    "teacher": {"model": "cifar_resnet20", "width": 0.5, "epochs": 6, "min_accuracy": 0.0},
    "blocks": {"candidates": [{"kind": "separable"}]},
    "distill": {"epochs": 1},
    "stitch": {"max_damage": 100.0, "students": {"half": {"max_parameters": 0.6}}},
    "finetune": {"epochs": 1},
    "evaluate": {"latency_seconds": 0.05, "latency_batch_sizes": [1], "runtimes": ["pytorch"]},
}


@dataclass
class Terminal:
    """A folder to type in, and what was started there."""

    folder: Path
    environment: dict[str, str]
    short: dict[str, Any]
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    cut: set[Path] = field(default_factory=set)

    def type(self, block: Block) -> str:
        """Do what a block says; returns what was printed."""
        if block.marker == "params":
            self._merge(yaml.safe_load(block.text))
        elif block.marker.startswith("serve: "):
            self._serve(block.text, int(block.marker.removeprefix("serve: ")))
        elif block.marker == "run" and block.language == "python":
            return self._run([sys.executable, "-c", block.text])
        elif block.marker == "run":
            return "".join(map(self._line, _lines(block.text)))
        return ""

    def _line(self, line: str) -> str:
        where = self.folder / "where-am-i"
        printed = self._run(["bash", "-eo", "pipefail", "-c", f"{line}\npwd > '{where}'"])
        text = where.read_text()
        where.unlink()
        self.folder = Path(text.strip())
        params = self.folder / "params.yaml"
        if params.exists() and params not in self.cut:
            self.cut.add(params)
            self._merge(self.short)
        return printed

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True,
            check=False, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _merge(self, new: dict[str, Any]) -> None:
        path = self.folder / "params.yaml"
        path.write_text(yaml.safe_dump(_merged(yaml.safe_load(path.read_text()), new)))

    def _serve(self, text: str, port: int) -> None:
        server = subprocess.Popen(
            ["bash", "-ec", text], cwd=self.folder, env=self.environment, start_new_session=True
        )
        self.servers.append(server)
        until = time.monotonic() + 180
        while not _listens(port):
            assert server.poll() is None, f"ended with {server.returncode}: {text}"
            assert time.monotonic() < until, f"not up: {text}"
            time.sleep(0.2)


def _lines(text: str) -> list[str]:
    """Commands, those over several lines as one."""
    found = [""]
    for line in text.splitlines():
        found[-1] += line + "\n"
        if line.strip() and not line.rstrip().endswith(("|", "\\")):
            found.append("")
    return [line for line in found if line.strip()]


def _merged(old: Any, new: Any) -> Any:
    """Sections are merged key by key; students, recipes and lists are replaced."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    replaced = {key: _merged(old.get(key), value) for key, value in new.items()}
    return old | replaced if "students" not in new else old | new


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """No settings of the user's, no network, and a home of its own."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PBKD_", "PREFECT_", "MLFLOW_", "DVC_", "RAY_", "GIT_"))
    }
    return kept | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "GIT_CEILING_DIRECTORIES": str(tmp_path),
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PBKD_DEVICE": "cpu",
        "PBKD_WORKERS": "2",
        "PBKD_LOCK_DIR": str(home / "locks"),
    }


@pytest.fixture
def terminal(tmp_path: Path, environment: dict[str, str]) -> Iterator[Terminal]:
    """In an empty folder; its servers end with the test."""
    folder = tmp_path / "work"
    folder.mkdir()
    opened = Terminal(folder, environment, SHORT)
    yield opened
    for server in opened.servers:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.slow
def test_the_tutorial_runs_from_the_first_command_to_the_last(terminal: Terminal) -> None:
    printed = [terminal.type(block) for block in blocks(TUTORIAL)]
    workspace = terminal.folder
    assert (workspace / "results" / "report.html").is_file()
    assert (workspace / "picked" / "model.safetensors").is_file()
    assert (workspace / "half-onnx" / "model-int8.onnx").is_file()
    assert any('"predictions": [[' in text for text in printed)
    assert any("torch.Size([8, 10])" in text for text in printed)
    assert any("quarter" in text for text in printed)


@pytest.mark.slow
def test_the_readme_runs(terminal: Terminal, environment: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    images = Path(environment["HOME"]) / "flowers.zip"
    with zipfile.ZipFile(images, "w") as archive:
        for name, brightest in (("rose", 120), ("tulip", 255)):  # told apart within few epochs
            for index in range(150):
                pixels = rng.integers(0, brightest, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images.with_suffix(".png"))
                archive.write(images.with_suffix(".png"), f"{name}/{index}.png")
    terminal.short = SHORT_IMAGES
    ran = [block for block in blocks(README) if block.marker]
    for block in ran:
        terminal.type(block)
    assert (terminal.folder / "picked" / "model.safetensors").is_file()
    assert (terminal.folder / "results" / "registered.json").is_file()


def test_the_blocks_that_are_run_are_marked() -> None:
    marked = [block.marker for block in blocks(TUTORIAL) if block.marker]
    assert marked.count("run") >= 8
    assert marked.count("params") == 1
    assert [block.marker for block in blocks(README)].count("run") >= 3


def test_lines_that_go_on_are_one_command() -> None:
    text = "a |\n  b\ncd x\nc \\\n  d\n"
    assert _lines(text) == ["a |\n  b\n", "cd x\n", "c \\\n  d\n"]


def test_parameters_are_merged_section_by_section() -> None:
    old = {"seed": 0, "stitch": {"students": {"a": 1}, "max_damage": 2}, "teacher": {"epochs": 3}}
    new = {"stitch": {"students": {"b": 1}}, "teacher": {"width": 1}}
    assert _merged(old, new) == {
        "seed": 0,
        "stitch": {"students": {"b": 1}, "max_damage": 2},
        "teacher": {"epochs": 3, "width": 1},
    }
