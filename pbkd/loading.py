"""``pbkd.load``: a ready model from a folder, a file, the registry, or the present workspace."""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

from torch import nn

from pbkd.artifacts import Workspace
from pbkd.errors import ArtifactError, ConfigError, did_you_mean
from pbkd.models import Classifier, ModelCard, load_weights, read_card
from pbkd.models.checkpoint import CARD
from pbkd.settings import Settings
from pbkd.students import load_model
from pbkd.students.assemble import build_model

PACKED = ".pbkd"
"""Suffix of files of `pbkd pack`."""
_FINAL = "shrink"  # the stage whose students are finished


class Model(Classifier):
    """A finished model: float32 NCHW in [0, 1] to (N, K) logits, the normalisation inside.

    Attributes:
        class_names: of the K logits, in order.
        card: what ``model.json`` says: network, image size, replaced blocks, digests.
    """

    class_names: tuple[str, ...]
    card: ModelCard


def load(source: str | Path, *, model: nn.Module | None = None, allow_code: bool = False) -> Model:
    """Load a teacher or student, in evaluation mode on the CPU; nothing is unpickled.

    Args:
        source: a folder with ``model.json`` and ``model.safetensors`` (of `pbkd pick --export`, or
            of a stage); a file of `pbkd pack`, ``model.pbkd``; ``models:/NAME/VERSION`` or
            ``models:/NAME@ALIAS`` in the registry (MLFLOW_TRACKING_URI, or that of the workspace
            here); or the name of a student of the workspace here, or ``teacher``.
        model: the teacher's network, with any weights, where it is the user's own: instead of the
            function that builds it. It is copied.
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
    if not isinstance(source, str | Path):
        raise ConfigError(f"pbkd.load: got {source!r}, expected a path, a name or models:/...")
    if isinstance(source, str) and source.startswith("models:"):
        return _from_registry(source, model, allow_code)
    if Path(source).suffix == PACKED and not Path(source).is_dir():
        from pbkd.shrink.unpacking import load_packed, read_packed

        shrunk = load_packed(read_packed(Path(source)), model, allow_code=allow_code)
        return _finished_model(shrunk.model, shrunk.card)
    return _from_folder(find_folder(source, allow_code), model, allow_code)


def _from_registry(uri: str, net: nn.Module | None, allow_code: bool) -> Model:
    from pbkd.tracking.fetch import fetch_version, find_version, open_registry

    version = find_version(open_registry(_workspace()), uri)
    with tempfile.TemporaryDirectory(prefix="pbkd-") as temporary:
        folder = Path(temporary)
        fetch_version(version, folder)
        model = _from_folder(folder, net, allow_code)
    if model.card.digest != version.model_digest:
        raise ArtifactError(
            f"{uri} holds another model than the one that was registered (digest "
            f"{model.card.digest}, expected {version.model_digest}); delete the version, then run: "
            "pbkd register"
        )
    return model


def find_folder(source: str | Path, allow_code: bool) -> Path:
    """The folder of a model: itself, or that of a student of the workspace here.

    Raises:
        ArtifactError: there is none.
    """
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
    what = "is a file; give its folder, or a .pbkd file" if path.is_file() else "is missing"
    raise ArtifactError(f"{path} {what}; expected a folder with {CARD} and model.safetensors")


def _finished(workspace: Workspace) -> dict[str, Path]:
    """The teacher and the finished students of a workspace, by name."""
    folders = {path.name: path for path in sorted(workspace.artifacts(_FINAL).glob("*/"))}
    folders |= {"teacher": workspace.artifacts("teacher")}
    return {name: path for name, path in folders.items() if (path / CARD).is_file()}


def _workspace() -> Workspace:
    return Workspace.find(state=Settings.from_env().state_dir)


def _from_folder(folder: Path, net: nn.Module | None, allow_code: bool) -> Model:
    if net is None:
        return _finished_model(*load_model(folder, allow_code=allow_code))
    card = read_card(folder)
    own = copy.deepcopy(net.net if isinstance(net, Classifier) else net).cpu()
    built = build_model(card, own, allow_code=allow_code)
    load_weights(folder, built, card)
    return _finished_model(built, card)


def _finished_model(classifier: Classifier, card: ModelCard) -> Model:
    model = Model(classifier.net, card.mean, card.std).eval()
    model.card, model.class_names = card, card.class_names
    return model
