"""Models in the MLflow registry: a version per digest and budget, with its card and lineage."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from pbkd._version import __version__
from pbkd.artifacts import Workspace, file_digest
from pbkd.measure import headline
from pbkd.models import Classifier, ModelCard
from pbkd.models.checkpoint import WEIGHTS
from pbkd.redaction import without_secrets
from pbkd.tracking.aliases import move_aliases
from pbkd.tracking.card import model_card
from pbkd.tracking.lineage import commit_of, lock_file, md5_of
from pbkd.tracking.mlflow_run import PipelineRun, mlflow_client, tracking_uri
from pbkd.tracking.versions import (
    TEACHER,
    MachineLatency,
    all_versions,
    figure_tags,
    is_current,
    lineage_tags,
    note_origin,
)

_log = logging.getLogger(__name__)

_ALIASES = """\
A teacher and the students that pbkd made of it, a version each.

- `champion`: the smallest student that is accurate enough (`register.max_accuracy_drop`)
- `best-NAME`: the most accurate version of student NAME under its present limits

Both go by the validation split. The description of a version is its card.
"""
MODEL_CARD = "MODEL_CARD.md"
"""The card's file among the artifacts of a model's run; it is the version's description, too."""


class Candidate(BaseModel):
    """A model to register.

    Attributes:
        budget: name of the student, or ``teacher``.
        figures: numbers that the version carries; ``val_accuracy`` and ``file_bytes`` decide.
        limits: parameters, macs, bytes or latency (ms) to the limit it was made for.
        latency: what this machine measured.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    budget: str
    folder: Path
    model: Classifier
    card: ModelCard
    figures: dict[str, float]
    limits: dict[str, float] = {}
    latency: MachineLatency | None = None


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
    params_digest: str = "",
) -> Registered:
    """Register each model once, and move the aliases by their rules.

    A version that exists gets the tags that it lacks, and this machine's latency.

    Args:
        candidates: the teacher (``budget: teacher``) and the students.
        params_digest: of all parameters; part of the lineage.
    """
    client = run.client
    known = all_versions(client, name)
    teacher_digest = next((c.card.digest for c in candidates if c.budget == TEACHER), "")
    data_digest = candidates[0].card.data_digest
    lock = lock_file(workspace)
    versions: dict[str, Version] = {}
    for candidate in sorted(candidates, key=lambda c: c.budget != TEACHER):
        teacher = versions.get(TEACHER)
        tags = figure_tags(candidate.figures, candidate.limits, candidate.latency) | lineage_tags(
            data_digest=candidate.card.data_digest,
            teacher_digest=teacher_digest,
            teacher_version=teacher.version if teacher else "",
        )
        found = _find(candidate, known)
        if found is not None:
            versions[candidate.budget] = _refresh(client, name, found, tags)
            if not found.description:  # whoever registered it was killed before the card
                _describe(client, name, found, candidate)
            continue
        tags |= lineage_tags(
            budget=candidate.budget,
            model_digest=candidate.card.digest,
            weights_digest=file_digest(candidate.folder / WEIGHTS),
            commit=commit_of(workspace),
            dvc_lock_md5=md5_of(lock) if lock is not None else "",
            params_digest=params_digest,
            run_id=run.run_id,
            version=__version__,
        )
        versions[candidate.budget] = _register(client, run, name, candidate, tags)
    note_origin(client, name, data_digest, teacher_digest)
    if not known:
        client.update_registered_model(name, description=_ALIASES)
    limits = {c.budget: c.limits for c in candidates if c.budget != TEACHER}
    champion = move_aliases(client, name, data_digest, limits, max_accuracy_drop)
    return Registered(
        tracking_uri=_public(tracking_uri(workspace), workspace),
        name=name,
        versions=versions,
        champion=champion,
    )


def still_registered(workspace: Workspace, receipt: Registered) -> bool:
    """Whether the registry holds what a receipt says."""
    known = {str(v.version): v for v in all_versions(mlflow_client(workspace), receipt.name)}
    return all(
        entry.version in known
        and known[entry.version].tags.get("pbkd.model_digest") == entry.model_digest
        for entry in receipt.versions.values()
    )


def reachable_uri(uri: str, workspace: Workspace) -> str | None:
    """A receipt's URI as commands in the workspace's folder take it, without passwords.

    None for a file that the present store is not: the receipt has no more than its name.
    """
    if urlsplit(uri).netloc:  # a server
        return uri
    here = tracking_uri(workspace)
    is_usual = here == f"sqlite:///{workspace.root / '.pbkd' / 'mlflow.db'}"
    if not is_usual and _public(here, workspace) == uri:
        return without_secrets(here)
    return uri if "://" in uri else None


def _find(candidate: Candidate, known: list[Any]) -> Any:
    """The version that holds this model under this budget, or None."""
    wanted = (candidate.card.digest, candidate.budget)
    for version in known:
        same = (version.tags.get("pbkd.model_digest"), version.tags.get("pbkd.budget")) == wanted
        if same and version.status == "READY":
            return version
    return None


def _refresh(client: Any, name: str, version: Any, tags: dict[str, str]) -> Version:
    """Give a version the tags that it lacks, and those of which the newest value counts."""
    for key, value in tags.items():
        old = version.tags.get(key)
        if old is None or (is_current(key) and old != value):
            client.set_model_version_tag(name, version.version, key, value)
    _log.info("%s is version %s of %s already", version.tags["pbkd.budget"], version.version, name)
    digest = version.tags["pbkd.model_digest"]
    return Version(version=str(version.version), model_digest=digest)


def _register(
    client: Any, run: PipelineRun, name: str, candidate: Candidate, tags: dict[str, str]
) -> Version:
    import mlflow

    model_uri = _log_model(client, run, candidate)
    with contextlib.redirect_stderr(io.StringIO()):  # it prints what our own log says
        version = mlflow.register_model(model_uri, name, tags=tags)
    _describe(client, name, version, candidate)
    _log.info("%s is now version %s of %s", candidate.budget, version.version, name)
    return Version(version=str(version.version), model_digest=candidate.card.digest)


def _describe(client: Any, name: str, version: Any, candidate: Candidate) -> None:
    """Write a version's card: a file of the model's run, then the version's description."""
    card = model_card(
        name,
        version.version,
        candidate.budget,
        candidate.card,
        candidate.figures,
        candidate.limits,
        candidate.latency,
        version.tags,
    )
    if version.run_id:
        client.log_text(version.run_id, card, MODEL_CARD)
    client.update_model_version(name, version.version, description=card)


