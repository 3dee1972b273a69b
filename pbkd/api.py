"""Compress a model from Python, in one process: no workspace, no DVC, Prefect or MLflow.

The same steps as the stages, on a model and data that are in memory.
"""

from __future__ import annotations

import copy
import inspect
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from pbkd import students
from pbkd.artifacts import Store, digest_of, load_tensors, read_json, tensors_digest
from pbkd.blocks import candidate_name, find_blocks
from pbkd.config import (
    ActivationsConfig,
    AugmentConfig,
    BlocksConfig,
    DistillConfig,
    FinetuneConfig,
    Section,
    StitchConfig,
)
from pbkd.data import Split, Stream
from pbkd.devices import best_device
from pbkd.distill import (
    SCORES,
    TRAINEES,
    Damage,
    TraineeSpec,
    TrainingJob,
    make_trainees,
    train_and_score,
)
from pbkd.distill.score import SCORE
from pbkd.distill.trainee import WEIGHTS
from pbkd.errors import ConfigError, DataError
from pbkd.measure import count_macs, num_parameters
from pbkd.models import Classifier, ModelCard, NetworkSpec, check_network, predict
from pbkd.students import Choice, choose

_log = logging.getLogger(__name__)

S = TypeVar("S", bound=Section)
Data = Sequence[Any] | Iterable[tuple[Any, int]]
"""(images, labels) as two arrays, or a data set of (image, label) pairs."""

_BATCH = 256


@dataclass(frozen=True)
class Compression:
    """What was done; accuracies are on ``val``, 0 to 1, MACs of one image (1 MAC = 2 FLOPs)."""

    choices: tuple[Choice, ...]
    teacher_accuracy: float
    stitched_accuracy: float
    accuracy: float
    teacher_num_parameters: int
    num_parameters: int
    teacher_macs: int
    macs: int


class Student(Classifier):
    """A compressed model: float32 NCHW in [0, 1] to logits; ``compression`` says how it came."""

    compression: Compression


def compress(
    model: nn.Module,
    train: Data,
    val: Data,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: AugmentConfig | Mapping[str, Any] | None = None,
    blocks: BlocksConfig | Mapping[str, Any] | None = None,
    activations: ActivationsConfig | Mapping[str, Any] | None = None,
    distill: DistillConfig | Mapping[str, Any] | None = None,
    stitch: StitchConfig | Mapping[str, Any] | None = None,
    finetune: FinetuneConfig | Mapping[str, Any] | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
) -> Student:
    """Compress a trained classifier by blockwise distillation, in this process.

    Args:
        model: (N, C, H, W) float32 to (N, K) logits; it is not changed.
        train, val: images with labels 0 to K - 1, all of one size: two arrays, (N, C, H, W) of
            uint8, or of floats in [0, 1] (kept in 8 bits), and (N,) integers; or a data set of
            such pairs. What is chosen, is chosen on ``val``.
        mean, std: per channel: what ``model`` wants subtracted from, and divided out of, images in
            [0, 1]; None: it takes them as they are.
        augment, blocks, activations, distill, stitch, finetune: the sections of params.yaml of
            these names, as mappings or models of ``pbkd.config``. Activations are relayed.
        folder: finished candidates and a checkpoint of the fine-tuning are kept there, so that a
            second call goes on where a first was stopped; None: nothing is kept.

    Returns:
        The student, in evaluation mode on the CPU, with the normalisation in it.

    Raises:
        ConfigError: unknown settings. DataError: data that cannot be used. TeacherError: a model
        that cannot. BlockError: nothing in it can be replaced. TrainingError: no memory, or a loss
        that is not finite.
    """
    settings = _Settings(
        augment=_section(AugmentConfig, augment, "augment"),
        blocks=_section(BlocksConfig, blocks, "blocks"),
        activations=_section(ActivationsConfig, activations, "activations"),
        distill=_section(DistillConfig, distill, "distill"),
        stitch=_section(StitchConfig, stitch, "stitch"),
        finetune=_section(FinetuneConfig, finetune, "finetune"),
        seed=seed,
    )
    splits = _Splits(_split(train, "train"), _split(val, "val"))
    shapes = [split.images.shape[1:] for split in (splits.train, splits.val)]
    if shapes[0] != shapes[1]:
        raise DataError(f"train has images of {shapes[0]}, val of {shapes[1]}; expected one shape")
    teacher, card = _teacher(model, splits, mean, std, settings)
    with ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pbkd-"))
        return _compress(teacher, card, splits, settings, Path(folder))


