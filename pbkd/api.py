"""``pbkd.compress``: from Python, in one process: no workspace, no DVC, Prefect or MLflow."""

from __future__ import annotations

import copy
import inspect
import operator
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack, overload

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from pbkd.arrays import Data, split_of
from pbkd.artifacts import digest_of, tensors_digest
from pbkd.compression import Compression, Settings, Splits, Student, compress_splits
from pbkd.config import (
    ActivationsConfig,
    AugmentConfig,
    BlocksConfig,
    DistillConfig,
    FinetuneConfig,
    Section,
    StitchConfig,
    StudentConfig,
)
from pbkd.errors import ConfigError, DataError
from pbkd.models import Classifier, ModelCard, NetworkSpec, check_network

__all__ = ["Budget", "Compression", "Data", "Student", "compress"]

S = TypeVar("S", bound=Section)
Budget = StudentConfig | Mapping[str, Any]
"""Limits: max_parameters, max_macs, max_bytes, max_latency; 0.25, 25% (of the teacher's), 1MB."""

_ONE = "compressed"  # the name of the only one


class _Given(TypedDict, total=False):
    """What ``compress`` takes beside model, data and budgets."""

    mean: Sequence[float] | None
    std: Sequence[float] | None
    augment: AugmentConfig | Mapping[str, Any] | None
    blocks: BlocksConfig | Mapping[str, Any] | None
    activations: ActivationsConfig | Mapping[str, Any] | None
    distill: DistillConfig | Mapping[str, Any] | None
    stitch: StitchConfig | Mapping[str, Any] | None
    finetune: FinetuneConfig | Mapping[str, Any] | None
    seed: int
    folder: Path | str | None


@overload
def compress(
    model: nn.Module,
    train: Data,
    val: Data,
    *,
    budget: Budget | None = None,
    **settings: Unpack[_Given],
) -> Student: ...
@overload
def compress(
    model: nn.Module,
    train: Data,
    val: Data,
    *,
    students: Mapping[str, Budget],
    **settings: Unpack[_Given],
) -> dict[str, Student]: ...
def compress(
    model: nn.Module,
    train: Data,
    val: Data,
    *,
    budget: Budget | None = None,
    students: Mapping[str, Budget] | None = None,
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
) -> Student | dict[str, Student]:
    """Compress a trained classifier by blockwise distillation, in this process.

    Args:
        model: (N, C, H, W) float32 to (N, K) logits; it is not changed.
        train, val: images with labels 0 to K - 1, all of one size: two arrays, (N, C, H, W) of
            uint8, or of floats in [0, 1] (kept in 8 bits), and (N,) integers; or a data set of
            such pairs. What is chosen, is chosen on ``val``.
        budget: limits of the student, such as ``{"max_parameters": 0.25}``; None: half the MACs.
        students: name to limits, for several students out of one training of the blocks.
        mean, std: per channel: what ``model`` wants subtracted from, and divided out of, images in
            [0, 1]; None: it takes them as they are.
        augment, blocks, activations, distill, stitch, finetune: the sections of params.yaml of
            these names, as mappings or models of ``pbkd.config``; but for the budgets, a sweep and
            baselines. Activations are relayed.
        folder: finished candidates and students, measured latencies, and a checkpoint of the
            fine-tuning are kept there: a second call with other budgets trains no block again, and
            one that was stopped goes on; None: nothing is kept.

    Returns:
        The student, in evaluation mode on the CPU, with the normalisation in it; with
        ``students``, each one by its name.

    Raises:
        ConfigError: unknown or wrong settings. DataError: data that cannot be used. TeacherError: a
        model that cannot. BlockError: nothing in it can be replaced. BudgetError: limits that no
        choice keeps to. TrainingError: no memory, or a block's loss that is not finite.

    Example:
        ``student = pbkd.compress(model, train, val, budget={"max_parameters": 0.25})``
    """
    if budget is not None and students is not None:
        raise ConfigError("got both `budget` and `students`, expected one of them")
    settings = Settings(
        augment=_section(AugmentConfig, augment, "augment"),
        blocks=_section(BlocksConfig, blocks, "blocks"),
        activations=_section(ActivationsConfig, activations, "activations"),
        distill=_section(DistillConfig, distill, "distill"),
        stitch=_with_budgets(stitch, budget, students),
        finetune=_section(FinetuneConfig, finetune, "finetune"),
        seed=_seed(seed),
    )
    if settings.finetune.baselines:
        raise ConfigError("finetune.baselines: only `pbkd run` trains baselines; leave it out")
    if settings.finetune.teachers != "inline":
        raise ConfigError("finetune.teachers: only `pbkd run` keeps labels; leave it at inline")
    splits = Splits(split_of(train, "train"), split_of(val, "val"))
    shapes = [split.images.shape[1:] for split in (splits.train, splits.val)]
    if shapes[0] != shapes[1]:
        raise DataError(f"train has images of {shapes[0]}, val of {shapes[1]}; expected one shape")
    teacher, card = _teacher(model, splits, mean, std, settings)
    with ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pbkd-"))
        made = compress_splits(teacher, card, splits, settings, Path(folder))
    return made[_ONE] if students is None else made


def _teacher(
    model: nn.Module,
    splits: Splits,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    settings: Settings,
) -> tuple[Classifier, ModelCard]:
    channels, height, width = splits.train.images.shape[1:]
    mean = (0.0,) * channels if mean is None else _per_channel(mean, channels, "mean")
    std = (1.0,) * channels if std is None else _per_channel(std, channels, "std")
    if min(std) <= 0:
        raise ConfigError(f"std: got {std}, expected figures above 0")
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


def _per_channel(given: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    try:
        values = torch.as_tensor(given, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        values = []
    if len(values) != channels or not np.isfinite(values).all():
        raise ConfigError(
            f"{name}: got {given!r}, expected one finite number per channel ({channels})"
        )
    return tuple(values)


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


def _seed(given: int) -> int:
    """Also of an integer that is none of Python's own, such as numpy's."""
    try:
        seed = operator.index(given)
    except TypeError:
        seed = -1
    if not 0 <= seed < 2**31:
        raise ConfigError(f"seed: got {given!r}, expected an integer from 0 to 2**31 - 1")
    return seed


def _with_budgets(
    given: StitchConfig | Mapping[str, Any] | None,
    budget: Budget | None,
    students: Mapping[str, Budget] | None,
) -> StitchConfig:
    """The section with these budgets in place of its own."""
    section = _section(StitchConfig, given, "stitch")
    if taken := section.model_fields_set & {"students", "sweep"}:
        raise ConfigError(
            f"stitch.{min(taken)}: give limits by the argument `budget`, or several by `students`"
        )
    if students is None:
        wanted = {_ONE: _limits(budget, "budget")}
    elif isinstance(students, Mapping):
        wanted = {name: _limits(own, f"students.{name}") for name, own in students.items()}
    else:
        raise ConfigError(f"students: got {students!r}, expected {{name: limits}}")
    own = section.model_dump(exclude={"students", "sweep"})
    return _section(StitchConfig, own | {"students": wanted}, "stitch")


def _limits(budget: Budget | None, name: str) -> Mapping[str, Any]:
    """As a mapping; None: half the MACs."""
    if budget is None:
        return {"max_macs": 0.5}
    if isinstance(budget, StudentConfig):
        return budget.model_dump()
    if not isinstance(budget, Mapping):
        raise ConfigError(f"{name}: got {budget!r}, expected limits such as {{'max_macs': 0.25}}")
    return dict(budget)


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