def _log_model(client: Any, run: PipelineRun, candidate: Candidate) -> str:
    """Log a model with signature, example and figures, and pbkd's own files beside it."""
    import mlflow
    import mlflow.pytorch
    from mlflow.entities import Metric
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
            name=candidate.budget.replace(".", "_"),  # MLflow takes no dots here
            signature=signature,
            input_example=example,
            pip_requirements=requirements,
            # MLflow decodes a plain path as if it were a URI
            extra_files=[path.as_uri() for path in sorted(candidate.folder.glob("model.*"))],
            metadata={"class_names": list(card.class_names), "pbkd": __version__},
            validate_serving_input=False,  # it loads the exported graph anew: half of the time
        )
        now = int(time.time() * 1000)
        metrics = [
            Metric(key, value, now, 0, model_id=info.model_id)
            for key, value in (candidate.figures | _latency_metrics(candidate)).items()
        ]
        client.log_batch(model_run.info.run_id, metrics=metrics)
    return str(info.model_uri)


def _latency_metrics(candidate: Candidate) -> dict[str, float]:
    """Latency under names for MLflow's pages: of each batch size, the report's headline."""
    entries = candidate.latency.entries if candidate.latency else ()
    return {f"latency_batch_{e.batch_size}_ms": e.median_ms for e in headline(entries)}


def _public(uri: str, workspace: Workspace) -> str:
    """The URI for the receipt, without passwords or paths of this machine.

    The default store is named by its place in the workspace.
    """
    if str(workspace.state) in uri:
        return "sqlite:///.pbkd/mlflow.db"
    uri = without_secrets(uri)
    parts = urlsplit(uri)
    if not parts.netloc:  # a file or folder of this machine
        return f"{parts.scheme or 'file'}:{Path(parts.path).name}"
    return uri
