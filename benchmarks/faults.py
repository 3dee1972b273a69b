"""Elastic teachers under faults: is every label there, once and right, and how soon again?

A student reads three epochs of labels of a small teacher (digits) from teachers on Ray, while
something is killed or stopped in the second chunk of each epoch. Every label is compared with the
teacher's own. Recovery is the time from the fault to the next new label, the start of a new
teacher included.

- teacher: SIGKILL of a teacher in mid-batch, another one goes on;
- all teachers: SIGKILL of all of them;
- stopped teacher: SIGSTOP of one, for 30 s or until it is replaced;
- board: the actor that teachers and students meet at is killed;
- student: it is dropped in mid-epoch, and a new one reads the epoch from its beginning;
- damaged file: a chunk's labels are cut in half before they are read.

    .venv/bin/python benchmarks/faults.py --repeat 3
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from workspaces import make_workspace, run_stages

from pbkd.data import Stream
from pbkd.elastic.actors import RayBoard, connect, ray_module
from pbkd.elastic.chunks import LabelPlan
from pbkd.elastic.pool import PoolSize, TeacherPool
from pbkd.elastic.stream import LabelStream
from pbkd.stages.teacher import read_teacher

_BATCH, _CHUNK, _EPOCHS, _DEADLINE_S = 64, 64, 3, 120.0
_MAX_S = 30.0  # of recovery, beyond the start of a teacher


class Case:
    """A trained teacher and its images."""

    def __init__(self, folder: Path) -> None:
        self.workspace = make_workspace(
            folder / "workspace", {"teacher": {"epochs": 2, "min_accuracy": 0.0}}
        )
        run_stages(self.workspace, "prepare", "teacher")
        self.teacher, self.card, prepared = read_teacher(self.workspace)
        self.teacher.eval()
        self.split = prepared.split("train")
        self.folder = folder
        self._numbers = itertools.count()

    def plan(self) -> LabelPlan:
        """Views that nobody has labelled."""
        number = next(self._numbers)
        return LabelPlan(
            keys=tuple(f"faults-{number}-{view}" for view in range(_EPOCHS)),
            teacher=self.workspace.artifacts("teacher"),
            prepared=self.workspace.prepared,
            seed=0,
            top=None,
            temperature=4.0,
            store=self.workspace.store.root,
            folder=self.workspace.state / "labels",
            num_images=len(self.split),
            chunk=_CHUNK,
        )


class Reader:
    """A student that reads and compares labels, and measures how long it has to wait."""

    def __init__(self, case: Case, plan: LabelPlan, pool: TeacherPool) -> None:
        self.case, self.plan, self.pool = case, plan, pool
        self.wrong = 0
        self.seen: list[list[int]] = []
        self.begin()

    def begin(self) -> None:
        """A student of its own name, as after a restart."""
        self.train = Stream(
            self.case.split, seed=0, augment=self.case.card.augment, views=len(self.plan.keys)
        )
        self.labels = LabelStream(
            self.plan,
            RayBoard(self.pool.board, self.pool.address),
            f"student-{time.monotonic_ns()}",
            self.train,
            len(self.case.card.class_names),
            _DEADLINE_S,
            may_lack=False,
        )

    def read(self, epoch: int, at_step: int, fault: Callable[[], bool]) -> float:
        """One epoch with a fault in it; returns the longest wait after it, in seconds."""
        longest_s = 0.0
        is_over = False
        while not is_over:
            rows: list[int] = []
            is_over = True
            for step, batch in enumerate(self.train.epoch(epoch, _BATCH)):
                if step == at_step and fault():
                    is_over, at_step = False, -1  # the student is gone: from the beginning
                    break
                began_s = time.monotonic()
                found = self.labels(batch)
                if step >= at_step:
                    longest_s = max(longest_s, time.monotonic() - began_s)
                with torch.no_grad():
                    expected = self.case.teacher(batch.images_nchw)
                if found is None or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
                    self.wrong += len(batch.rows)
                rows += batch.rows.tolist()
        self.seen.append(rows)
        return longest_s


@dataclass
class Outcome:
    """One run under a fault.

    Attributes:
        wrong: images without a label, or with another one than the teacher's.
        doubled: images that an epoch showed twice.
        recovery_s: the longest wait after each fault.
    """

    wrong: int
    doubled: int
    recovery_s: list[float]
    duration_s: float


def main() -> None:
    """Every fault so many times, then the table and the targets."""
    arguments = harness.parser(__doc__)
    arguments.add_argument("--repeat", type=int, default=10)
    options = arguments.parse_args()
    repeat = min(options.repeat, 2) if options.quick else options.repeat
    torch.set_num_threads(1)
    connect()
    outcomes: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder))
        for name in ("none", *_FAULTS):
            outcomes[name] = [_run(case, name) for _ in range(repeat)]
            print(f"{name}: done", flush=True)
    ray_module().shutdown()
    rows, targets = [], []
    longest_s = max(
        wait_s
        for name, found in outcomes.items()
        for outcome in found
        for wait_s in outcome.recovery_s
        if name != "none"
    )
    for name, found in outcomes.items():
        recovery_s = [s for outcome in found for s in outcome.recovery_s]
        rows.append(
            {
                "fault": name,
                "runs": str(len(found)),
                "faults": str(0 if name == "none" else len(recovery_s)),
                "wrong labels": str(sum(outcome.wrong for outcome in found)),
                "shown twice": str(sum(outcome.doubled for outcome in found)),
                "wait, median s": f"{statistics.median(recovery_s):.2f}",
                "wait, longest s": f"{max(recovery_s):.2f}",
                "run, median s": f"{statistics.median(o.duration_s for o in found):.1f}",
            }
        )
    bad = sum(o.wrong + o.doubled for found in outcomes.values() for o in found)
    targets = [
        harness.Target("labels that are wrong, missing or shown twice", bad, "at most", 0, ""),
        harness.Target("longest wait after a fault", longest_s, "at most", _MAX_S, "s"),
    ]
    samples = {name: [vars(outcome) for outcome in found] for name, found in outcomes.items()}
    settings = {"epochs": _EPOCHS, "chunk": _CHUNK, "deadline_s": _DEADLINE_S, "repeat": repeat}
    harness.finish("faults", settings, samples, rows, targets)


def _run(case: Case, name: str) -> Outcome:
    plan = case.plan()
    size = PoolSize(2, 2, cpus=0.01)
    with TeacherPool(plan, size, case.folder / "teachers.json") as pool:
        while not all(pool.places().values()):
            time.sleep(0.05)
        reader = Reader(case, plan, pool)
        began_s = time.monotonic()
        waits = [
            reader.read(epoch, 2, lambda: _FAULTS[name](reader) if name != "none" else False)
            for epoch in range(_EPOCHS)
        ]
        duration_s = time.monotonic() - began_s
        doubled = sum(len(rows) - len(set(rows)) for rows in reader.seen)
        reader.labels.close()
    return Outcome(reader.wrong, doubled, waits, duration_s)


# ---------------------------------------------------------------- faults; true: the student is gone


def _processes(reader: Reader) -> list[int]:
    return [place[1] for place in reader.pool.places().values() if place is not None]


def _kill(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _teacher(reader: Reader) -> bool:
    _kill(_processes(reader)[:1], signal.SIGKILL)
    return False


def _all_teachers(reader: Reader) -> bool:
    _kill(_processes(reader), signal.SIGKILL)
    return False


def _stopped(reader: Reader) -> bool:
    _kill(_processes(reader)[:1], signal.SIGSTOP)
    return False


def _board(reader: Reader) -> bool:
    ray_module().kill(reader.pool._actor, no_restart=False)
    return False


def _student(reader: Reader) -> bool:
    reader.begin()
    return True


def _damaged(reader: Reader) -> bool:
    view = reader.labels._view
    assert view is not None
    for number in range(reader.plan.num_chunks):
        path = reader.plan.path((view, number))
        if number not in reader.labels._known and path.is_file():
            path.write_bytes(path.read_bytes()[:100])
    return False


_FAULTS: dict[str, Callable[[Reader], bool]] = {
    "teacher": _teacher,
    "all teachers": _all_teachers,
    "stopped teacher": _stopped,
    "board": _board,
    "student": _student,
    "damaged files": _damaged,
}


if __name__ == "__main__":
    main()
