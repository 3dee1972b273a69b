"""Blockwise distillation by pbkd, by the published algorithm, and by plain PyTorch: time and loss.

Claim: on one CPU core, training every 3x3 convolution's replacement (two separable layers, as in
Blakeney et al., arXiv 2012.03096) for 16 epochs of VGG-16 takes pbkd at most 1/3.5 of the time of
the published algorithm, which runs the teacher's prefix again for every block; and no longer than
one joint loss over all blocks in plain PyTorch; to the same validation losses.

Variants, all with the same teacher, images, order, augmentation, initial candidates, batch,
optimizer, schedule, rounding of activations and memory layout (benchmarks/published.py):

- published: a job per block, each with its own pass of the teacher up to its block;
- published, NCHW: the same in PyTorch's default layout, as plain users run it (no target);
- joint: one teacher pass and one loss over all blocks;
- torchdistill: the same by that library, where it is installed (no target);
- relay: pbkd, one teacher pass per batch for all blocks;
- cache: pbkd, activations from disk; filling is counted, for all views.

An epoch is the training of all candidates on all training images; validation is left out of every
variant's time. Samples are single epochs, taken in turn. "16 epochs" is 16 times the median epoch,
and the filling for the cache; the ResNet case of the full run goes through all 16 epochs and
compares. One process on one CPU core, the cache's reader included.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from harness import Target, finish, interleaved, median, parser, spread
from published import Joint, Published, Recipe, Torchdistill
from torch import nn
from torch.nn import functional as F

from pbkd.activations import (
    CacheSource,
    Capture,
    RelaySource,
    Source,
    both_sides,
    cache_keys,
    fill_cache,
    finish_fill,
)
from pbkd.artifacts import Store
from pbkd.blocks import build_candidate, find_blocks, init_candidate
from pbkd.config import (
    ActivationsConfig,
    AugmentConfig,
    BlocksConfig,
    DistillConfig,
    SeparableConfig,
)
from pbkd.data import Split, Stream, load_prepared
from pbkd.distill import TraineeSpec, make_trainees, relative_l2
from pbkd.distill.trainee import Trainee
from pbkd.models import Classifier, ModelCard, NetworkSpec, build_network

_EPOCHS = 16
_NUM_VAL = 128
_SEED = 0
_PIXELS = 32
_CLASSES = 10
_AUGMENT = AugmentConfig(pad=4, flip=True)
_PUBLISHED, _JOINT, _RELAY, _CACHE, _FILL = "published", "joint", "relay", "cache", "fill"


@dataclass(frozen=True)
class Case:
    """A network with its images, blocks and the candidates that every variant starts from."""

    network: str
    teacher: Classifier
    card: ModelCard
    train: Stream
    val: Stream
    specs: tuple[TraineeSpec, ...]
    candidates: dict[str, nn.Module]
    distill: DistillConfig
    activations: ActivationsConfig

    @property
    def paths(self) -> list[str]:
        """The blocks, in the order of the network."""
        return list(self.candidates)

    @property
    def num_steps(self) -> int:
        """Optimizer steps per candidate in the whole training."""
        return self.distill.epochs * (len(self.train) // self.distill.batch_size)


class Variant(Protocol):
    """A way to train all candidates of a case."""

    candidates: dict[str, nn.Module]

    def epoch(self, epoch: int) -> None:
        """Train all candidates for one epoch."""
        ...


class Pbkd:
    """pbkd's trainees on one of its sources: the loop of a job, without validation."""

    def __init__(self, case: Case, source: Source, progress: Path) -> None:
        self.source = source
        self.trainees = [
            Trainee(
                spec,
                copy.deepcopy(case.candidates[spec.block]),
                case.distill,
                case.num_steps,
                progress / f"{spec.key}.jsonl",
            )
            for spec in case.specs
        ]
        self.candidates = {trainee.spec.block: trainee.module for trainee in self.trainees}

    def epoch(self, epoch: int) -> None:
        """One epoch of all candidates."""
        for activations in self.source.epoch(epoch, self.candidates):
            for trainee in self.trainees:
                trainee.step(activations[trainee.spec.block])


