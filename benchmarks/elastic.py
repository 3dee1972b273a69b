"""Throughput of a student's training by where its soft labels come from, and the use of teachers.

A VGG-16 teacher and a VGG-16 of a tenth of its parameters (fewer channels everywhere; still fewer
where a step of it would cost more than a third of the teacher's pass), 32x32 images, one thread.
``none``: true labels alone; ``inline``: the teacher runs at every step;
``cached``: its labels were kept (``finetune.teachers: cached``). Weights are random: no figure of
time depends on them. Steps are those of the stage `finetune`; variants run in turns.

``elastic``: teachers on Ray, a thread each, label views that nobody has labelled while the student
trains. One of them is compared with the slower of teacher and student; how fast these are is
measured side by side, in two processes that know nothing of each other, because cores share memory
and clock. As many as keep the cores busy are compared with ``inline`` on as many threads as there
are cores.

Then 16 teachers without torch, of four speeds, sleep instead of labelling for 4 students, and one
of them is killed and another one comes every three seconds: how much of the sum of the rates of
those that are there is used. The processes of those that come are started beforehand: on a cluster
that costs the others nothing.

    .venv/bin/python benchmarks/elastic.py --quick
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from torch.nn import functional as F
from workspaces import make_workspace, run_stages, unlabelled

from pbkd.artifacts import Workspace, save_tensors
from pbkd.config import AugmentConfig, FinetuneConfig
from pbkd.data import Split, Stream
from pbkd.data.batches import Batch
from pbkd.elastic.actors import BoardActor, RayBoard, connect, ray_module, work_on
from pbkd.elastic.board import Chunk
from pbkd.elastic.label_plan import LabelPlan
from pbkd.elastic.pool import PoolSize, TeacherPool
from pbkd.elastic.soft_labels import SoftLabels, kept_of, write_labels
from pbkd.elastic.stream import WINDOW, LabelStream
from pbkd.measure import usable_cores
from pbkd.models import Classifier, NetworkSpec, Recipe, build_network
from pbkd.models.run import Loss, Run
from pbkd.stages.teacher import read_teacher
from pbkd.students.finetune import Teacher, distilling

_CLASSES, _BATCH, _CHUNK = 10, 64, 64
_STUDENT_WIDTHS = (0.1**0.5, 0.25, 0.2, 0.15)
_TIMES_STEP = 3.0  # what a teacher's pass costs at least, in steps of its student
_CONFIG = FinetuneConfig(batch_size=_BATCH, epochs=1000)
_RATES = (1.0, 2.0, 4.0, 8.0)  # chunks per second of a sleeping teacher, as in the rule's own test
_NUM_SLEEPERS, _NUM_STUDENTS, _CHANGE_S = 16, 4, 3.0


@dataclass
class Part:
    """What one part of the benchmark has found."""

    rows: list[dict[str, str]] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    targets: list[harness.Target] = field(default_factory=list)


def main() -> None:
    """Measure, print, write the results."""
    parser = harness.parser(__doc__)
    parser.add_argument("--part", choices=["throughput", "sleepers"], help="one of the two only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    connect()
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder))
        rounds = 2 if options.quick else 6
        parts = []
        if options.part != "sleepers":
            parts.append(_throughput(case, rounds))
        if options.part != "throughput":
            parts.append(_sleepers(case, 10.0 if options.quick else 30.0))
    ray_module().shutdown()
    whole = Part()
    for part in parts:
        whole.rows += part.rows
        whole.samples |= part.samples
        whole.settings |= part.settings
        whole.targets += part.targets
    harness.finish("elastic", whole.settings, whole.samples, whole.rows, whole.targets)


# ---------------------------------------------------------------- students that train


class Case:
    """A teacher and images in a workspace, as elastic teachers read them."""

    def __init__(self, folder: Path) -> None:
        weights = folder / "random.safetensors"
        save_tensors(weights, _network(1.0, channels=1).state_dict())
        self.workspace: Workspace = make_workspace(
            folder / "workspace",
            {
                "prepare": {"image_size": 32},
                "teacher": {
                    "model": "cifar_vgg16",
                    "weights": str(weights),
                    "mean": [0.5],
                    "std": [0.25],
                    "epochs": 0,
                    "min_accuracy": 0.0,
                },
            },
        )
        run_stages(self.workspace, "prepare", "teacher")
        self.teacher, self.card, self.prepared = read_teacher(self.workspace)
        self.teacher.eval()
        self.num_images = len(self.prepared.split("train"))
        self.folder = folder
        self._numbers = itertools.count()
        self.student_width = _STUDENT_WIDTHS[0]

    def train(self, views: int | None = 1) -> Stream:
        """The training images."""
        split = self.prepared.split("train")
        return Stream(split, seed=0, augment=self.card.augment, views=views)

    def plan(self, views: int) -> LabelPlan:
        """Views that nobody has labelled."""
        name = f"labels-{next(self._numbers)}"
        return unlabelled(self.workspace, name, views, self.num_images, _CHUNK)

    def epochs(self, loss: Loss, train: Stream) -> Callable[[], float]:
        """A function that trains a student for one more epoch and returns its seconds."""
        student = Classifier(_network(self.student_width, channels=1), (0.5,), (0.25,))
        run = Run(student, train, _few(self.prepared.split("val")), loss, Recipe.of(_CONFIG))

        def epoch() -> float:
            began_s = time.perf_counter()
            run._train()
            run.next_epoch += 1
            return time.perf_counter() - began_s

        return epoch


def _throughput(case: Case, rounds: int) -> Part:
    """Labels inline, cached, elastic, and none."""
    num, cores = case.num_images, usable_cores()
    train = case.train()
    kept = case.folder / "kept"
    kept.mkdir()
    began_s = time.perf_counter()
    write_labels(kept, case.teacher, train, 0, None, _CONFIG.temperature)
    labelling = num / (time.perf_counter() - began_s)
    for width in _STUDENT_WIDTHS:  # what a step costs depends on the processor
        case.student_width = width
        if num / case.epochs(_from_labels, train)() >= _TIMES_STEP * labelling:
            break
    soft = SoftLabels([kept], _CLASSES, _CONFIG.temperature, "cpu")
    inline = case.epochs(distilling(case.teacher, _CONFIG), train)
    variants = {
        "none": case.epochs(_from_labels, train),
        "inline": inline,
        "cached": case.epochs(distilling(soft, _CONFIG), train),
        "inline, all cores": lambda: _with_threads(cores, inline),
    }
    with _elastic(case, 1, rounds) as one, _elastic(case, cores, rounds) as many:
        variants |= {"elastic, 1 teacher": one, f"elastic, {cores} teachers": many}
        with Labeller(case.workspace.root, _CONFIG.temperature) as labeller:
            variants["none, beside a teacher"] = labeller.beside(variants["none"])
            for run in variants.values():
                run()
            labeller.rates.clear()
            samples = harness.interleaved(variants, rounds)
            labelling_beside = harness.median(labeller.rates)
    rates = {name: num / harness.median(times) for name, times in samples.items()}
    rows = [
        {
            "labels": name,
            "images/s": f"{rate:.1f}",
            "to inline": f"{rate / rates['inline']:.2f}x",
            "spread (s)": harness.spread(samples[name]),
        }
        for name, rate in rates.items()
    ]
    rows += [
        {"labels": "(a teacher, alone)", "images/s": f"{labelling:.1f}"},
        {"labels": "(a teacher, beside a student)", "images/s": f"{labelling_beside:.1f}"},
    ]
    slower = min(labelling_beside, rates["none, beside a teacher"])
    targets = [
        _target("cached labels", rates["cached"] / rates["inline"], 3.125, "x inline"),
        _target("cached labels", rates["cached"] / rates["none"], 0.95, "x no teacher"),
        _target(
            "elastic, 1 teacher",
            rates["elastic, 1 teacher"] / slower if cores > 1 else None,
            0.95,
            "x the slower of teacher and student, side by side",
        ),
        _target(
            f"elastic, {cores} teachers",
            rates[f"elastic, {cores} teachers"] / rates["inline, all cores"],
            0.9,
            "x inline on the same cores",
        ),
    ]
    settings = {
        "student_width": case.student_width,
        "images": num,
        "batch_size": _BATCH,
        "cores": cores,
        "teacher_over_step": rates["none"] / labelling,
        "labelling_images_per_s": labelling,
        "labelling_beside_images_per_s": labelling_beside,
    }
    return Part(rows, samples, settings, targets)


class Labeller:
    """A process that labels view after view, when it is told to; a context manager.

    Attributes:
        rates: images per second, of each time.
    """

    def __init__(self, root: Path, temperature: float) -> None:
        self.rates: list[float] = []
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_label_on, args=(root, temperature, other))

    def __enter__(self) -> Labeller:
        self._process.start()
        self._pipe.recv()  # it is ready
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def beside(self, train: Callable[[], float]) -> Callable[[], float]:
        """Train while it labels."""

        def run() -> float:
            self._pipe.send(True)
            took_s = train()
            self._pipe.send(False)
            self.rates.append(self._pipe.recv())
            return took_s

        return run


def _label_on(root: Path, temperature: float, pipe: Any) -> None:
    """Label chunks as elastic teachers do, between one message and the next; for ever."""
    torch.set_num_threads(1)
    workspace = Workspace(root, root / ".pbkd")
    teacher, card, prepared = read_teacher(workspace)
    train = Stream(prepared.split("train"), seed=0, augment=card.augment, views=1)
    teacher.eval()
    pipe.send(True)
    while pipe.recv():
        num, began_s = 0, time.perf_counter()
        while not pipe.poll():
            rows = torch.arange(num, num + _CHUNK) % len(train)
            with torch.no_grad():
                kept_of(teacher(train.view(0, rows)).float(), None, temperature)
            num += _CHUNK
        pipe.recv()
        pipe.send(num / (time.perf_counter() - began_s))


@contextmanager
def _elastic(case: Case, num_teachers: int, rounds: int) -> Iterator[Callable[[], float]]:
    """A student's epochs, of views that its teachers label meanwhile; teachers rest between."""
    plan = case.plan(rounds + 2)
    size = PoolSize(num_teachers, num_teachers, cpus=0.01)
    status = case.folder / f"teachers-{num_teachers}.json"
    with TeacherPool(plan, size, status) as pool:
        train = case.train(views=len(plan.keys))
        board = RayBoard(pool.board, pool.address)
        name = f"student-{num_teachers}"
        labels = LabelStream(plan, board, name, train, _CLASSES, 120.0, may_lack=False)
        teacher: Teacher = labels
        epoch = case.epochs(distilling(teacher, _CONFIG), train)

        def run() -> float:
            took_s = epoch()
            labels.rest()  # or the next view would be labelled while others are measured
            time.sleep(0.2)
            return took_s

        yield run


