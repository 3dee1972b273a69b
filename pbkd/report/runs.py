"""Finished runs by name: a folder, a git revision, or an experiment of DVC."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from pbkd.config import Params, load_params
from pbkd.errors import ArtifactError, ConfigError
from pbkd.report.results import MEASURED, METRICS, Measured, Metrics, read_measured, read_metrics

_PARAMS = "params.yaml"
_Figures = TypeVar("_Figures")


@dataclass(frozen=True)
class Run:
    """What a finished run left behind.

    Attributes:
        name: as the user gave it.
        params: None where it has no params.yaml, or one of another version.
    """

    name: str
    metrics: Metrics
    measured: Measured
    params: Params | None


def read_run(name: str, root: Path) -> Run:
    """Read a run's figures.

    Args:
        name: a workspace, a folder with ``metrics.json`` and ``measured.json``, or else what git or
            DVC know in the workspace at ``root``: a commit, a branch, a tag, an experiment.
        root: the present workspace.

    Raises:
        ConfigError: there is no such run.
        ArtifactError: its files are missing or not pbkd's.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _of_folder(name, folder)
    revision = _revision(name, root)
    if revision is None:
        raise ConfigError(
            f"run {name}: neither a folder, nor a revision of git or an experiment of DVC here; "
            "git branch and dvc exp show list them"
        )
    with tempfile.TemporaryDirectory() as made:
        _check_out(revision, root, Path(made))
        return _of_folder(name, Path(made))


def _of_folder(name: str, folder: Path) -> Run:
    results = folder / "results" if (folder / "results" / METRICS).is_file() else folder
    metrics = _checked(name, read_metrics, results)
    measured = _checked(name, read_measured, results)
    params = None
    for found in (folder / _PARAMS, folder.parent / _PARAMS):
        if found.is_file():
            try:
                params = load_params(found)
            except ConfigError:
                params = None  # of another version; the figures can be compared
            break
    return Run(name, metrics, measured, params)


def _checked(name: str, read: Callable[[Path], _Figures], results: Path) -> _Figures:
    try:
        return read(results)
    except ValidationError:
        raise ArtifactError(f"run {name}: its results were not written by pbkd") from None
    except ArtifactError as error:
        raise ArtifactError(f"run {name}: {error}") from None


def _revision(name: str, root: Path) -> str | None:
    """The commit of a name; DVC keeps experiments as refs/exps/xx/xxx/NAME."""
    if name.startswith("-"):
        return None
    if direct := _git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"):
        return direct.strip()
    listed = _git(root, "for-each-ref", "--sort=-creatordate", "--format=%(refname)", "refs/exps")
    for ref in (listed or "").splitlines():
        if ref.rsplit("/", 1)[-1] == name:
            return (_git(root, "rev-parse", ref) or "").strip()
    return None


def _check_out(revision: str, root: Path, folder: Path) -> None:
    """Write the run's files as that commit has them; what it lacks is left out."""
    for path in (Path("results") / METRICS, Path("results") / MEASURED, Path(_PARAMS)):
        text = _git(root, "show", f"{revision}:./{path.as_posix()}")
        if text is not None:
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text)


def _git(root: Path, *command: str) -> str | None:
    """What git prints; None where it fails or is not there."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "-C", str(root), *command], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None