class Cache:
    """Everything here that knows how pbkd's cache is filled and read; training views only."""

    def __init__(self, case: Case, capture: Capture) -> None:
        self.case, self.capture = case, capture
        keys = cache_keys(case.card, case.activations, _SEED, both_sides(case.paths))
        self.keys = {key: value for key, value in keys.items() if isinstance(key[2], int)}

    def fill(self, folder: Path) -> Store:
        """Fill a new store."""
        store, case = Store(folder), self.case
        fill_cache(store, self.capture, self.keys, case.train, case.val, case.distill.batch_size)
        finish_fill(store, self.keys)
        return store

    def source(self, store: Store) -> CacheSource:
        """Read a filled one."""
        case = self.case
        return CacheSource(store, self.keys, case.train, len(case.val), case.distill.batch_size)


def main() -> None:
    """Run both cases, print, write the results."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="a folder of prepared 32x32 RGB images")
    arguments.add_argument("--epochs", type=int, help="epochs really run, for both networks")
    options = arguments.parse_args()
    _use_one_core()
    num_train = 256 if options.quick else 512
    plan = {"cifar_vgg16": 2 if options.quick else 6, "cifar_resnet20": 4 if options.quick else 16}
    rows: list[dict[str, str]] = []
    samples: dict[str, Any] = {}
    targets: list[Target] = []
    for network, epochs in plan.items():
        case = _case(network, num_train, options.data)
        measured = _measure(case, options.epochs or epochs)
        samples[network] = asdict(measured)
        rows += _rows(case, measured)
        targets += _targets(case, measured)
    settings = {
        "images": num_train,
        "batch": case.distill.batch_size,
        "views": case.activations.views,
        "dtype": case.activations.dtype,
        "loss": case.distill.loss,
        "optimizer": case.distill.optimizer,
        "threads": 1,
        "torch": torch.__version__,
        "data": "synthetic" if options.data is None else "prepared",
    }
    finish("blocks", settings, samples, rows, targets)


def _use_one_core() -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # the cache's reader has a thread of its own
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Measured:
    """What ``interleaved`` gave, the CPU's share of it, and losses by variant and block.

    ``losses["before"]`` is of the initial candidates.
    """

    seconds: dict[str, list[float]]
    cpu_s: dict[str, list[float]]
    losses: dict[str, dict[str, float]]

    def projected_s(self, name: str, num_samples: int | None = None, *, cpu: bool = False) -> float:
        """Time of the whole training, by the median of the first samples (default: of all)."""
        samples = self.cpu_s if cpu else self.seconds
        fill = median(samples[_FILL][:num_samples]) if name == _CACHE else 0.0
        return fill + _EPOCHS * median(samples[name][:num_samples])

    def run_s(self, name: str) -> float | None:
        """Time of the whole training as it was; None: not all epochs were run."""
        if len(self.seconds[name]) != _EPOCHS:
            return None
        fill = self.seconds[_FILL][0] if name == _CACHE else 0.0
        return fill + sum(self.seconds[name])

    def mean_loss(self, name: str) -> float:
        """Of the blocks."""
        return sum(self.losses[name].values()) / len(self.losses[name])

    def deviation(self, name: str) -> float:
        """Largest relative difference of a block's validation loss from the published one's."""
        wanted = self.losses[_PUBLISHED]
        return max(abs(loss / wanted[path] - 1) for path, loss in self.losses[name].items())


def _measure(case: Case, epochs: int) -> Measured:
    images_nchw = next(case.train.epoch(0, case.distill.batch_size)).images_nchw
    dtype = getattr(torch, case.activations.dtype)
    capture = Capture(case.teacher, case.paths, images_nchw, dtype)
    cache = Cache(case, capture)
    with tempfile.TemporaryDirectory(prefix="pbkd-blocks-") as folder:
        source = cache.source(cache.fill(Path(folder, "read")))
        variants = _variants(case, capture, source, Path(folder, "progress"))
        clocks = {name: _Clock(variant.epoch) for name, variant in variants.items()}
        spare = Path(folder, "spare")
        clocks[_FILL] = _Clock(lambda _: cache.fill(spare), after=lambda: shutil.rmtree(spare))
        seconds = interleaved(clocks, epochs)
    trained = {name: variant.candidates for name, variant in variants.items()}
    losses = {
        name: _val_losses(case, capture, candidates)
        for name, candidates in {"before": case.candidates, **trained}.items()
    }
    return Measured(seconds, {name: clock.cpu_s for name, clock in clocks.items()}, losses)


def _variants(
    case: Case, capture: Capture, cache: CacheSource, progress: Path
) -> dict[str, Variant]:
    distill = case.distill
    recipe = Recipe(
        batch_size=distill.batch_size,
        lr=distill.lr,
        weight_decay=distill.weight_decay,
        num_steps=case.num_steps,
        dtype=capture.dtype,
    )
    plain = replace(recipe, layout=torch.contiguous_format)
    relay = RelaySource(capture, case.train, case.val, distill.batch_size)
    start = (case.teacher, case.candidates, case.train)
    variants: dict[str, Variant] = {
        _PUBLISHED: Published(*start, recipe),
        f"{_PUBLISHED}, NCHW": Published(*start, plain),
        _JOINT: Joint(*start, recipe),
    }
    if Torchdistill.installed():
        variants["torchdistill"] = Torchdistill(*start, recipe)
    return variants | {
        _RELAY: Pbkd(case, relay, progress / _RELAY),
        _CACHE: Pbkd(case, cache, progress / _CACHE),
    }


@dataclass
class _Clock:
    """Calls ``run(k)`` for k = 0, 1, ...; gives the seconds, keeps those of the CPU aside.

    CPU seconds leave out waiting, for the disk and for other users of the machine.
    """

    run: Callable[[int], object]
    after: Callable[[], object] = lambda: None
    cpu_s: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        began, cpu_began = time.perf_counter(), time.process_time()
        self.run(len(self.cpu_s))
        took = time.perf_counter() - began
        self.cpu_s.append(time.process_time() - cpu_began)
        self.after()
        return took


@torch.no_grad()
def _val_losses(
    case: Case, capture: Capture, candidates: Mapping[str, nn.Module]
) -> dict[str, float]:
    """Relative squared error per block, on the validation images in one batch."""
    activations = capture(next(case.val.in_order(len(case.val))).images_nchw)
    return {
        path: float(relative_l2(candidate(pair.input.float()), pair.output.float()))
        for path, candidate in candidates.items()
        for pair in [activations[path]]
    }


# ---------------------------------------------------------------- the case


def _case(network: str, num_train: int, data: Path | None) -> Case:
    train, val = _splits(num_train, data)
    spec = NetworkSpec(name=network, num_classes=_CLASSES, in_channels=3)
    distill = DistillConfig(epochs=_EPOCHS)
    activations = ActivationsConfig()
    card = ModelCard(
        network=spec,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=(_PIXELS, _PIXELS),
        class_names=tuple(map(str, range(_CLASSES))),
        augment=_AUGMENT,
        data_digest="benchmark",
        digest=network,
    )
    streams = [
        Stream(
            split,
            seed=_SEED,
            augment=_AUGMENT,
            views=activations.views,
            chunk=activations.chunk,
        )
        for split in (train, val)
    ]
    teacher = _teacher(card, streams[0])
    blocks = BlocksConfig(candidates=(SeparableConfig(depth=2),))
    discovery = find_blocks(teacher.net, blocks, torch.zeros(1, 3, _PIXELS, _PIXELS))
    specs = tuple(make_trainees(discovery, card, distill, activations, _SEED))
    candidates = {trainee.block: _candidate(teacher, trainee) for trainee in specs}
    return Case(
        network=network,
        teacher=teacher,
        card=card,
        train=streams[0],
        val=streams[1],
        specs=specs,
        candidates=candidates,
        distill=distill,
        activations=activations,
    )


def _teacher(card: ModelCard, train: Stream) -> Classifier:
    """Random weights; batch norms that have seen the images keep activations in range."""
    torch.manual_seed(_SEED)
    teacher = Classifier(build_network(card.network), card.mean, card.std)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        teacher.train()(train.plain(torch.arange(min(256, len(train)))))
    return teacher.eval().requires_grad_(False)


def _candidate(teacher: Classifier, spec: TraineeSpec) -> nn.Module:
    block = teacher.net.get_submodule(spec.block)
    torch.manual_seed(spec.seed)
    module = build_candidate(spec.config, block)
    init_candidate(spec.config, module, block, torch.empty(0))  # no batch norm: no inputs needed
    return module.requires_grad_(True)


def _splits(num_train: int, data: Path | None) -> tuple[Split, Split]:
    if data is None:
        return _synthetic(num_train, 0), _synthetic(_NUM_VAL, 1)
    prepared = load_prepared(data)
    train, val = prepared.split("train"), prepared.split("val")
    return _first(train, num_train), _first(val, _NUM_VAL)


def _first(split: Split, num: int) -> Split:
    return Split(np.array(split.images[:num]), np.array(split.labels[:num]))


def _synthetic(num: int, seed: int) -> Split:
    """Smooth random fields with a little noise: neighbouring pixels agree, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(num, 3, _PIXELS, _PIXELS)
    for size in (2, 4, 8, 16, 32):
        field = torch.randn(num, 3, size, size, generator=generator) / size**0.5
        images += F.interpolate(field, _PIXELS, mode="bilinear", align_corners=False)
    pixels = (images * 50 + 128).clamp(0, 255).byte().numpy()
    return Split(pixels, np.arange(num, dtype=np.int64) % _CLASSES)