def _network(width: float, channels: int) -> torch.nn.Module:
    torch.manual_seed(0)
    spec = NetworkSpec(name="cifar_vgg16", num_classes=_CLASSES, in_channels=channels, width=width)
    return build_network(spec)


def _few(split: Split) -> Stream:
    few = replace(split, images=split.images[:_BATCH], labels=split.labels[:_BATCH])
    return Stream(few, seed=0, augment=AugmentConfig())


def _from_labels(batch: Batch, logits_nk: Tensor) -> Tensor:
    return F.cross_entropy(logits_nk, batch.labels_n)


def _with_threads(threads: int, run: Callable[[], float]) -> float:
    torch.set_num_threads(threads)
    try:
        return run()
    finally:
        torch.set_num_threads(1)


# ---------------------------------------------------------------- teachers that sleep


class Sleeper:
    """A teacher that takes its time and labels nothing; an actor."""

    def __init__(self, plan: LabelPlan) -> None:
        self._plan = plan

    def here(self) -> int:
        """Process."""
        return os.getpid()

    def serve(self, name: str, board: Any, rate: float) -> None:
        """Take chunks until killed."""

        def label(chunk: Chunk) -> None:
            time.sleep(1 / rate)
            path = self._plan.path(chunk)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

        work_on(name, board, label)


