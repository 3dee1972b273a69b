"""What a stage gets, and how it is run: by name, with its wall time and energy on record."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pbkd.artifacts import Workspace, read_json, write_json
from pbkd.config import Params, load_params
from pbkd.devices import enough_memory
from pbkd.errors import ArtifactError, disk_errors_explained
from pbkd.measure import EnergyMeter
from pbkd.settings import Settings

STAGES = (
    "prepare",
    "teacher",
    "blocks",
    "activations",
    "distill",
    "stitch",
    "finetune",
    "shrink",
    "evaluate",
    "register",
)
"""In order; also CLI verbs, sections of params.yaml, Prefect tasks and DVC stages."""


@dataclass(frozen=True)
class StageContext:
    """The workspace, its parameters, and this machine's settings."""

    workspace: Workspace
    params: Params
    settings: Settings

    @classmethod
    def load(cls, workspace: Workspace, params_path: Path | None = None) -> StageContext:
        """Read parameters (default: the workspace's params.yaml) and settings.

        Raises:
            ConfigError: either is wrong.
        """
        params = load_params(params_path or workspace.params)
        if str(workspace.root) not in sys.path:  # the user's own modules lie beside params.yaml
            sys.path.insert(0, str(workspace.root))
        return cls(workspace, params, Settings.from_env())


def student_folders(workspace: Workspace, stage: str) -> list[Path]:
    """The folders of the students that a stage wrote, by name.

    Raises:
        ArtifactError: the stage has not run.
    """
    output = workspace.artifacts(stage)
    if not output.is_dir():
        raise ArtifactError(f"{output} is missing; run: pbkd {stage}")
    return subfolders(output)


def subfolders(folder: Path) -> list[Path]:
    """By name; none where the folder is missing. What a file manager leaves is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir())


class StageRecord(BaseModel):
    """Wall time and energy of a stage's last run on this machine; kept in the state folder.

    Attributes:
        started_at: seconds since 1970.
        energy_j: per counted device, idle included; null where it could not be read.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    started_at: float
    duration_s: float
    energy_j: dict[str, float | None]


def run_stage(name: str, context: StageContext) -> None:
    """Run one stage in this process.

    Raises:
        PbkdError: a user's mistake, or a failed run.
    """
    assert name in STAGES, name
    module = importlib.import_module(f"pbkd.stages.{name}")
    context.workspace.sweep()
    advice = "lower its batch size, or prepare.image_size, or end other programs"
    with (
        disk_errors_explained(),
        enough_memory(f"stage {name}", advice),
        recorded(name, context.workspace),
    ):
        module.run(context)


@contextmanager
def recorded(name: str, workspace: Workspace) -> Iterator[None]:
    """Time and energy of the block go on record if it ends well."""
    started_at = time.time()
    with energy_meter(Settings.from_env()).window(name) as window:
        yield
    record = StageRecord(
        stage=name,
        started_at=started_at,
        duration_s=window.result.duration_s,
        energy_j=window.result.energy_j,
    )
    write_json(_record_path(name, workspace), record)


def energy_meter(settings: Settings) -> EnergyMeter:
    """A meter of this machine; of nothing where other machines may do a part of the work."""
    return EnergyMeter.of_this_machine() if settings.runner == "slots" else EnergyMeter([])


def stage_records(workspace: Workspace) -> dict[str, StageRecord]:
    """The records that there are, in the order of the stages."""
    paths = {name: _record_path(name, workspace) for name in STAGES}
    return {
        name: StageRecord.model_validate(read_json(path))
        for name, path in paths.items()
        if path.is_file()
    }


def _record_path(name: str, workspace: Workspace) -> Path:
    return workspace.state / "stages" / f"{name}.json"
