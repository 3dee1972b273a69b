"""Models in the MLflow registry: a version per digest and budget, and the alias `champion`."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from pbkd._version import __version__
from pbkd.artifacts import Workspace
from pbkd.models import Classifier, ModelCard
from pbkd.tracking.mlflow_run import PipelineRun, mlflow_client, tracking_uri

_log = logging.getLogger(__name__)

CHAMPION = "champion"
_DECIDING = ("val_accuracy", "teacher_val_accuracy", "file_bytes")
"""Figures that the rule of the champion needs; they stand on the version as tags."""


class Candidate(BaseModel):
    """A model to register.

    Attributes:
        budget: name of the student, or ``teacher``.
        figures: numbers that the version carries; ``val_accuracy`` and ``file_bytes`` decide.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    budget: str
    folder: Path
    model: Classifier
    card: ModelCard
    figures: dict[str, float]


class Version(BaseModel):
    """A version in the registry."""

    model_config = ConfigDict(frozen=True)

    version: str
    model_digest: str


class Registered(BaseModel):
    """The receipt: which version holds which model, and who is champion."""

    model_config = ConfigDict(frozen=True)

    tracking_uri: str
    name: str
    versions: dict[str, Version]
    champion: str | None


def register_models(
    workspace: Workspace,
    run: PipelineRun,
    name: str,
    candidates: list[Candidate],
    max_accuracy_drop: float,
) -> Registered:
    """Register each model once, and move the alias by its rule.

    The rule: the champion is the student with the smallest file among those that lose at most
    ``max_accuracy_drop`` of validation accuracy against their teacher; of equal files the more
    accurate one. It is judged among the versions of the same data, and moves only to a better one.

    Args:
        candidates: the teacher (``budget: teacher``) and the students.
    """
    client = run.client
    known = _versions(client, name)
    versions = {c.budget: _register(client, run, name, c, known) for c in candidates}
    champion = _choose_champion(client, name, candidates[0].card.data_digest, max_accuracy_drop)
    if champion is not None:
        client.set_registered_model_alias(name, CHAMPION, champion)
    return Registered(
        tracking_uri=_public(tracking_uri(workspace), workspace),
        name=name,
        versions=versions,
        champion=champion,
    )


def still_registered(workspace: Workspace, receipt: Registered) -> bool:
    """Whether the registry holds what a receipt says."""
    known = {str(v.version): v for v in _versions(mlflow_client(workspace), receipt.name)}
    return all(
        entry.version in known
        and known[entry.version].tags.get("pbkd.model_digest") == entry.model_digest
        for entry in receipt.versions.values()
    )


def _versions(client: Any, name: str) -> list[Any]:
    """All versions of a model with their tags; an empty list where the name is new."""
    return list(client.search_model_versions(f"name = '{name}'"))


def _register(
    client: Any, run: PipelineRun, name: str, candidate: Candidate, known: list[Any]
) -> Version:
    digest = candidate.card.digest
    for version in known:
        tags = version.tags
        same = (tags.get("pbkd.model_digest"), tags.get("pbkd.budget")) == (
            digest,
            candidate.budget,
        )
        if same and version.status == "READY":
            _log.info("%s is version %s of %s already", candidate.budget, version.version, name)
            return Version(version=str(version.version), model_digest=digest)
    model_uri = _log_model(client, run, candidate)
    import mlflow

    tags = {
        "pbkd.model_digest": digest,
        "pbkd.budget": candidate.budget,
        "pbkd.data_digest": candidate.card.data_digest,
    } | {f"pbkd.{key}": f"{candidate.figures[key]:.12g}" for key in _DECIDING}
    with contextlib.redirect_stderr(io.StringIO()):  # it prints what our own log says
        version = mlflow.register_model(model_uri, name, tags=tags)
    client.update_model_version(name, version.version, description=_describe(candidate))
    _log.info("%s is now version %s of %s", candidate.budget, version.version, name)
    return Version(version=str(version.version), model_digest=digest)


def _log_model(client: Any, run: PipelineRun, candidate: Candidate) -> str:
    """Log a model with signature, example and figures, and pbkd's own files beside it."""
    import mlflow
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    model, card = candidate.model.cpu().eval(), candidate.card
    # two images: torch.export takes a batch of one for a constant
    example = np.zeros((2, card.network.in_channels, *card.image_size), np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *example.shape[1:]))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(card.class_names)))]),
    )
    requirements = [f"torch=={torch.__version__.split('+')[0]}", f"numpy=={np.__version__}"]
    with (
        mlflow.start_run(
            run_id=run.model_run(candidate.budget), log_system_metrics=False
        ) as model_run,
        warnings.catch_warnings(),
    ):
        # torch.export looks for contiguous weights; ours, channels last, come back as they were
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        info = mlflow.pytorch.log_model(
            model,
            name=f"{candidate.budget}",
            signature=signature,
            input_example=example,
            pip_requirements=requirements,
            extra_files=[str(path) for path in sorted(candidate.folder.glob("model.*"))],
            metadata={"class_names": list(card.class_names), "pbkd": __version__},
        )
        for key, value in candidate.figures.items():
            client.log_metric(model_run.info.run_id, key, value, model_id=info.model_id)
    return str(info.model_uri)


def _describe(candidate: Candidate) -> str:
    """What a person who picks a version wants to know, in one line."""
    figures, card = candidate.figures, candidate.card
    kind = "Teacher" if candidate.budget == "teacher" else f"Student `{candidate.budget}` of"
    replaced = f", {len(card.replacements)} blocks replaced" if card.replacements else ""
    return (
        f"{kind} {card.network.name}{replaced}: {figures['val_accuracy']:.2%} on the validation "
        f"split (teacher {figures['teacher_val_accuracy']:.2%}), {figures['test_accuracy']:.2%} on "
        f"the test split, {figures['file_bytes']:,.0f} bytes, {figures['macs']:,.0f} MACs per image"
    )


def _choose_champion(
    client: Any, name: str, data_digest: str, max_accuracy_drop: float
) -> str | None:
    """Version number of the best student on this data, or None where none is good enough."""
    best, best_rank = None, (math.inf, math.inf, 0)
    for version in _versions(client, name):
        tags = version.tags
        if tags.get("pbkd.data_digest") != data_digest or tags.get("pbkd.budget") == "teacher":
            continue
        accuracy, teacher = (
            float(tags[f"pbkd.{key}"]) for key in ("val_accuracy", "teacher_val_accuracy")
        )
        if accuracy < teacher - max_accuracy_drop:
            continue
        # of equal ones the first, so that the alias moves to better ones only
        rank = (float(tags["pbkd.file_bytes"]), -accuracy, int(version.version))
        if rank < best_rank:
            best, best_rank = str(version.version), rank
    return best


def _public(uri: str, workspace: Workspace) -> str:
    """The URI for the receipt, without passwords or paths of this machine.

    The default store is named by its place in the workspace.
    """
    if str(workspace.state) in uri:
        return "sqlite:///.pbkd/mlflow.db"
    parts = urlsplit(uri)
    if not parts.netloc:  # a file or folder of this machine
        return f"{parts.scheme or 'file'}:{Path(parts.path).name}"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
