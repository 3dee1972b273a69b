"""Shared fixtures: a tiny real run, made once per session and copied by tests that change it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pbkd.artifacts import Workspace
from pbkd.stages import STAGES, StageContext, run_stage

TINY_PARAMS = """\
seed: 0
prepare: {source: digits, path: data/raw, image_size: 8}
teacher:
  {model: vgg_small, weights: null, width: 0.25, epochs: 3, batch_size: 64, augment: {pad: 1}}
blocks: {select: convs, exclude: [features.0]}
activations: {source: cache, views: 2, chunk: 500}
distill: {epochs: 2}
stitch: {max_damage: 5.0, recalibrate_batches: 2}
finetune: {epochs: 1}
shrink: {recipe: []}
evaluate: {latency_batch_sizes: [1, 8], latency_seconds: 0.05, runtimes: [pytorch]}
register: {name: tiny}
"""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DVC_ROOT", "DVC_STAGE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from more threads, and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_system_metrics() -> Iterator[None]:
    """A thread per run that outlives its test would write into a store that is gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
        yield


@pytest.fixture(scope="session")
def tiny_params() -> str:
    """params.yaml of the tiny run."""
    return TINY_PARAMS


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages but `register`, run by the library alone."""
    root = tmp_path_factory.mktemp("finished")
    (root / "params.yaml").write_text(TINY_PARAMS)
    context = StageContext.load(Workspace(root, root / ".pbkd"))
    for name in STAGES[:-1]:
        run_stage(name, context)
    return root


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Workspace:
    """A copy of a finished tiny workspace: ten classes, five blocks, one student."""
    root = tmp_path / "workspace"
    shutil.copytree(_finished, root)
    return Workspace(root, root / ".pbkd")


@pytest.fixture
def workspace(finished: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The finished workspace as the present folder, without settings."""
    monkeypatch.chdir(finished.root)
    for name in [name for name in os.environ if name.startswith("PBKD_")]:
        monkeypatch.delenv(name)
    return finished


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs rights that this user lacks")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
