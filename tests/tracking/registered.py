"""A real registry in a temporary folder, filled with small untrained models."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pbkd.artifacts import Workspace
from pbkd.config import AugmentConfig, Params
from pbkd.models import ModelCard, NetworkSpec, build_classifier, save_model
from pbkd.tracking import PipelineRun, Registered, register_models
from pbkd.tracking.registry import Candidate
from pbkd.tracking.versions import MachineLatency, MeasuredLatency

CLASSES = ("ant", "bee", "cat")
FIGURES = {
    "val_accuracy": 0.9,
    "test_accuracy": 0.89,
    "teacher_val_accuracy": 0.95,
    "file_bytes": 1000.0,
    "num_parameters": 200.0,
    "macs": 4000.0,
}


def latency_of(machine_id: str, *entries: tuple[int, float]) -> MachineLatency:
    """Latencies by batch size, on one CPU thread."""
    return MachineLatency(
        machine_id=machine_id,
        machine=f"processor of {machine_id}",
        entries=tuple(
            MeasuredLatency(batch_size=size, threads=1, device="cpu", median_ms=median_ms)
            for size, median_ms in entries
        ),
    )


@dataclass(frozen=True)
class Registry:
    """A workspace with a registry; ``name`` is the model's."""

    workspace: Workspace
    name: str

    def candidate(
        self,
        budget: str,
        figures: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        data: str = "data",
        limits: Mapping[str, float] | None = None,
        latency: MachineLatency | None = None,
    ) -> Candidate:
        """A small model whose weights the seed makes, with figures as if it were trained."""
        card = ModelCard(
            network=NetworkSpec(name="vgg_small", num_classes=3, in_channels=1, width=0.05),
            mean=(0.4,),
            std=(0.2,),
            image_size=(8, 8),
            class_names=CLASSES,
            augment=AugmentConfig(),
            data_digest=data,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_classifier(card).eval()
        folder = self.workspace.root / "models" / f"{budget}-{seed}-{data}"
        folder.mkdir(parents=True, exist_ok=True)
        return Candidate(
            budget=budget,
            folder=folder,
            model=model,
            card=save_model(folder, model, card),
            figures=FIGURES | dict(figures or {}),
            limits=dict(limits or {}),
            latency=latency,
        )

    def register(self, *candidates: Candidate) -> Registered:
        run = PipelineRun.current(self.workspace, Params())
        return register_models(self.workspace, run, self.name, list(candidates), 0.02, "params")


def new_registry(store: Path, root: Path, name: str = "tiny") -> Registry:
    """A workspace with a copy of an empty store."""
    workspace = Workspace(root, root / ".pbkd")
    workspace.state.mkdir(parents=True)
    shutil.copy(store, workspace.state / "mlflow.db")
    return Registry(workspace, name)


def tags_of(client: Any, name: str, number: int | str) -> dict[str, str]:
    return dict(client.get_model_version(name, str(number)).tags)