@dataclass(frozen=True)
class _Settings:
    augment: AugmentConfig
    blocks: BlocksConfig
    activations: ActivationsConfig
    distill: DistillConfig
    stitch: StitchConfig
    finetune: FinetuneConfig
    seed: int


@dataclass(frozen=True)
class _Splits:
    train: Split
    val: Split


def _compress(
    teacher: Classifier, card: ModelCard, splits: _Splits, settings: _Settings, folder: Path
) -> Student:
    image = torch.zeros(1, *splits.train.images.shape[1:])
    discovery = find_blocks(teacher.net, settings.blocks, image)
    for refused in discovery.refused:
        _log.info("left out %s: %s", refused.name, refused.reason)
    trainees = make_trainees(discovery, card, settings.distill, settings.activations, settings.seed)
    store = Store(folder / "store")
    job = TrainingJob(
        job_id="all",
        trainees=tuple(trainees),
        source="relay",
        activations=settings.activations,
        distill=settings.distill,
        seed=settings.seed,
        store=store.root,
        progress=folder / "progress",
    )
    train_and_score(job, teacher, card, splits.train, splits.val)
    found = {(t.block, candidate_name(t.config)): t for t in trainees}
    choices = choose(
        discovery.blocks,
        {name: _damage(store, trainee) for name, trainee in found.items()},
        settings.stitch.max_damage,
    )
    replacements = {choice.block: choice.config for choice in choices if choice.config is not None}
    weights = {
        choice.block: load_tensors(
            store.path(TRAINEES, found[choice.block, choice.candidate].key) / WEIGHTS
        )
        for choice in choices
        if choice.candidate is not None
    }
    student = students.stitch(teacher, replacements, weights)
    return _mend(teacher, student, card, splits, settings, folder, tuple(choices))


def _mend(
    teacher: Classifier,
    student: Classifier,
    card: ModelCard,
    splits: _Splits,
    settings: _Settings,
    folder: Path,
    choices: tuple[Choice, ...],
) -> Student:
    """Recalibrate, fine-tune, and put the figures together."""
    train, val = (
        Stream(split, seed=settings.seed, augment=settings.augment, device=best_device())
        for split in (splits.train, splits.val)
    )
    student.to(best_device())
    stitched_accuracy = predict(student, val, batch_size=_BATCH).accuracy
    num_batches = settings.stitch.recalibrate_batches
    if num_batches and any(choice.config is not None for choice in choices):
        students.recalibrate(student, train, num_batches=num_batches, batch_size=_BATCH)
    key = digest_of(
        {
            "student": tensors_digest(student.state_dict()),
            "teacher": card.digest,
            "data": card.data_digest,
            "augment": settings.augment,
            "replacements": {choice.block: choice.config for choice in choices},
            "config": settings.finetune,
            "seed": settings.seed,
        }
    )
    checkpoint = folder / f"finetune-{key}.pt"
    accuracy = students.finetune(
        student,
        teacher,
        train,
        val,
        settings.finetune,
        folder / "finetune.jsonl",
        checkpoint,
    )
    checkpoint.unlink(missing_ok=True)
    result = Student(student.net, card.mean, card.std).cpu().eval()
    image = torch.zeros(1, *splits.train.images.shape[1:])
    result.compression = Compression(
        choices=choices,
        teacher_accuracy=predict(teacher, val, batch_size=_BATCH).accuracy,
        stitched_accuracy=stitched_accuracy,
        accuracy=accuracy,
        teacher_num_parameters=num_parameters(teacher),
        num_parameters=num_parameters(result),
        teacher_macs=count_macs(teacher.cpu(), image),
        macs=count_macs(result, image),
    )
    return result