# ---------------------------------------------------------------- reporting


def _rows(case: Case, measured: Measured) -> list[dict[str, str]]:
    rows = []
    for name, seconds in measured.seconds.items():
        row = {
            "network": f"{case.network}, {len(case.paths)} blocks",
            "variant": "cache: filling, once" if name == _FILL else name,
            "s per epoch": f"{median(seconds):.3g} ({spread(seconds)})",
            "CPU s": f"{median(measured.cpu_s[name]):.3g}",
        }
        rows.append(row | (_NO_TRAINING if name == _FILL else _training(measured, name)))
    return rows


_NO_TRAINING = dict.fromkeys(
    (f"{_EPOCHS} epochs, s", "x", "x, CPU", "x, all run", "loss, was", "loss differs by"), ""
)


def _training(measured: Measured, name: str) -> dict[str, str]:
    projected_s, run_s = measured.projected_s(name), measured.run_s(name)
    published_s, published_run_s = measured.projected_s(_PUBLISHED), measured.run_s(_PUBLISHED)
    cpu_s = [measured.projected_s(each, cpu=True) for each in (_PUBLISHED, name)]
    all_run = f"{published_run_s / run_s:.2f}" if published_run_s and run_s else "not run"
    return {
        f"{_EPOCHS} epochs, s": f"{projected_s:.4g}",
        "x": f"{published_s / projected_s:.2f}",
        "x, CPU": f"{cpu_s[0] / cpu_s[1]:.2f}",
        "x, all run": all_run,
        "loss, was": f"{measured.mean_loss(name):.3f}, {measured.mean_loss('before'):.3f}",
        "loss differs by": f"{measured.deviation(name):.2%}",
    }


