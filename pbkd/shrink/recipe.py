"""A recipe, step by step; a finished step is an item of the store, and is not done twice."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pbkd.artifacts import Store, digest_of, link_tree, read_json, write_json
from pbkd.config import CodeStep, StepConfig
from pbkd.models.checkpoint import CARD, WEIGHTS
from pbkd.shrink import channels, lowrank, prune, quantize
from pbkd.shrink.container import pack
from pbkd.shrink.figures import StepFigures, sizes
from pbkd.shrink.state import Shrunk
from pbkd.shrink.training import Trainer

_log = logging.getLogger(__name__)

SHRUNK = "shrunk"
"""Kind of the store's items."""
RECORD = "shrink.json"
FILE = "model.pbkd"
_STRUCTURES = "steps"
"""Folder of the models before a step changed their structure, by the number of their own step."""
_STRUCTURAL = ("prune_channels", "low_rank")

_ALGORITHMS = {"prune": 3, "prune_channels": 2, "low_rank": 3, "quantize": 3, "code": 1}
"""Raised whenever the same settings would give another student, or old checkpoints do not fit."""


class ShrinkRecord(BaseModel):
    """What ``shrink.json`` says: the student as it came, then after each step; empty for none."""

    model_config = ConfigDict(frozen=True)

    steps: tuple[StepFigures, ...] = ()


def step_keys(student: str, teacher: str, steps: Sequence[StepConfig], seed: int) -> list[str]:
    """Keys of the students before the first step and after each, given both models' digests."""
    # where no step follows, the record holds no figures
    keys = [digest_of({"student": student, "is_measured": bool(steps)})]
    for step in steps:
        entry = {
            "before": keys[-1],
            "step": step.model_dump(mode="json"),
            "algorithm": _ALGORITHMS[step.method],
            "teacher": teacher,
            "seed": seed,
        }
        keys.append(digest_of(entry))
    return keys


def run_recipe(
    source: Path,
    steps: Sequence[StepConfig],
    keys: Sequence[str],
    store: Store,
    trainer_of: Callable[[str], Trainer],
) -> None:
    """Take a student through the steps that the store lacks; the last item is the finished one.

    Args:
        source: folder of the student as it came.
        keys: of ``step_keys``.
        trainer_of: a step's key to its trainer.

    Raises:
        PbkdError: a step cannot be taken; earlier ones are kept.
    """
    if not store.has(SHRUNK, keys[0]):
        _begin(source, keys[0], store, trainer_of, measured=bool(steps))
    packed: bytes | None = None  # of the step before, where it was taken just now
    for step, before, key in zip(steps, keys, keys[1:], strict=False):
        if store.has(SHRUNK, key):
            packed = None
        else:
            trainer = trainer_of(key)
            packed = _take(step, store.path(SHRUNK, before), key, store, trainer, packed)


def read_record(folder: Path) -> ShrinkRecord:
    """Read ``shrink.json``; ArtifactError where it is missing."""
    return ShrinkRecord.model_validate(read_json(folder / RECORD))


def structures(folder: Path) -> dict[int, Path]:
    """Number of a step to the model after it, for every structure that a later step changed.

    The finished student has the structure of all steps after the last of these.
    """
    return {int(path.name): path for path in (folder / _STRUCTURES).glob("*")}


def settings_text(step: StepConfig) -> str:
    """A step's settings that are not the defaults, as in params.yaml; training by its epochs."""
    given: dict[str, Any] = step.model_dump(
        mode="json", exclude={"method", "tune"}, exclude_none=True, exclude_defaults=True
    )
    if not isinstance(step, CodeStep) and step.tune.epochs:
        given["epochs"] = step.tune.epochs
    return ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in given.items()
    )


def _begin(
    source: Path,
    key: str,
    store: Store,
    trainer_of: Callable[[str], Trainer],
    *,
    measured: bool,
) -> None:
    """The student as it came, as an item; with figures where steps follow."""
    shrunk = Shrunk.load(source, allow_code=True)

    def write(folder: Path) -> None:
        own = shrunk.save(folder)
        steps = []
        if measured:
            trainer, began_s = trainer_of(key), time.monotonic()
            steps.append(_figures(own, pack(own), "start", "", trainer, began_s, epochs=0))
        write_json(folder / RECORD, ShrinkRecord(steps=tuple(steps)))

    store.put(SHRUNK, key, write)


def _take(
    step: StepConfig, before: Path, key: str, store: Store, trainer: Trainer, packed: bytes | None
) -> bytes:
    """Take one step; ``packed``: the student before it. Returns the student packed after it."""
    began_s = time.monotonic()
    earlier = read_record(before)
    shrunk = Shrunk.load(before, allow_code=True)
    if step.method == "prune":
        shrunk = prune.apply(shrunk, step, trainer)
    elif step.method == "prune_channels":
        shrunk = channels.apply(shrunk, step, trainer)
    elif step.method == "low_rank":
        shrunk = lowrank.apply(shrunk, step, trainer)
    elif step.method == "quantize":
        shrunk = quantize.apply(shrunk, step, trainer)

    def write(folder: Path) -> None:
        nonlocal packed
        own = shrunk.save(folder)
        if step.method == "code":  # the same student, now as a file
            packed = packed or pack(own)
            (folder / FILE).write_bytes(packed)
        else:
            packed = pack(own)
        epochs = 0 if step.method == "code" else step.tune.epochs
        figures = _figures(own, packed, step.method, settings_text(step), trainer, began_s, epochs)
        write_json(folder / RECORD, ShrinkRecord(steps=(*earlier.steps, figures)))
        changed = len(earlier.steps) - 1 if step.method in _STRUCTURAL else None
        _keep_structures(before, folder, changed)
        for path in before.glob("*.jsonl"):
            shutil.copy(path, folder)
        for path in trainer.folder.glob("*.jsonl"):
            shutil.copy(path, folder / f"{len(earlier.steps)}-{step.method}-{path.name}")
        _log.info(
            "%s: %s bytes coded, %.2f bits per weight, validation accuracy %.4f",
            " ".join(filter(None, (step.method, settings_text(step)))),
            f"{figures.file_bytes:,}",
            figures.bits_per_weight,
            figures.val_accuracy,
        )

    store.put(SHRUNK, key, write)
    shutil.rmtree(trainer.folder, ignore_errors=True)
    assert packed is not None
    return packed


def _keep_structures(before: Path, folder: Path, changed: int | None) -> None:
    """What ``structures`` finds; ``changed``: number of the step before, if this is one of them."""
    if (before / _STRUCTURES).is_dir():
        link_tree(before / _STRUCTURES, folder / _STRUCTURES)
    if changed is not None:
        kept = folder / _STRUCTURES / str(changed)
        kept.mkdir(parents=True)
        for name in (CARD, WEIGHTS):
            shutil.copy(before / name, kept)


def _figures(
    shrunk: Shrunk,
    packed: bytes,
    method: str,
    settings: str,
    trainer: Trainer,
    began_s: float,
    epochs: int,
) -> StepFigures:
    accuracy = trainer.accuracy(shrunk.model)
    return StepFigures(
        method=method,
        settings=settings,
        val_accuracy=accuracy,
        epochs=epochs,
        duration_s=time.monotonic() - began_s,
        **sizes(shrunk.model, shrunk.card, len(packed)),
    )
