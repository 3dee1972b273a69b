"""A teacher's weights from elsewhere: torchvision's by name, or a file; nothing is unpickled."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pbkd.artifacts import load_tensors
from pbkd.config import TeacherConfig
from pbkd.errors import ArtifactError, TeacherError, did_you_mean
from pbkd.models.checkpoint import CARD, WEIGHTS, read_card

_ENUM_NAME = re.compile(r"\w+_Weights\.(?!(?:pt|pth|bin|ckpt|safetensors)$)\w+")
_NESTED = ("state_dict", "model_state_dict", "model")
_RENAMED = (  # names in torchvision's files, and what its models call them today
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
# those of torch.compile, DataParallel, pbkd and Lightning
_PREFIXES = ("_orig_mod.", "module.", "net.", "model.")


@dataclass(frozen=True)
class Transforms:
    """What torchvision's weights want of an image: sizes in pixels, mean and std of [0, 1]."""

    size: int
    resize: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Pretrained:
    """What was loaded into a network.

    Attributes:
        has_new_head: the last layer keeps its fresh weights and must be trained.
        mean, std: normalisation that the weights were made for; None: not known.
    """

    has_new_head: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


@dataclass(frozen=True)
class _Found:
    """Weights with what is known of them; None: not known."""

    state: dict[str, Tensor]
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def pretrained_transforms(weights: str | None) -> Transforms | None:
    """The transforms of torchvision's weights; None for a file and for no weights.

    Raises:
        TeacherError: torchvision has no weights of that name.
    """
    if weights is None or not _ENUM_NAME.fullmatch(weights):
        return None
    transforms = _enum_entry(weights).transforms()
    return Transforms(
        size=transforms.crop_size[0],
        resize=transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def check_weights(config: TeacherConfig, root: Path, *, has_teacher: bool) -> None:
    """Raise TeacherError if ``teacher.weights`` names nothing; nothing is loaded or downloaded.

    Args:
        has_teacher: a teacher is there already; it may need no file any more.
    """
    if config.weights is None:
        return
    if _ENUM_NAME.fullmatch(config.weights):
        _entry_of(config.weights, config.model)
    elif not has_teacher:
        _file(root / config.weights)


def load_pretrained(
    net: nn.Module, config: TeacherConfig, class_names: tuple[str, ...], root: Path
) -> Pretrained:
    """Fill a network with ``teacher.weights``, but for a head of other classes.

    Args:
        class_names: of the data.
        root: the folder to which a file's path is relative.

    Raises:
        TeacherError: the weights cannot be had, are of another architecture, or were made for other
            classes.
    """
    assert config.weights is not None
    name = config.weights
    if _ENUM_NAME.fullmatch(name):
        found = _download(name, config.model)
    else:
        found = _read(root / name, config)
    own = net.state_dict()
    mean, std = found.mean, found.std
    extra = {"mean", "std"} & found.state.keys() - own.keys()
    if len(extra) == 2:  # pbkd's own files hold the normalisation
        mean, std = (tuple(found.state[name].flatten().tolist()) for name in ("mean", "std"))
    given = {key: value for key, value in found.state.items() if key not in extra}
    given = _renamed(given, own)
    state = {key: value for key, value in given.items() if key in own}
    unexpected = [key for key in given if key not in state]
    head = _head(net, len(class_names))
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    other_shape = [key for key, value in state.items() if value.shape != own[key].shape]
    wrong = [key for key in missing + unexpected + other_shape if key not in head]
    if wrong:
        raise TeacherError(
            f"teacher.weights: {name} is of another architecture than {config.model}: "
            f"{len(missing)} of its {len(own)} tensors are missing, {len(unexpected)} are unknown, "
            f"{len(other_shape)} have another shape (such as {wrong[0]}); change teacher.model, "
            "teacher.width or the file"
        )
    if config.head == "new" and not head:
        raise TeacherError(
            f"teacher.head: new: {config.model} has no linear layer or convolution that gives the "
            f"{len(class_names)} logits; leave it at auto"
        )
    has_new_head = _wants_new_head(config, class_names, found.class_names, other_shape + missing)
    if has_new_head and config.epochs == 0:
        raise TeacherError(
            f"teacher.weights: {name} has no head for {len(class_names)} classes, and "
            "teacher.epochs is 0; train the new head with epochs from 1 on"
        )
    if mean is None and config.mean is None and config.epochs == 0:
        raise TeacherError(
            f"teacher.weights: {name} does not say how images were normalised; set teacher.mean "
            "and teacher.std (0 and 1 where the network takes pixels in [0, 1])"
        )
    kept = {key: value for key, value in state.items() if not (has_new_head and key in head)}
    own.update(kept)  # unlike a plain dict, it has the modules' versions, which some ask for
    net.load_state_dict(own)
    return Pretrained(has_new_head, mean, std)


def _wants_new_head(
    config: TeacherConfig,
    class_names: tuple[str, ...],
    known: tuple[str, ...] | None,
    misfits: list[str],
) -> bool:
    if config.head == "new":
        return True
    if misfits:
        if config.head == "keep":
            raise TeacherError(
                f"teacher.head: keep: the head of {config.weights} does not give "
                f"{len(class_names)} classes; set teacher.head: new"
            )
        return True
    if config.head == "auto" and known is not None and known != class_names:
        pairs = zip(known, class_names, strict=True)
        theirs, ours = next(pair for pair in pairs if pair[0] != pair[1])
        raise TeacherError(
            f"teacher.weights: {config.weights} was made for other classes: `{theirs}` stands "
            f"where the data has `{ours}`; rename the class folders, or set teacher.head to new "
            "(trained anew) or keep (the order is the same)"
        )
    return False


def _head(net: nn.Module, num_classes: int) -> set[str]:
    """Names of the tensors of the last layer that gives the logits."""
    layers = [
        (path, module)
        for path, module in net.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == num_classes)
        or (isinstance(module, nn.Conv2d) and module.out_channels == num_classes)
    ]
    if not layers:
        return set()
    path, module = layers[-1]
    return {f"{path}.{name}" for name in module.state_dict()}


