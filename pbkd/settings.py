"""What must not change results: where to run and where to keep things; from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pbkd.errors import ConfigError

_PREFIX = "PBKD_"


class Settings(BaseModel):
    """Settings of this machine and user; each field is read from ``PBKD_<FIELD>``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to compute; auto takes the GPUs if there are any"
    )
    runner: Literal["slots", "ray"] = Field(
        "slots",
        description="who runs the workers: processes of this machine, or the Ray cluster that "
        "RAY_ADDRESS names (without it, Ray on this machine)",
    )
    workers: int = Field(
        0, ge=0, description="slots of the worker pool; 0: one per GPU, else one per CPU core"
    )
    job_timeout_s: float = Field(
        6 * 3600.0,
        gt=0,
        description="a job longer than this is killed, in seconds",
    )
    hang_timeout_s: float = Field(
        600.0, gt=0, description="a job without a sign of life for this long is killed, in seconds"
    )
    retries: int = Field(2, ge=0, description="times that a failed job is tried again")
    min_teachers: int = Field(1, ge=0, description="elastic teachers that are kept on Ray")
    max_teachers: int = Field(4, ge=1, description="elastic teachers on Ray at the same time")
    teacher_gpus: float = Field(0.0, ge=0, description="GPUs of an elastic teacher, or a share")
    teacher_deadline_s: float = Field(
        60.0,
        gt=0,
        description="without a label of elastic teachers for so many seconds, a student ends with "
        "an error, or goes on (finetune.without_teachers)",
    )
    state_dir: Path | None = Field(
        None, description="state folder; default: .pbkd in the workspace"
    )
    lock_dir: Path | None = Field(
        None,
        description="folder of the device locks; default: in the temporary folder",
    )
    mlflow_url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="where MLflow's pages show the local store; Prefect's pages then link to them",
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings; unknown PBKD_ names and wrong values raise ConfigError."""
        environ = os.environ if environ is None else environ
        values = {
            key.removeprefix(_PREFIX).lower(): value
            for key, value in environ.items()
            if key.startswith(_PREFIX) and value != ""
        }
        unknown = sorted(set(values) - set(cls.model_fields))
        if unknown:
            known = ", ".join(_PREFIX + name.upper() for name in cls.model_fields)
            raise ConfigError(
                f"environment: unknown setting {_PREFIX}{unknown[0].upper()}; known are {known}"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = _PREFIX + str(first["loc"][0]).upper()
            raise ConfigError(f"environment: {name}={first['input']!r}: {first['msg']}") from None
