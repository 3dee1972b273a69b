"""What blocks.py and gpu.py compare on: a network with images, candidates, and pbkd's two modes.

A case is random: no figure of time depends on the teacher's weights, and its batch norms keep
activations in a trained teacher's range. Every variant copies the candidates that it trains.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from published import Recipe
from torch import nn
from torch.nn import functional as F

from pbkd.activations import (
    CacheSource,
    Capture,
    Source,
    activation_stream,
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
from pbkd.distill.steps import Steps
from pbkd.distill.trainee import Trainee
from pbkd.models import Classifier, ModelCard, NetworkSpec, build_network

_SEED = 0
_PIXELS = 32
_CLASSES = 10
_AUGMENT = AugmentConfig(pad=4, flip=True)
_VAL_BATCH = 512


@dataclass(frozen=True)
class Size:
    """How large a case is.

    Attributes:
        width: factor on the network's channels.
    """

    network: str
    num_train: int
    num_val: int = 128
    width: float = 1.0
    batch_size: int = 64
    epochs: int = 16


@dataclass(frozen=True)
class Case:
    """A network with its images, blocks and the candidates that every variant starts from."""

    network: str
    teacher: Classifier
    card: ModelCard
    train_split: Split
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
    def device(self) -> torch.device:
        """Where everything is."""
        return self.train.device

    @property
    def num_steps(self) -> int:
        """Optimizer steps per candidate in the whole training."""
        return self.distill.epochs * (len(self.train) // self.distill.batch_size)

    @property
    def recipe(self) -> Recipe:
        """pbkd's settings, for the baselines."""
        return Recipe(
            batch_size=self.distill.batch_size,
            lr=self.distill.lr,
            weight_decay=self.distill.weight_decay,
            num_steps=self.num_steps,
            dtype=getattr(torch, self.activations.dtype),
            mixed_precision=self.distill.mixed_precision,
        )

    def capture(self) -> Capture:
        """The teacher's pass over all blocks, tried on the first batch."""
        images_nchw = next(self.train.epoch(0, self.distill.batch_size)).images_nchw
        return Capture(self.teacher, self.paths, images_nchw, self.recipe.dtype)

    def smaller(self, num_train: int, views: int) -> Case:
        """The same with the first training images only, and with so many views."""
        activations = self.activations.model_copy(update={"views": views})
        split = _first(self.train_split, num_train)
        train = activation_stream(split, self.card, activations, _SEED, self.device)
        return replace(self, activations=activations, train_split=split, train=train)


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
        self._take_steps = Steps()

    def epoch(self, epoch: int) -> None:
        """One epoch of all candidates."""
        for activations in self.source.epoch(epoch, self.candidates):
            self._take_steps(self.trainees, activations)


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

    def source(self, store: Store, *, resident: bool = False) -> CacheSource:
        """Read a filled one, or keep it on the device from each view's first epoch on."""
        case = self.case
        return CacheSource(
            store,
            self.keys,
            case.train,
            len(case.val),
            case.distill.batch_size,
            case.device,
            resident=resident,
        )


@torch.no_grad()
def val_losses(
    case: Case, capture: Capture, candidates: Mapping[str, nn.Module]
) -> dict[str, float]:
    """Relative squared error per block in float32: the mean over the validation batches."""
    sums = dict.fromkeys(candidates, 0.0)
    for batch in case.val.in_order(_VAL_BATCH):
        activations = capture(batch.images_nchw)
        for path, candidate in candidates.items():
            pair = activations[path]
            loss = relative_l2(candidate(pair.input.float()), pair.output.float())
            sums[path] += float(loss) * len(batch.rows)
    return {path: total / len(case.val) for path, total in sums.items()}


# ---------------------------------------------------------------- making one


def make_case(size: Size, data: Path | None = None, device: torch.device | str = "cpu") -> Case:
    """A case on a device; weights and candidates are drawn on the CPU, so equal everywhere.

    Args:
        data: a folder of prepared 32x32 RGB images; None: synthetic ones.
    """
    device = torch.device(device)
    train, val = _splits(size, data)
    spec = NetworkSpec(name=size.network, num_classes=_CLASSES, in_channels=3, width=size.width)
    distill = DistillConfig(epochs=size.epochs, batch_size=size.batch_size)
    activations = ActivationsConfig()
    card = ModelCard(
        network=spec,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=(_PIXELS, _PIXELS),
        class_names=tuple(map(str, range(_CLASSES))),
        augment=_AUGMENT,
        data_digest="benchmark",
        digest=size.network,
    )
    teacher = _teacher(card, activation_stream(train, card, activations, _SEED))
    blocks = BlocksConfig(candidates=(SeparableConfig(depth=2),))
    discovery = find_blocks(teacher.net, blocks, torch.zeros(1, 3, _PIXELS, _PIXELS))
    specs = tuple(make_trainees(discovery, card, distill, activations, _SEED))
    candidates = {trainee.block: _candidate(teacher, trainee).to(device) for trainee in specs}
    return Case(
        network=size.network,
        teacher=teacher.to(device),
        card=card,
        train_split=train,
        train=activation_stream(train, card, activations, _SEED, device),
        val=activation_stream(val, card, activations, _SEED, device),
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


def _splits(size: Size, data: Path | None) -> tuple[Split, Split]:
    if data is None:
        return _synthetic(size.num_train, 0), _synthetic(size.num_val, 1)
    prepared = load_prepared(data)
    train, val = prepared.split("train"), prepared.split("val")
    return _first(train, size.num_train), _first(val, size.num_val)


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
