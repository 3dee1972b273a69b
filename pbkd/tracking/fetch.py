"""A registry that is only read: where it is, a version by its URI, and the version's own files.

Nothing is unpickled: what is fetched are ``model.json`` and ``model.safetensors``.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pbkd.artifacts import Workspace, file_digest
from pbkd.errors import ArtifactError, ConfigError, TrackingError
from pbkd.models.checkpoint import CARD, WEIGHTS
from pbkd.shrink import FILE
from pbkd.tracking.mlflow_run import mlflow_client
from pbkd.tracking.versions import ModelVersion, read_versions

_FILES = "extra_files"  # MLflow's name for the folder of files beside a model
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<number>\d+)|@(?P<alias>[^/@]+))")


def open_registry(workspace: Workspace) -> Any:
    """A client of the registry that is there: MLFLOW_TRACKING_URI, or the workspace's own.

    Raises:
        TrackingError: neither exists, or it does not answer.
    """
    if os.environ.get("MLFLOW_TRACKING_URI"):
        # with a store elsewhere, no state folder is made in whatever folder this is
        return mlflow_client(Workspace(workspace.root, workspace.root))
    if not (workspace.state / "mlflow.db").is_file():
        raise TrackingError(
            f"there is no registry in {workspace.state}; run: pbkd register, or go to a workspace, "
            "or set MLFLOW_TRACKING_URI"
        )
    return mlflow_client(workspace)


def find_version(client: Any, uri: str) -> ModelVersion:
    """The version that ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS`` names.

    Raises:
        ConfigError: another kind of URI. TrackingError: no such model, version or alias.
    """
    found = _URI.fullmatch(uri)
    if found is None:
        raise ConfigError(f"got `{uri}`, expected models:/NAME/VERSION or models:/NAME@ALIAS")
    name, number, alias = found["name"], found["number"], found["alias"]
    versions = {version.number: version for version in read_versions(client, name)}
    if alias is not None:
        aliases = client.get_registered_model(name).aliases
        if alias not in aliases:
            known = f"it has {', '.join(f'@{known}' for known in sorted(aliases))}"
            known = known if aliases else "it has none"
            raise TrackingError(f"{name} has no alias `{alias}`; {known}")
        number = aliases[alias]
    if int(number) not in versions:
        numbers = ", ".join(map(str, versions)) or "none"
        raise TrackingError(
            f"{name} has no version {number} that pbkd registered; such are {numbers}"
        )
    return versions[int(number)]


def fetch_version(version: ModelVersion, folder: Path) -> None:
    """Copy a version's ``model.json``, ``model.safetensors`` and `model.pbkd`, if any, to a folder.

    Raises:
        TrackingError: the registry cannot give them. ArtifactError: they are damaged.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="pbkd-") as temporary:
        try:
            source = mlflow.artifacts.download_artifacts(
                f"{version.uri}/{_FILES}", dst_path=temporary
            )
            for file in (CARD, WEIGHTS):
                shutil.copyfile(Path(source) / file, folder / file)
            if (Path(source) / FILE).is_file():
                shutil.copyfile(Path(source) / FILE, folder / FILE)
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"the files of {version.uri} cannot be read: {error}; was the folder moved or "
                "emptied in which the registry keeps them? register again: delete the version, "
                "then run: pbkd register"
            ) from None
    if version.weights_digest and file_digest(folder / WEIGHTS) != version.weights_digest:
        raise ArtifactError(
            f"{WEIGHTS} of {version.uri} is not what was registered: damaged, or changed; delete "
            "the version, then run: pbkd register"
        )