def _targets(case: Case, measured: Measured) -> list[Target]:
    best = min((_RELAY, _CACHE), key=measured.projected_s)
    ratio = {
        name: measured.projected_s(name) / measured.projected_s(best)
        for name in (_PUBLISHED, _JOINT)
    }
    differs = 100 * max(measured.deviation(name) for name in (_JOINT, _RELAY, _CACHE))
    net = case.network
    targets = [
        Target(f"{net}: pbkd ({best}) over joint", ratio[_JOINT], "at least", 1.0, "x"),
        Target(f"{net}: validation losses, largest difference", differs, "at most", 2.0, "%"),
    ]
    if net == "cifar_vgg16":
        name = f"{net}: pbkd ({best}) over published, {_EPOCHS} epochs"
        targets.insert(0, Target(name, ratio[_PUBLISHED], "at least", 3.5, "x"))
    runs = [measured.run_s(name) for name in (_PUBLISHED, best)]
    if runs[0] and runs[1]:
        early = [measured.projected_s(name, _EPOCHS // 4) for name in (_PUBLISHED, best)]
        off = 100 * abs((runs[0] / runs[1]) / (early[0] / early[1]) - 1)
        name = f"{net}: ratio of whole runs, off the one projected from {_EPOCHS // 4} epochs"
        targets.append(Target(name, off, "at most", 10.0, "%"))
    return targets


if __name__ == "__main__":
    main()
