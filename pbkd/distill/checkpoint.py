"""Checkpoints of the trainees that train: a file each, from which another process goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pbkd.artifacts import load_checkpoint, save_checkpoint, sweep
from pbkd.distill.trainee import Trainee
from pbkd.errors import ArtifactError

_log = logging.getLogger(__name__)

_CHECKPOINT_EVERY_S, _SAVING_SHARE = 30.0, 0.02
_FORMAT = 1
"""Raised whenever the same content would mean something else."""


class Checkpoints:
    """The checkpoints of one job's trainees, written every few seconds, all in one go.

    The files are named by the trainees' keys, so that a trainee goes on in whatever job the next
    plan puts it. A kill may leave some trainees' files older than those of the others.

    Args:
        folder: may be shared with other jobs; it appears with the first checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        sweep(folder)
        self._folder = folder
        self._saved_s = time.monotonic()
        self._took_s = 0.0

    def resume(self, make: Callable[[], Trainee]) -> Trainee:
        """A new trainee put where its checkpoint says; a useless checkpoint is left aside."""
        trainee = make()
        path = self._path(trainee.spec.key)
        if not path.exists():
            return trainee
        try:
            trainee.restore(_read(path, trainee))
        except Exception as error:  # noqa: BLE001 - a damaged file makes torch raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            name = trainee.spec.name
            _log.warning("checkpoint %s is of no use (%s); %s begins again", path, reason, name)
            return make()
        _log.info(
            "%s goes on in epoch %d after %d batches",
            trainee.spec.name,
            trainee.epoch,
            trainee.num_taken,
        )
        return trainee

    def save_if_due(self, trainees: Iterable[Trainee]) -> None:
        """Write them if the last ones, or the beginning, are long enough ago.

        Writing takes a small share of the time, however large the trainees are. The device is
        waited for only where they are written.
        """
        every_s = max(_CHECKPOINT_EVERY_S, self._took_s / _SAVING_SHARE)
        began_s = time.monotonic()
        if began_s - self._saved_s < every_s:
            return
        for trainee in trainees:
            _write(self._path(trainee.spec.key), trainee)
        self._saved_s = time.monotonic()
        self._took_s = self._saved_s - began_s

    def remove(self, key: str) -> None:
        """Remove a trainee's checkpoint if it has one."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.pt"


def _write(path: Path, trainee: Trainee) -> None:
    content = {"format": _FORMAT, "key": trainee.spec.key, "trainee": trainee.snapshot()}
    save_checkpoint(path, content)


def _read(path: Path, trainee: Trainee) -> dict[str, Any]:
    content = load_checkpoint(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ArtifactError("it has another format")
    if content["key"] != trainee.spec.key:
        raise ArtifactError(f"it is of trainee {content['key']}")
    found: dict[str, Any] = content["trainee"]
    return found
