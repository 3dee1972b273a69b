"""Faults of elastic teachers: is every label there, once and right, and how soon again?

A student reads the labels of a small teacher (digits) from two teachers on Ray, one each on nodes
of this machine; in every epoch something is killed, stopped or filled after the second batch. Every
label is compared with the teacher's own, so that a training ends as without the fault.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from kept import Keep
from workspaces import make_workspace, run_stages, unlabelled

from pbkd.data import Stream
from pbkd.elastic import pool as pools
from pbkd.elastic.actors import RayBoard, connect, ray_module
from pbkd.elastic.label_plan import LabelPlan
from pbkd.elastic.pool import PoolSize, TeacherPool
from pbkd.elastic.stream import LabelStream
from pbkd.stages.teacher import read_teacher

_BATCH, _CHUNK, _DEADLINE_S = 64, 64, 120.0
_AT_STEP = 2
_NUM_NODES = 3  # one more than teachers
_SIZE = PoolSize(2, 2, cpus=1.0)
_STOPPED_S, _FULL_S = 30.0, 5.0
_DISK_BYTES = 4 << 20
_BREATH_S, _STOP_S = 0.02, 0.18  # of a teacher that is slowed down ten times


@dataclass
class Outcome:
    """What one kind of fault did.

    Attributes:
        wrong: images without a label, or with another one than the teacher's.
        doubled: images that an epoch showed twice, or not at all.
        waits_s: the longest wait for a batch after each fault.
        why_not: why it was not run.
    """

    wrong: int = 0
    doubled: int = 0
    waits_s: list[float] = field(default_factory=list)
    why_not: str = ""


class Cluster:
    """Ray nodes of one CPU each on this machine; a context manager that connects this process."""

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    def __enter__(self) -> Cluster:
        from ray.cluster_utils import Cluster as Nodes

        ray_module()
        self._nodes = Nodes(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        self.others = [self._nodes.add_node(num_cpus=1) for _ in range(self._num_nodes - 1)]
        connect(self._nodes.address)
        return self

    def __exit__(self, *_: object) -> None:
        ray_module().shutdown()
        self._nodes.shutdown()

    def lose_node_of(self, pids: Callable[[], list[int]]) -> None:
        """SIGKILL the raylet of a node, not the head, that has one of these processes.

        Those of a node that was lost before may live on for a moment.
        """
        while True:
            for node in self.others:
                raylet = node.all_processes["raylet"][0].process
                if {child.pid for child in _below(raylet.pid)} & set(pids()):
                    raylet.kill()
                    self.others.remove(node)
                    return
            time.sleep(0.1)

    def complete(self, num_nodes: int) -> None:
        """Let nodes join until there are so many."""
        while len(self.others) + 1 < num_nodes:
            self.others.append(self._nodes.add_node(num_cpus=1))


def _below(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


class _Case:
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

    def plan(self, epochs: int) -> LabelPlan:
        """Views that nobody has labelled."""
        name = f"faults-{next(self._numbers)}"
        return unlabelled(self.workspace, name, epochs, len(self.split), _CHUNK)


class _Reader:
    """A student that reads and compares labels, and measures how long it has to wait."""

    def __init__(self, case: _Case, plan: LabelPlan, pool: TeacherPool, cluster: Cluster) -> None:
        self.case, self.plan, self.pool, self.cluster = case, plan, pool, cluster
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

    def read(self, epoch: int, fault: Callable[[_Reader], bool]) -> float:
        """One epoch with a fault in it; returns the longest wait after it, in seconds."""
        longest_s, at_step = 0.0, _AT_STEP
        is_over = False
        while not is_over:
            rows: list[int] = []
            is_over = True
            for step, batch in enumerate(self.train.epoch(epoch, _BATCH)):
                if step == at_step and fault(self):
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


def label_faults(times: int, keep: Keep) -> dict[str, Outcome]:
    """Every fault so many times, an epoch each."""
    outcomes = {}
    with ExitStack() as stack:

        @cache
        def case() -> tuple[_Case, Cluster]:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            return _Case(Path(folder)), stack.enter_context(Cluster(_NUM_NODES))

        for name, fault in ({"none": _nothing} | _FAULTS).items():
            outcomes[name] = Outcome(**keep(name, partial(_measured, case, fault, times)))
    return outcomes


def _measured(
    case: Callable[[], tuple[_Case, Cluster]], fault: Callable[[_Reader], bool], times: int
) -> dict[str, Any]:
    return vars(_run(*case(), fault, times))


def node_joins() -> dict[str, float]:
    """Seconds that a teacher takes to start, and from a new node's coming to a teacher on it.

    The student waits all the time, for a teacher that was stopped on the only other node.
    """
    pools._HANG_S = 600.0  # or that one would be replaced in its place
    with tempfile.TemporaryDirectory() as folder, Cluster(1) as cluster:
        case = _Case(Path(folder))
        began_s = time.monotonic()
        size = PoolSize(1, 2, cpus=1.0)
        with TeacherPool(plan := case.plan(1), size, case.folder / "teachers.json") as pool:
            while not all(pool.places().values()):
                time.sleep(0.05)
            start_s = time.monotonic() - began_s
            _send(pids := [place[1] for place in pool.places().values() if place], signal.SIGSTOP)
            board = RayBoard(pool.board, pool.address)
            while len(pool.places()) < 2:
                board.want("student", [(0, n) for n in range(plan.num_chunks)], wait=True)
            began_s = time.monotonic()
            cluster.complete(2)
            while not all(pool.places().values()):
                board.want("student", [(0, n) for n in range(plan.num_chunks)], wait=True)
            used_s = time.monotonic() - began_s
            _send(pids, signal.SIGCONT)
    return {"start_s": start_s, "joined_s": used_s}


def _run(case: _Case, cluster: Cluster, fault: Callable[[_Reader], bool], times: int) -> Outcome:
    plan = case.plan(times)
    if fault is _full_disk:
        disk = case.folder / "disk"
        if why_not := _mounted(disk):
            return Outcome(why_not=why_not)
        plan = replace(plan, folder=disk)
    with TeacherPool(plan, _SIZE, case.folder / "teachers.json") as pool:
        reader = _Reader(case, plan, pool, cluster)
        waits_s = []
        for epoch in range(times):
            cluster.complete(_NUM_NODES)
            while len(_living(pool)) < _SIZE.min_teachers:
                time.sleep(0.05)
            waits_s.append(reader.read(epoch, fault))
        reader.labels.close()
    if fault is _full_disk:
        subprocess.run(["/bin/umount", str(plan.folder)], check=True)
    whole = len(case.split) // _BATCH * _BATCH
    doubled = sum(abs(whole - len(set(rows))) + len(rows) - len(set(rows)) for rows in reader.seen)
    return Outcome(reader.wrong, doubled, waits_s)


def _mounted(folder: Path) -> str:
    """Mount a small disk in memory; returns why that is not possible."""
    folder.mkdir(exist_ok=True)
    command = ["/bin/mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


# ---------------------------------------------------------------- faults; true: the student is gone


def _nothing(_: _Reader) -> bool:
    return False


def _living(pool: TeacherPool) -> list[int]:
    """Processes of the teachers that are there; the pool may not have heard of a lost one yet."""
    pids = [place[1] for place in pool.places().values() if place is not None]
    return [pid for pid in pids if psutil.pid_exists(pid)]


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _teacher(reader: _Reader) -> bool:
    _send(_living(reader.pool)[:1], signal.SIGKILL)
    return False


def _all_teachers(reader: _Reader) -> bool:
    _send(_living(reader.pool), signal.SIGKILL)
    return False


def _raylet(reader: _Reader) -> bool:
    reader.cluster.lose_node_of(lambda: _living(reader.pool))
    return False


def _stopped(reader: _Reader) -> bool:
    pids = _living(reader.pool)[:1]
    _send(pids, signal.SIGSTOP)
    threading.Timer(_STOPPED_S, _send, [pids, signal.SIGCONT]).start()
    return False


def _slow(reader: _Reader) -> bool:
    """Stop a teacher for nine tenths of the time, until it has to do with the next epoch."""
    pids, view = _living(reader.pool)[:1], reader.labels._view

    def slow_down() -> None:
        while reader.labels._view == view and psutil.pid_exists(pids[0]):
            _send(pids, signal.SIGSTOP)
            time.sleep(_STOP_S)
            _send(pids, signal.SIGCONT)
            time.sleep(_BREATH_S)

    threading.Thread(target=slow_down, daemon=True).start()
    return False


def _board(reader: _Reader) -> bool:
    ray_module().kill(reader.pool._actor, no_restart=False)
    return False


def _student(reader: _Reader) -> bool:
    reader.begin()
    return True


def _damaged(reader: _Reader) -> bool:
    view = reader.labels._view
    assert view is not None
    for number in range(reader.plan.num_chunks):
        path = reader.plan.path((view, number))
        if number not in reader.labels._known and path.is_file():
            path.write_bytes(path.read_bytes()[:100])
    return False


def _full_disk(reader: _Reader) -> bool:
    filler = reader.plan.folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    threading.Timer(_FULL_S, filler.unlink).start()
    return False


_FAULTS: dict[str, Callable[[_Reader], bool]] = {
    "SIGKILL of a teacher in mid-batch": _teacher,
    "SIGKILL of all teachers": _all_teachers,
    "SIGKILL of a raylet": _raylet,
    "SIGSTOP of a teacher for 30 s": _stopped,
    "a teacher ten times slower": _slow,
    "SIGKILL of the board": _board,
    "the student begins again": _student,
    "files of labels cut in half": _damaged,
    "the labels' disk full for 5 s": _full_disk,
}
