"""The commands of the tutorial and the README, as a newcomer would type them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def environment(home: Path) -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DVC_"))
    }
    return kept | {
        "HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PBKD_LOCK_DIR": str(home / "locks"),
        "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@localhost",
        "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@localhost",
    }  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def run(script: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-e", "-u", "-o", "pipefail", "-c", script],
        cwd=folder, env=environment(folder), text=True, timeout=3000,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_tutorial(tmp_path: Path) -> None:
    lines = "".join(blocks("docs/tutorial.md", "sh")).splitlines()
    assert lines[0] == ". .venv/bin/activate"
    (python,) = blocks("docs/tutorial.md", "python")
    output = run("\n".join([*lines[1:], f"python - <<'END'\n{python}END"]), tmp_path)
    workspace = tmp_path / "my-digits"
    assert "12 candidates in" in output  # plan
    assert "Settings that differ" in output
    assert "stitch.students.tiny" in output
    assert "is the most accurate of the 3 students" in output or "is the most" in output
    assert len(re.findall(r"\['\d'(, '\d'){7}\]", output)) == 1
    assert (workspace / "small-onnx" / "model-int8.onnx").is_file()
    assert (workspace / ".pbkd" / "compare.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_readmes_workspace_of_own_images(tmp_path: Path) -> None:
    (block,) = [text for text in blocks("README.md", "") if "--data ~/flowers.zip" in text]
    random = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "flowers.zip", "w") as archive:
        for index in range(60):
            label = index % 3
            pixels = random.integers(0, 100, (140, 150, 3), dtype=np.uint8)
            pixels[..., label] += 120
            with archive.open(f"flowers/kind-{label}/{index:03d}.png", "w") as member:
                Image.fromarray(pixels).save(member, "png")
    quick = "sed -i 's/epochs: [0-9]*/epochs: 1/' params.yaml"
    run(block.replace("cd flowers\n", f"cd flowers\n{quick}\n"), tmp_path)
    assert (tmp_path / "flowers" / "results" / "report.html").is_file()
