"""What elastic teachers are doing: a file that their pool writes once a second."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pbkd.errors import ArtifactError

FILE = "teachers.json"
"""In the state folder."""
_FRESH_S = 5.0


class TeacherStatus(BaseModel):
    """One teacher.

    Attributes:
        host, pid, device: empty, 0 and empty while it starts.
        view, chunk: what it labels; null: it waits for work.
        for_s: how long it has been doing that.
        num_images: that it has labelled.
        rate: images per second of the time in which it labelled; null: none yet.
    """

    model_config = ConfigDict(frozen=True)

    host: str = ""
    pid: int = 0
    device: str = ""
    view: int | None = None
    chunk: int | None = None
    for_s: float = 0.0
    num_images: int = 0
    rate: float | None = None


class TeachersStatus(BaseModel):
    """All of a pool.

    Attributes:
        time: of writing, seconds since 1970.
        waiting: student to the seconds for which it has had nothing to read.
        num_wanted: chunks that students want and no teacher has taken.
        last_error: why a teacher was lost, or labels could not be written, the last time.
    """

    model_config = ConfigDict(frozen=True)

    time: float
    teachers: dict[str, TeacherStatus]
    waiting: dict[str, float]
    num_wanted: int
    chunk_images: int
    last_error: str = ""

    @property
    def is_fresh(self) -> bool:
        """Whether its pool is still writing."""
        return time.time() - self.time < _FRESH_S


def read_status(path: Path) -> TeachersStatus | None:
    """The present status; None: no pool is running.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        status = TeachersStatus.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged ({error.errors()[0]['msg']}); delete it") from None
    return status if status.is_fresh else None
