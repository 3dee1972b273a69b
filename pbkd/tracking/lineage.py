"""The state of a workspace that its models come from: git's commit, DVC's lock file."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from pbkd.artifacts import Workspace

_INPUTS = ("params.yaml", "dvc.yaml", "*.py", "*.dvc")


def commit_of(workspace: Workspace) -> str:
    """The commit of the workspace, with `-dirty` where parameters, code or data differ from it.

    Outputs are no part of it: a run changes them. Empty where there is no commit.
    """
    git = ["git", "-C", str(workspace.root)]
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout  # noqa: S603  no shell
            for command in (
                ["rev-parse", "--verify", "--quiet", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", *_INPUTS],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.strip() + ("-dirty" if changes.strip() else "")


def lock_file(workspace: Workspace) -> Path | None:
    """DVC's record of all inputs and outputs by hash; None before DVC knows a finished stage."""
    path = workspace.root / "dvc.lock"
    return path if path.is_file() else None


def md5_of(path: Path) -> str:
    """MD5 of a file in hexadecimal, as DVC and `md5sum` give it."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
