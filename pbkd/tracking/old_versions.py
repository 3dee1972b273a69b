"""Which versions of a model nobody needs any more, and their deletion."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from pbkd.errors import TrackingError
from pbkd.tracking.versions import ModelVersion, read_versions


def old_versions(
    client: Any, name: str, keep: int, in_use: Collection[str] = ()
) -> list[ModelVersion]:
    """The versions that may go, oldest first.

    A version stays if an alias points to it, if it is one of the ``keep`` newest of its student, if
    it is in use, or if it is the teacher of a student that stays.

    Args:
        keep: per student, at least 1; the teacher counts as one.
        in_use: numbers of versions that stay, too.

    Raises:
        TrackingError: the registry has no model of this name, or cannot be read.
    """
    versions = read_versions(client, name)
    aliases = client.get_registered_model(name).aliases
    stays = {int(number) for number in [*aliases.values(), *in_use]}
    of_student: dict[str, list[ModelVersion]] = defaultdict(list)
    for version in versions:
        of_student[version.student].append(version)
    for newest in of_student.values():
        stays |= {version.number for version in newest[-keep:]}
    teachers = {int(v.teacher_version) for v in versions if v.number in stays and v.teacher_version}
    return [v for v in versions if v.number not in stays | teachers]


def delete_versions(client: Any, versions: Collection[ModelVersion]) -> None:
    """Delete versions, and mark the models that they alone held as deleted.

    The models' files stay until ``mlflow gc`` removes them.

    Raises:
        TrackingError: the registry refuses; what came before is deleted.
    """
    from mlflow.exceptions import MlflowException

    for version in versions:
        try:
            source = client.get_model_version(version.name, str(version.number)).source
            client.delete_model_version(version.name, str(version.number))
            if (model_id := logged_model(source)) is not None:
                client.delete_logged_model(model_id)
        except MlflowException as error:
            raise TrackingError(f"{version.uri} cannot be deleted: {error}") from None


def logged_model(source: str) -> str | None:
    """Id of the logged model that a version was made of; None where it was made of files."""
    found = re.fullmatch(r"models:/(m-\w+)", source)
    return found[1] if found else None
