"""Faults of whole runs on Ray: a worker in the middle of a block, a student, the flow itself.

Programs run as users start them, with two workers on Ray. What is killed goes on, or is started
again as a user would; then the weights must be those of a run that nobody disturbed, bit for bit.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
from kept import Keep
from programs import processes_of, run, seconds_until_gone, start, wait_for
from workspaces import make_workspace

_PARAMS = {
    "prepare": {"image_size": 8},
    "teacher": {"width": 0.25, "epochs": 2, "min_accuracy": 0.0},
    "activations": {"source": "relay"},
    "distill": {"epochs": 30, "patience": 100},
    "stitch": {"students": {"half": {"max_parameters": 0.6}}, "max_damage": 5.0},
    "finetune": {"epochs": 20, "patience": 100, "views": 20, "teachers": "elastic"},
    "shrink": {"recipe": []},
    "evaluate": {"latency_batch_sizes": [1], "latency_seconds": 0.05, "runtimes": ["pytorch"]},
    "register": {"name": "faults"},
}
_ON_RAY = {"PBKD_RUNNER": "ray", "PBKD_MAX_TEACHERS": "1"}
_WORKER = "RemoteWorker.run"  # in the command line of a worker on Ray that has a job


@dataclass
class Outcome:
    """What one kind of fault did.

    Attributes:
        wrong: runs with other weights than those of the undisturbed one.
        lost_s: how much longer each took; a second start is part of it.
        left: processes that were there a minute later.
    """

    undisturbed_s: float
    wrong: int = 0
    lost_s: list[float] = field(default_factory=list)
    left: int = 0


def run_faults(times: int, keep: Keep) -> dict[str, Outcome]:
    """Every fault so many times."""
    outcomes = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        @cache
        def base() -> Path:
            make_workspace(folder / "base", _PARAMS)
            run(folder / "base", "dvc repro activations")
            return folder / "base"

        @cache
        def blocks() -> _Case:
            return _Case(base(), "pbkd distill", "trainees", folder)

        @cache
        def students() -> _Case:
            run(base(), "dvc repro stitch")
            return _Case(base(), "pbkd run", "finetuned", folder)

        for name, case, kill in (
            ("SIGKILL of a worker in mid-block", blocks, _kill_worker),
            ("SIGKILL of the flow in mid-block", blocks, _kill_flow),
            ("SIGKILL of a student in mid-epoch", students, _kill_worker),
        ):
            outcomes[name] = Outcome(**keep(name, partial(_measured, case, kill, times)))
    return outcomes


def _measured(
    case: Callable[[], _Case], kill: Callable[[psutil.Process], None], times: int
) -> dict[str, Any]:
    return vars(case().faults(times, kill))


class _Case:
    """A program, begun again and again from copies of one workspace.

    Args:
        kind: of the store's items that it makes, and that are compared.
    """

    def __init__(self, base: Path, command: str, kind: str, folder: Path) -> None:
        self._base, self._command, self._kind, self._folder = base, command, kind, folder
        root = self._copy()
        began_s = time.monotonic()
        run(root, command, **_ON_RAY)
        self._undisturbed_s = time.monotonic() - began_s
        self._expected = self._weights(root)
        shutil.rmtree(root)

    def faults(self, times: int, kill: Callable[[psutil.Process], None]) -> Outcome:
        """Kill so many runs in the middle."""
        outcome = Outcome(self._undisturbed_s)
        for _ in range(times):
            root = self._copy()
            began_s = time.monotonic()
            process = start(root, self._command, **_ON_RAY)
            while not self._is_at_work(root):
                if process.poll() is not None:
                    wait_for(root, process)
                    raise RuntimeError(f"{self._command} ended before it could be killed")
                time.sleep(0.05)
            kill(psutil.Process(process.pid))
            if kill is _kill_flow:
                process.wait()
                seconds_until_gone(root)
                run(root, self._command, **_ON_RAY)
            else:
                wait_for(root, process)
            outcome.lost_s.append(time.monotonic() - began_s - self._undisturbed_s)
            outcome.wrong += self._weights(root) != self._expected
            seconds_until_gone(root)
            outcome.left += len(list(processes_of(root)))
            shutil.rmtree(root)
        return outcome

    def _copy(self) -> Path:
        """At the same path each time: what a workspace holds may name it."""
        root = self._folder / "workspace"
        shutil.copytree(self._base, root, symlinks=True)
        return root

    def _is_at_work(self, root: Path) -> bool:
        """Whether something of this kind is in training, some epochs on."""
        histories = (root / ".pbkd" / "progress").glob("*.jsonl")
        begun = {path.stem for path in histories if path.read_text().count("\n") >= 3}
        earlier = {path.stem for path in (self._base / ".pbkd" / "progress").glob("*.jsonl")}
        return bool(begun - earlier - set(self._weights(root)))

    def _weights(self, root: Path) -> dict[str, bytes]:
        """The weights of every finished item."""
        found = (root / ".pbkd" / "store" / self._kind).glob("[!.]*/*.safetensors")
        return {path.parent.name: path.read_bytes() for path in found}


def _kill_worker(flow: psutil.Process) -> None:
    next(_workers(flow)).kill()


def _kill_flow(flow: psutil.Process) -> None:
    flow.kill()


def _workers(flow: psutil.Process) -> Iterator[psutil.Process]:
    for process in flow.children(recursive=True):
        with suppress(psutil.Error):
            if _WORKER in " ".join(process.cmdline()):
                yield process
