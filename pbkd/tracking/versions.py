"""What a version in the registry says of itself, in tags: limits, figures, latency, lineage.

All that ``pick`` compares stands there, so that the registry alone is enough, on any machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from pbkd.errors import TrackingError, did_you_mean

TEACHER = "teacher"
PYTORCH = "pytorch"
FIGURES = (
    "val_accuracy",
    "test_accuracy",
    "teacher_val_accuracy",
    "file_bytes",
    "num_parameters",
    "macs",
)
"""Figures that stand on a version as tags; others are in its metrics alone."""
_PREFIX = "pbkd."
_ORIGIN = (f"{_PREFIX}data_digest", f"{_PREFIX}teacher_digest")
_LATENCY = f"{_PREFIX}latency."


class Setting(NamedTuple):
    """How a latency was measured; only those of one setting compare."""

    batch_size: int
    threads: int
    device: str
    runtime: str = PYTORCH

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        where = f"batch {self.batch_size} on {self.device}{threads if self.device == 'cpu' else ''}"
        return where if self.runtime == PYTORCH else f"{where}, {self.runtime}"


class MeasuredLatency(BaseModel):
    """Median milliseconds per batch."""

    model_config = ConfigDict(frozen=True)

    batch_size: int
    threads: int
    device: str
    runtime: str = PYTORCH
    median_ms: float

    @property
    def setting(self) -> Setting:
        return Setting(self.batch_size, self.threads, self.device, self.runtime)


class MachineLatency(BaseModel):
    """What one machine measured of a model; ``machine`` is its name for people."""

    model_config = ConfigDict(frozen=True)

    machine_id: str
    machine: str
    entries: tuple[MeasuredLatency, ...]

    def at(self, setting: Setting) -> float | None:
        """Milliseconds under a setting; None where it was not measured."""
        return next((e.median_ms for e in self.entries if e.setting == setting), None)


class ModelVersion(BaseModel):
    """A version as its tags describe it; what an older pbkd did not write is empty or absent.

    Attributes:
        student: the student's name, or ``teacher``.
        limits: parameters, macs, bytes or latency (ms) to the limit it was made for.
        figures: of ``FIGURES``, those on record; may hold what is not finite.
        latency: machine id to what that machine measured.
        weights_digest: of the weights' file.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    number: int
    student: str
    model_digest: str
    data_digest: str
    teacher_digest: str = ""
    teacher_version: str = ""
    commit: str = ""
    params_digest: str = ""
    run_id: str = ""
    weights_digest: str = ""
    limits: dict[str, float] = {}
    figures: dict[str, float] = {}
    latency: dict[str, MachineLatency] = {}

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"

    @property
    def origin(self) -> tuple[str, str]:
        """Data and teacher: versions of one origin compare."""
        return self.data_digest, self.teacher_digest

    def figure(self, name: str) -> float | None:
        """A figure that is on record and finite."""
        value = self.figures.get(name)
        return value if value is not None and math.isfinite(value) else None


def figure_tags(
    figures: Mapping[str, float], limits: Mapping[str, float], latency: MachineLatency | None
) -> dict[str, str]:
    """Tags for figures (those of ``FIGURES``), limits and one machine's latency."""
    tags = {f"{_PREFIX}{key}": f"{figures[key]:.12g}" for key in FIGURES if key in figures}
    if limits:
        tags[f"{_PREFIX}limits"] = json.dumps(dict(limits), sort_keys=True)
    if latency is not None and latency.entries:
        tags[_LATENCY + latency.machine_id] = latency.model_dump_json(exclude={"machine_id"})
    return tags


def lineage_tags(**entries: str) -> dict[str, str]:
    """Tags for where a model comes from; empty entries get none."""
    return {f"{_PREFIX}{key}": value for key, value in entries.items() if value}


def is_current(tag: str) -> bool:
    """Whether the newest value of a tag counts, not that of the first registration."""
    return tag.startswith(_LATENCY) or tag in (f"{_PREFIX}limits", f"{_PREFIX}teacher_version")


def all_versions(client: Any, name: str) -> list[Any]:
    """MLflow's records of a model's versions, with tags; an empty list where the name is new."""
    return list(client.search_model_versions(f"name = '{name}'"))


def read_versions(client: Any, name: str) -> list[ModelVersion]:
    """The versions of a model that pbkd registered whole, oldest first.

    Raises:
        TrackingError: the registry has no model of this name, or cannot be read.
    """
    with_tags = [v for v in _known(client, name) if v.status == "READY"]
    found = [_read(version) for version in with_tags if f"{_PREFIX}budget" in version.tags]
    return sorted(found, key=lambda version: version.number)


def note_origin(client: Any, name: str, data_digest: str, teacher_digest: str) -> None:
    """Let the registry know the present data and teacher; the newest version may be of others."""
    client.set_registered_model_tag(name, _ORIGIN[0], data_digest)
    client.set_registered_model_tag(name, _ORIGIN[1], teacher_digest)


def present_origin(client: Any, versions: Sequence[ModelVersion]) -> tuple[str, str]:
    """Digests of the data and teacher that were registered last.

    Where an older pbkd wrote the registry, those of the newest version.
    """
    tags = client.get_registered_model(versions[-1].name).tags
    if all(key in tags for key in _ORIGIN):
        return tags[_ORIGIN[0]], tags[_ORIGIN[1]]
    return versions[-1].origin


def _known(client: Any, name: str) -> Iterable[Any]:
    from mlflow.exceptions import MlflowException

    try:
        if versions := all_versions(client, name):
            return versions
        names = sorted(model.name for model in client.search_registered_models())
    except MlflowException as error:
        raise TrackingError(f"the registry does not tell its versions of {name}: {error}") from None
    known = f"it has {', '.join(names)}" if names else "it is empty; run: pbkd register"
    hint = did_you_mean(name, names, known)
    raise TrackingError(f"the registry has no model of the name `{name}`; {hint}")


def _read(version: Any) -> ModelVersion:
    tags: Mapping[str, str] = version.tags

    def text(key: str) -> str:
        return tags.get(_PREFIX + key, "")

    number = int(version.version)
    try:
        return ModelVersion(
            name=version.name,
            number=number,
            student=text("budget"),
            model_digest=text("model_digest"),
            data_digest=text("data_digest"),
            teacher_digest=text("teacher_digest"),
            teacher_version=text("teacher_version"),
            commit=text("commit"),
            params_digest=text("params_digest"),
            run_id=text("run_id"),
            weights_digest=text("weights_digest"),
            limits=json.loads(text("limits") or "{}"),
            figures={key: float(text(key)) for key in FIGURES if text(key)},
            latency={
                key.removeprefix(_LATENCY): MachineLatency.model_validate(
                    {"machine_id": key.removeprefix(_LATENCY), **json.loads(value)}
                )
                for key, value in tags.items()
                if key.startswith(_LATENCY)
            },
        )
    except (ValueError, TypeError, ValidationError) as error:
        raise TrackingError(
            f"version {number} of {version.name} has a tag that pbkd did not write ({error}); "
            "correct or delete the tag, or the version"
        ) from None