# ---------------------------------------------------------------- torchvision's


def _enum_entry(name: str) -> Any:
    from torchvision import models
    from torchvision.transforms._presets import ImageClassification

    try:
        entry = models.get_weight(name)
    except (ValueError, KeyError, AttributeError):
        known = [
            str(weights)
            for model in models.list_models(module=models)
            for weights in models.get_model_weights(model)
        ]
        hint = did_you_mean(name, known, f"expected one such as {known[0]}")
        raise TeacherError(f"teacher.weights: torchvision has no `{name}`; {hint}") from None
    if not isinstance(entry.transforms(), ImageClassification):
        raise TeacherError(f"teacher.weights: {name} is not for classification of images")
    return entry


def _entry_of(name: str, model: str) -> Any:
    """The weights of a name, if they are the model's."""
    from torchvision import models

    entry = _enum_entry(name)
    if model not in models.list_models(module=models) or type(entry) is not (
        models.get_model_weights(model)
    ):
        raise TeacherError(
            f"teacher.weights: {name} is not of teacher.model `{model}`; name torchvision's model "
            "to which the weights belong"
        )
    return entry


def _download(name: str, model: str) -> _Found:
    entry = _entry_of(name, model)
    transforms = pretrained_transforms(name)
    assert transforms is not None
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # a damaged file makes torch raise anything
        file_name = Path(entry.url).name
        if (folder / file_name).exists():
            raise TeacherError(
                f"teacher.weights: {name}: {error}; delete {file_name} in {folder}"
            ) from error
        raise TeacherError(
            f"teacher.weights: {name} cannot be downloaded ({error}); without a network, put "
            f"{file_name} into {folder}, or give a file's path"
        ) from error
    categories = tuple(entry.meta["categories"])
    return _Found(state, categories, transforms.mean, transforms.std)


# ---------------------------------------------------------------- files


def _file(path: Path) -> Path:
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise TeacherError(
            f"teacher.weights: {path} does not exist; expected a file of safetensors or "
            "torch.save, or torchvision's name, such as ResNet18_Weights.IMAGENET1K_V1"
        )
    return path


def _read(path: Path, config: TeacherConfig) -> _Found:
    path = _file(path)
    state = _tensors(path)
    class_names = mean = std = None
    if path.name == WEIGHTS and path.with_name(CARD).is_file():  # a model that pbkd wrote
        card = read_card(path.parent)
        class_names, mean, std = card.class_names, card.mean, card.std
        if card.replacements:
            raise TeacherError(
                f"teacher.weights: {path} is a compressed student; give the weights of a "
                f"{config.model} as it was before"
            )
    return _Found(state, class_names, mean, std)


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_tensors(path)
        except ArtifactError as error:
            raise TeacherError(f"teacher.weights: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise TeacherError(
            f"teacher.weights: {path} is no file of torch.save, or holds more than tensors, and "
            "code in it is not run; save the weights alone, where you trust the file: "
            "torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as error:  # a damaged file makes torch raise anything
        raise TeacherError(
            f"teacher.weights: {path} is not a whole file of torch.save ({error}); copy it again"
        ) from error
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise TeacherError(
            f"teacher.weights: {path} holds {type(content).__name__}, expected tensors by name, as "
            "model.state_dict() gives them"
        )
    return dict(content)


def _renamed(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as the network has them, where they differ by a prefix or by torchvision's age."""
    renamed = dict(state)
    while renamed and not any(name in own for name in renamed):
        prefix = next((p for p in _PREFIXES if all(n.startswith(p) for n in renamed)), None)
        if prefix is None:
            break
        renamed = {name.removeprefix(prefix): value for name, value in renamed.items()}
    for pattern, new in _RENAMED:
        renamed = {
            name if name in own else pattern.sub(new, name): value
            for name, value in renamed.items()
        }
    return renamed