def _sleepers(case: Case, seconds: float) -> Part:
    """The share of the teachers' rates that 4 students get, while teachers come and go."""
    ray = ray_module()
    plan = replace(
        case.plan(_NUM_STUDENTS), num_images=_CHUNK * 100_000, folder=case.folder / "sleep"
    )
    board = ray.remote(BoardActor).options(num_cpus=0).remote(plan)
    alive: dict[str, tuple[Any, float, float]] = {}
    numbers = itertools.count()
    capacity = 0.0

    def started() -> Any:
        actor = ray.remote(Sleeper).options(num_cpus=0).remote(plan)
        ray.get(actor.here.remote())
        return actor

    def hire(actor: Any, rate: float) -> None:
        name = f"sleeper-{next(numbers)}"
        actor.serve.remote(name, board, rate)
        alive[name] = (actor, rate, time.monotonic())

    def dismiss(name: str) -> float:
        nonlocal capacity
        actor, rate, since_s = alive.pop(name)
        ray.kill(actor)
        ray.get(board.leave.remote(name))
        capacity += rate * (time.monotonic() - since_s)
        return rate

    is_over = threading.Event()
    read = [0] * _NUM_STUDENTS
    num_changes = int(seconds // _CHANGE_S)
    spares = [started() for _ in range(_NUM_SLEEPERS + num_changes)]
    for index in range(_NUM_SLEEPERS):
        hire(spares.pop(), _RATES[index % len(_RATES)])
    students = [
        threading.Thread(target=_read_on, args=(ray, board, view, read, is_over))
        for view in range(_NUM_STUDENTS)
    ]
    for student in students:
        student.start()
    time.sleep(_CHANGE_S)  # all have begun
    began_s, before = time.monotonic(), sum(read)
    for name, (actor, rate, _) in list(alive.items()):
        alive[name] = (actor, rate, began_s)
    for _ in range(num_changes):
        time.sleep(_CHANGE_S)
        hire(spares.pop(), dismiss(next(iter(alive))))
    took_s, num_read = time.monotonic() - began_s, sum(read) - before
    for name in list(alive):
        dismiss(name)
    is_over.set()
    for student in students:
        student.join()
    ray.kill(board)
    used = num_read / capacity
    row = {
        "labels": f"{_NUM_SLEEPERS} sleeping teachers, {_NUM_STUDENTS} students",
        "images/s": f"{num_read / took_s:.1f} chunks/s",
        "to inline": f"{used:.3f} of the rates",
    }
    target = _target("sleeping teachers on Ray", used, 0.97, "of the sum of their rates")
    found = {"sleepers": {"read": num_read, "capacity": capacity, "seconds": took_s}}
    return Part([row], found, {"sleeping_rates": _RATES}, [target])


def _read_on(ray: Any, board: Any, view: int, read: list[int], is_over: threading.Event) -> None:
    """A student that is faster than its teachers."""
    position, window = 0, WINDOW * _NUM_SLEEPERS
    done: set[int] = set()
    while not is_over.is_set():
        ahead: list[Chunk] = [
            (view, n) for n in range(position, position + window) if n not in done
        ]
        got, _ = ray.get(board.want.remote(f"student-{view}", ahead, 0.5))
        done |= {number for _, number in got}
        read[view] += len(got)
        while position in done:
            done.remove(position)
            position += 1


def _target(name: str, value: float | None, target: float, unit: str) -> harness.Target:
    return harness.Target(name, value, "at least", target, unit)


if __name__ == "__main__":
    main()
