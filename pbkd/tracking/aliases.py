"""Which version an alias points to: `champion`, and `best-NAME` per student.

Both rules look at the validation split and at the tags of the versions alone, so that any process
that asks gets the same answer. docs/registry.md states them for users.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pbkd.tracking.versions import TEACHER, all_versions

CHAMPION = "champion"
_BEST = "best-"


def alias_of(student: str) -> str:
    """The alias of a student's best version; MLflow allows letters, digits, `_` and `-`."""
    return _BEST + student.replace(".", "_")


def is_ours(alias: str) -> bool:
    """Whether `register` moves this alias, so that nobody else should."""
    return alias == CHAMPION or alias.startswith(_BEST)


def move_aliases(
    client: Any,
    name: str,
    data_digest: str,
    limits: Mapping[str, Mapping[str, float]],
    max_accuracy_drop: float,
) -> str | None:
    """Let each alias point to the version that its rule names; where there is none it stays.

    Args:
        limits: student to the limits under which it was registered now.

    Returns:
        The champion's version, or None where no student of this data is accurate enough.
    """
    versions = [
        version
        for version in all_versions(client, name)
        if version.tags.get("pbkd.data_digest") == data_digest
        and version.tags.get("pbkd.budget") not in (None, TEACHER)
    ]
    wanted = {alias_of(student): _best(versions, student, limits[student]) for student in limits}
    champion = _champion(versions, max_accuracy_drop)
    for alias, number in {**wanted, CHAMPION: champion}.items():
        if number is not None:
            client.set_registered_model_alias(name, alias, number)
    return champion


def _champion(versions: Iterable[Any], max_accuracy_drop: float) -> str | None:
    """The smallest file that is accurate enough; of equal ones the more accurate, or the first."""
    ranks = {
        str(version.version): (_figure(version, "file_bytes"), -accuracy, int(version.version))
        for version in versions
        if (accuracy := _figure(version, "val_accuracy"))  # which may be no number
        >= _figure(version, "teacher_val_accuracy") - max_accuracy_drop
    }
    return min(ranks, key=ranks.__getitem__, default=None)


def _best(versions: Iterable[Any], student: str, limits: Mapping[str, float]) -> str | None:
    """The most accurate version under these limits; of equal ones the smallest, then the first."""
    ranks = {
        str(version.version): (-accuracy, _figure(version, "file_bytes"), int(version.version))
        for version in versions
        if version.tags["pbkd.budget"] == student
        and json.loads(version.tags.get("pbkd.limits", "{}")) == limits
        and (accuracy := _figure(version, "val_accuracy")) >= 0
    }
    return min(ranks, key=ranks.__getitem__, default=None)


def _figure(version: Any, name: str) -> float:
    return float(version.tags[f"pbkd.{name}"])
