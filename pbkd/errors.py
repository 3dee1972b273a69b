"""The one error tree. A message says what, got, expected, and the next step.

PbkdError
├── ConfigError        params.yaml or the environment is wrong
├── DataError          images, labels or splits are wrong
├── TeacherError       the teacher cannot be built, loaded or is too weak
├── BlockError         a selector or a block cannot be used
├── CandidateError     a candidate does not fit its block
├── BudgetError        no student keeps to the limits that were asked for
├── ShrinkError        a step of a recipe does not suit the student
├── ArtifactError      a file is missing, truncated or of another run
├── TrainingError      training went wrong (NaN, out of memory)
├── JobError           a worker's job crashed, hung or failed
│   ├── JobFailedError  a job raised what is no error of ours; it would raise it again
│   └── PoolClosedError the run is ending, no job is tried again
├── WorkspaceBusyError another process holds the workspace or a device
├── ExportError        a model cannot be exported, or its file computes something else
├── TrackingError      MLflow refused
└── MissingExtraError  an optional library is not installed
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pbkd.redaction import without_secrets


class PbkdError(Exception):
    """Base of every error that pbkd raises for a user's mistake or a failed run.

    Its message holds no passwords, even where it quotes a server's or a library's own words.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


class ConfigError(PbkdError):
    """params.yaml, a setting or an argument is wrong."""


class DataError(PbkdError):
    """Images, labels or splits are missing or wrong."""


class TeacherError(PbkdError):
    """The teacher cannot be built or loaded, or is below its accuracy floor."""


class BlockError(PbkdError):
    """A selector matches nothing, or a block cannot be replaced."""


class CandidateError(PbkdError):
    """A candidate does not fit its block."""


class BudgetError(PbkdError):
    """No choice of candidates keeps to a student's limits."""


class ShrinkError(PbkdError):
    """A step of a recipe cannot be taken with this student."""


class ArtifactError(PbkdError):
    """A file is missing, truncated, or belongs to another run."""


class TrainingError(PbkdError):
    """Training diverged or could not go on."""


class JobError(PbkdError):
    """A worker's job crashed, hung or failed."""


class JobFailedError(JobError):
    """A job raised what is no error of ours; it would raise it again."""


class PoolClosedError(JobError):
    """The worker pool is closed: the run is ending, and no job is tried again."""


class WorkspaceBusyError(PbkdError):
    """Another process holds the workspace."""


class ExportError(PbkdError):
    """A model cannot be exported, or the file does not compute what the model does."""


class TrackingError(PbkdError):
    """The tracking server or the registry refused."""


class MissingExtraError(PbkdError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed; run: pip install 'pbkd[{extra}]'"
        )


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a message about an unknown name: the nearest known one, or ``otherwise``."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean `{nearest[0]}`?" if nearest else otherwise


# ---------------------------------------------------------------- what the system refuses

DISK_FULL_ADVICE = (
    "free some space: `pbkd gc` empties the store, `activations.source: relay` needs no cache"
)
_ADVICE = {
    errno.ENOSPC: DISK_FULL_ADVICE,
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EACCES: "change its owner or mode, or take another folder",
    errno.EPERM: "change its owner or mode, or take another folder",
    errno.EROFS: "take a folder that can be written to; PBKD_STATE_DIR moves the state",
}


@contextmanager
def disk_errors_explained() -> Iterator[None]:
    """Turn a full disk and a missing permission into ArtifactError with what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0)
        if advice is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise ArtifactError(f"{where}{error.strerror}; {advice}") from error
