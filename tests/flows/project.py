"""A workspace under DVC, driven by the same commands that a user types."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Project:
    """A workspace under DVC, and commands run in it."""

    root: Path
    environment: dict[str, str]

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [_program(command[0]), *command[1:]],
            cwd=self.root,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *command: str, expect: int | None = 0) -> str:
        """The command's output; its exit status must be as expected (None: any but 0)."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=300)
        good = process.returncode == expect if expect is not None else process.returncode != 0
        assert good, f"{command} ended with {process.returncode}:\n{output}"
        return output

    def edit(self, old: str, new: str) -> None:
        """Change params.yaml, as a user would."""
        path = self.root / "params.yaml"
        text = path.read_text()
        assert old in text, (old, text)
        path.write_text(text.replace(old, new))

    def is_clean(self) -> bool:
        return "up to date" in self.run("dvc", "status")


def _program(name: str) -> str:
    """Of this environment where it has it, else the system's."""
    own = BIN / name
    return str(own) if own.exists() else name


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
