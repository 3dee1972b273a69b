"""``pbkd init``: a workspace of one's own, with git and DVC set up and the images tracked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

from pbkd.config import load_params
from pbkd.errors import ArtifactError, ConfigError, DataError, MissingExtraError

PRESETS = ("digits", "cifar10-vgg16", "cifar10-resnet20", "image-folder")

_GIT_IGNORE = """\
/.pbkd/
/artifacts/
/data/prepared/
/exported/
__pycache__/
"""
_DVC_IGNORE = """\
# the state folder outlives outputs and is none of DVC's business
.pbkd/
.venv/
"""
_RAW_README = "The digits come with scikit-learn; images of your own would lie here.\n"
_DVC_CONFIG = """\
[core]
    analytics = false
    check_update = false
[cache]
    type = "hardlink,symlink"
"""


def init_workspace(folder: Path, preset: str, data: Path | None = None) -> Path:
    """Make a workspace.

    Args:
        folder: made where it is missing; must hold none of a workspace's files.
        preset: one of ``PRESETS``.
        data: a folder or archive of images; copied to data/raw and tracked by DVC.

    Returns:
        The workspace's params.yaml.

    Raises:
        ConfigError: unknown preset, or a preset that has its own images with ``data``.
        ArtifactError: the folder holds a workspace already, or git or DVC failed.
        DataError: ``data`` does not exist.
        MissingExtraError: DVC is not installed.
    """
    if preset not in PRESETS:
        raise ConfigError(f"--preset: got `{preset}`, expected one of {', '.join(PRESETS)}")
    if data is not None and preset == "digits":
        raise ConfigError(
            "--data: the preset digits brings its own images; take image-folder or a cifar10 preset"
        )
    if data is not None and not data.exists():
        raise DataError(f"--data: {data} does not exist; expected a folder, .tar.gz or .zip")
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; name a folder for the workspace")
    if data is not None and folder.is_relative_to(data.resolve()):
        raise DataError(f"--data: {data} holds the workspace itself; choose another folder")
    for name in ("params.yaml", "dvc.yaml"):
        if (folder / name).exists():
            raise ArtifactError(f"{folder} has a {name} already; choose another folder")
    (folder / "data" / "raw").mkdir(parents=True, exist_ok=True)
    _git_and_dvc(folder)
    params = _preset_file(f"{preset}.yaml")
    if preset == "digits":  # an empty folder would be missing in a clone
        _write_new(folder / "data" / "raw" / "README.md", _RAW_README)
    if data is not None:
        # quoted: names may hold # or :
        path = json.dumps(_track(folder, data), ensure_ascii=False)
        params = params.replace("path: data/raw ", f"path: {path} ", 1)
    (folder / "params.yaml").write_text(params)
    load_params(folder / "params.yaml")
    # under another name in the package: in this repository DVC would take it for a pipeline
    _write_new(folder / "dvc.yaml", _preset_file("pipeline.yaml"))
    _write_new(folder / "README.md", _preset_file("README.md"))
    _write_new(folder / ".gitignore", _GIT_IGNORE)
    return folder / "params.yaml"


def _preset_file(name: str) -> str:
    return resources.files("pbkd.presets").joinpath(name).read_text()


def _write_new(path: Path, text: str) -> None:
    """Write a file, or add to one that is there what it lacks."""
    old = path.read_text() if path.is_file() else ""
    if path.name in (".gitignore", ".dvcignore"):
        lines = old.splitlines()
        text = (
            "\n".join([*lines, *(line for line in text.splitlines() if line not in lines)]) + "\n"
        )
    elif old:
        return
    path.write_text(text)


def _git_and_dvc(folder: Path) -> None:
    in_git = _succeeds(["git", "rev-parse", "--is-inside-work-tree"], folder)
    if not in_git:
        _run(["git", "init", "--quiet"], folder)
    if not (folder / ".dvc").is_dir():
        at_root = (folder / ".git").exists()
        _dvc(folder, "init", "--quiet", *([] if at_root else ["--subdir"]))
        (folder / ".dvc" / "config").write_text(_DVC_CONFIG)
    _write_new(folder / ".dvcignore", _DVC_IGNORE)


def _track(folder: Path, data: Path) -> str:
    """Bring the images into data/raw, tracked by DVC; returns their path in the workspace."""
    # of a link to a file, the name counts: its target may lack the ending
    data = data.parent.resolve() / data.name if data.is_file() else data.resolve()
    if data.is_relative_to(folder):
        target = data.relative_to(folder).as_posix()
        _dvc(folder, "add", "--quiet", target)
        return target
    raw = folder / "data" / "raw"
    if data.is_file():
        target = f"data/raw/{data.name}"
    else:
        target = "data/raw"
        if any(raw.iterdir()):
            raise ArtifactError(f"{raw} is not empty; move its files, or leave --data away")
        raw.rmdir()
    size = data.stat().st_size if data.is_file() else _folder_bytes(data)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ArtifactError(
            f"--data: {size:,} bytes do not fit into {folder}, which has {free:,} free; choose a "
            "folder on another disk"
        )
    _dvc(folder, "add", "--quiet", "--out", target, str(data.resolve()))
    return target


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _dvc(folder: Path, *arguments: str) -> None:
    try:
        _run([sys.executable, "-m", "dvc", *arguments], folder)
    except ArtifactError as error:
        if "No module named dvc" in str(error):
            raise MissingExtraError("dvc", "pipeline", "pbkd init") from None
        raise


def _succeeds(command: list[str], folder: Path) -> bool:
    try:
        _run(command, folder)
    except ArtifactError:
        return False
    return True


def _run(command: list[str], folder: Path) -> None:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    try:
        subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise ArtifactError(f"`{command[0]}` is not installed; install it and try again") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip()
        raise ArtifactError(f"`{' '.join(command)}` in {folder} failed: {said}") from None