def _teacher(
    model: nn.Module,
    splits: _Splits,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    settings: _Settings,
) -> tuple[Classifier, ModelCard]:
    channels, height, width = splits.train.images.shape[1:]
    mean = tuple(mean) if mean is not None else (0.0,) * channels
    std = tuple(std) if std is not None else (1.0,) * channels
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(f"mean, std: expected {channels} values each, one per channel")
    net = copy.deepcopy(model).cpu()
    largest = int(max(splits.train.labels.max(), splits.val.labels.max()))
    num_classes = max(largest + 1, _num_logits(net, splits.train.images.shape[1:]))
    spec = NetworkSpec(name=type(model).__name__, num_classes=num_classes, in_channels=channels)
    check_network(net, spec, (height, width))
    teacher = Classifier(net, mean, std).eval().requires_grad_(False)
    arrays = {
        f"{name}/{part}": torch.from_numpy(np.ascontiguousarray(getattr(split, part)))
        for name, split in vars(splits).items()
        for part in ("images", "labels")
    }
    card = ModelCard(
        network=spec,
        mean=mean,
        std=std,
        image_size=(height, width),
        class_names=tuple(map(str, range(num_classes))),
        augment=settings.augment,
        data_digest=tensors_digest(arrays),
        digest=digest_of({"net": tensors_digest(teacher.state_dict()), "code": _code(net)}),
    )
    return teacher, card


def _num_logits(net: nn.Module, shape: tuple[int, ...]) -> int:
    """How many classes the model tells apart; 0 where it does not say."""
    try:
        with torch.no_grad():
            return int(copy.deepcopy(net).eval()(torch.zeros(2, *shape)).shape[1])
    except Exception:  # noqa: BLE001  check_network tells what is wrong
        return 0


def _code(net: nn.Module) -> list[str]:
    """What of the model's code can be read, so that a changed one is not taken for the old."""
    sources = []
    for kind in sorted({type(module) for module in net.modules()}, key=lambda kind: str(kind)):
        with suppress(OSError, TypeError):
            sources.append(inspect.getsource(kind))
    return [repr(net), *sources]


def _damage(store: Store, trainee: TraineeSpec) -> Damage:
    return Damage.model_validate(read_json(store.path(SCORES, trainee.score_key) / SCORE))


def _section(kind: type[S], given: S | Mapping[str, Any] | None, name: str) -> S:
    if isinstance(given, kind):
        return given
    try:
        return kind.model_validate(given or {})
    except ValidationError as error:
        lines = [
            f"{'.'.join([name, *map(str, e['loc'])])}: {e['msg']}, got {e['input']!r}"
            for e in error.errors()
        ]
        raise ConfigError("; ".join(lines)) from None


# ---------------------------------------------------------------- data


def _split(data: Data, name: str) -> Split:
    """Arrays of 8 bits out of what the user gave."""
    if isinstance(data, tuple) and len(data) == 2 and len(data[0]) == len(data[1]):
        images, labels = _pixels(data[0], name), np.asarray(data[1])
    else:
        pairs = [(_pixels(image, name), label) for image, label in _pairs(data, name)]
        shapes = {image.shape for image, _ in pairs}
        if len(shapes) != 1:
            raise DataError(f"{name}: images of {len(shapes)} shapes, expected one: {shapes}")
        images = np.stack([image for image, _ in pairs])
        labels = np.asarray([int(label) for _, label in pairs])
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        raise DataError(
            f"{name}: images of shape {images.shape}, expected (N, C, H, W) with 1 or 3 channels"
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{name}: labels of shape {labels.shape} and type {labels.dtype}, expected "
            f"({len(images)},) integers"
        )
    if labels.min() < 0:
        raise DataError(f"{name}: label {labels.min()}, expected 0 to the number of classes - 1")
    return Split(images, labels.astype(np.int64))


def _pairs(data: Any, name: str) -> list[tuple[Any, Any]]:
    items = [data[i] for i in range(len(data))] if hasattr(data, "__getitem__") else list(data)
    if not items or any(not isinstance(item, tuple | list) or len(item) != 2 for item in items):
        raise DataError(
            f"{name}: expected (images, labels) as two arrays of one length, or a data set of "
            "(image, label) pairs"
        )
    return [(image, label) for image, label in items]


def _pixels(images: Any, name: str) -> NDArray[np.uint8]:
    """One or many images as uint8, channels first."""
    if hasattr(images, "getbands"):  # a Pillow image has its channels last
        plain = images if images.mode in ("L", "RGB") else images.convert("RGB")
        array = np.atleast_3d(np.asarray(plain)).transpose(2, 0, 1)
    else:
        array = np.asarray(images.detach().cpu() if isinstance(images, Tensor) else images)
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8)
    in_range = np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1
    if not np.issubdtype(array.dtype, np.floating) or not in_range:
        raise DataError(
            f"{name}: {array.dtype} pixels from {array.min():g} to {array.max():g}, expected uint8 "
            "or floats in [0, 1]; give normalisation by `mean` and `std`, not in the data"
        )
    return np.round(array * 255).astype(np.uint8)
