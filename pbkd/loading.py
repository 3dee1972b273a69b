"""``pbkd.load``: a ready model from a folder, the registry, or the present workspace."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pbkd.artifacts import Workspace
from pbkd.errors import ArtifactError, did_you_mean
from pbkd.models import Classifier, ModelCard
from pbkd.models.checkpoint import CARD
from pbkd.settings import Settings
from pbkd.students import load_model

_FINAL = "shrink"  # the stage whose students are finished


class Model(Classifier):
    """A finished model: float32 NCHW in [0, 1] to (N, K) logits, the normalisation inside.

    Attributes:
        class_names: of the K logits, in order.
        card: what ``model.json`` says: network, image size, replaced blocks, digests.
    """

    class_names: tuple[str, ...]
    card: ModelCard


def load(source: str | Path, *, allow_code: bool = False) -> Model:
    """Load a teacher or student, in evaluation mode on the CPU; nothing is unpickled.

    Args:
        source: a folder with ``model.json`` and ``model.safetensors`` (of `pbkd pick --export`, or
            of a stage); ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS`` in the registry
            (MLFLOW_TRACKING_URI, or that of the workspace here); or the name of a student of the
            workspace here, or ``teacher``.
        allow_code: whether the function that builds a network of the user's own may be imported.

    Raises:
        ArtifactError: nothing is there, or it is damaged.
        ConfigError: a ``models:`` URI that cannot be read.
        TeacherError: the network is the user's own, and ``allow_code`` is not set.
        TrackingError: the registry, the model or the version is not there.
        MissingExtraError: MLflow is not installed, and the source is in a registry.

    Example:
        ``logits = pbkd.load("exported")(images)``
    """
    if isinstance(source, str) and source.startswith("models:"):
        return _from_registry(source, allow_code)
    return _from_folder(_folder(source, allow_code), allow_code)


def _from_registry(uri: str, allow_code: bool) -> Model:
    from pbkd.tracking.fetch import fetch_version, find_version, open_registry

    version = find_version(open_registry(_workspace()), uri)
    with tempfile.TemporaryDirectory(prefix="pbkd-") as temporary:
        folder = Path(temporary)
        fetch_version(version, folder)
        model = _from_folder(folder, allow_code)
    if model.card.digest != version.model_digest:
        raise ArtifactError(
            f"{uri} holds another model than the one that was registered (digest "
            f"{model.card.digest}, expected {version.model_digest}); delete the version, then run: "
            "pbkd register"
        )
    return model


def _folder(source: str | Path, allow_code: bool) -> Path:
    path = Path(source)
    if (path / CARD).is_file():
        return path
    if isinstance(source, str) and "/" not in source:
        workspace = _workspace()
        folders = _finished(workspace)
        if source in folders:
            if allow_code and str(workspace.root) not in sys.path:
                sys.path.insert(0, str(workspace.root))  # the user's own modules lie there
            return folders[source]
        if not path.exists():
            known = f"known here are {', '.join(folders)}" if folders else "no student is here"
            raise ArtifactError(
                f"`{source}` is neither a folder nor a student of {workspace.root}; "
                f"{did_you_mean(source, folders, known)}"
            )
    if path.is_dir():
        raise ArtifactError(f"{path} has no {CARD}; expected a folder of `pbkd pick --export`")
    what = "is a file; give its folder" if path.is_file() else "is missing"
    raise ArtifactError(f"{path} {what}; expected a folder with {CARD} and model.safetensors")


def _finished(workspace: Workspace) -> dict[str, Path]:
    """The teacher and the finished students of a workspace, by name."""
    folders = {path.name: path for path in sorted(workspace.artifacts(_FINAL).glob("*/"))}
    folders |= {"teacher": workspace.artifacts("teacher")}
    return {name: path for name, path in folders.items() if (path / CARD).is_file()}


def _workspace() -> Workspace:
    return Workspace.find(state=Settings.from_env().state_dir)


def _from_folder(folder: Path, allow_code: bool) -> Model:
    classifier, card = load_model(folder, allow_code=allow_code)
    model = Model(classifier.net, card.mean, card.std).eval()
    model.card, model.class_names = card, card.class_names
    return model
