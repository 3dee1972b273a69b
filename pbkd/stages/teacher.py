"""Stage `teacher`: load or train the network to compress, and check that it is good enough."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.nn import functional as F

from pbkd.artifacts import Workspace, atomic_dir, digest_of, tensors_digest, write_json
from pbkd.config import TeacherConfig
from pbkd.data import Prepared, Stream, load_prepared
from pbkd.devices import best_device
from pbkd.errors import ArtifactError, TeacherError
from pbkd.models import (
    Classifier,
    ModelCard,
    NetworkSpec,
    Pretrained,
    Recipe,
    build_network,
    check_network,
    fit,
    load_pretrained,
    load_teacher,
    network_code,
    pretrained_transforms,
    read_card,
    save_model,
)
from pbkd.seeding import derive_seed
from pbkd.stages.budgets import check_untrained
from pbkd.stages.context import StageContext

_log = logging.getLogger(__name__)


def run(context: StageContext) -> None:
    """Write ``artifacts/teacher/``: model, history, validation accuracy.

    Raises:
        TeacherError: the network or its weights cannot be had, or the validation accuracy is below
            ``teacher.min_accuracy``.
        BlockError: no block can be replaced; BudgetError: a student's limits cannot be kept.
    """
    config = context.params.teacher
    prepared = load_prepared(context.workspace.prepared)
    teacher, card = _build(context, prepared)
    check_untrained(context, teacher, torch.zeros(1, *prepared.image_shape))
    checkpoint = _checkpoint(context, teacher, card)
    with atomic_dir(context.workspace.artifacts("teacher")) as folder:
        history = folder / "history.jsonl"
        accuracy = _train(context, teacher, prepared, history, checkpoint)
        if accuracy < config.min_accuracy:
            raise TeacherError(
                f"teacher {config.model}: validation accuracy {accuracy:.4f}, expected at least "
                f"{config.min_accuracy:g} (teacher.min_accuracy); train longer or lower the floor"
            )
        save_model(folder, teacher.cpu(), card)
        write_json(folder / "teacher.json", {"val_accuracy": accuracy, "weights": config.weights})
    checkpoint.unlink(missing_ok=True)
    _log.info("teacher %s: validation accuracy %.4f", config.model, accuracy)


def read_teacher(workspace: Workspace) -> tuple[Classifier, ModelCard, Prepared]:
    """The teacher, frozen and in evaluation mode, its card, and the data that it belongs to.

    Raises:
        ArtifactError: the teacher is missing, damaged, or was trained on other data.
    """
    card, prepared = read_teacher_card(workspace)
    teacher, _ = load_teacher(workspace.artifacts("teacher"), allow_code=True)
    return teacher, card, prepared


def read_teacher_card(workspace: Workspace) -> tuple[ModelCard, Prepared]:
    """The same without the network.

    Raises:
        ArtifactError: the teacher is missing, or was trained on other data.
    """
    prepared = load_prepared(workspace.prepared)
    card = read_card(workspace.artifacts("teacher"))
    if card.class_names != prepared.meta.class_names:
        raise ArtifactError(
            f"the teacher was trained for the classes {_few(card.class_names)}, the data has "
            f"{_few(prepared.meta.class_names)}; run: pbkd teacher"
        )
    if card.data_digest != prepared.meta.digest:
        raise ArtifactError(
            f"the teacher was trained on other data than {prepared.folder} holds now; run: "
            "pbkd teacher"
        )
    return card, prepared


def teacher_card(
    config: TeacherConfig, prepared: Prepared, loaded: Pretrained | None = None
) -> ModelCard:
    """The card of the teacher that these parameters give for this data.

    Raises:
        TeacherError: the normalisation does not fit the images' channels.
    """
    channels, height, width = prepared.image_shape
    transforms = pretrained_transforms(config.weights)
    mean, std = config.mean, config.std
    if mean is None and loaded is not None:
        mean, std = loaded.mean, loaded.std
    if mean is None and transforms is not None:
        mean, std = transforms.mean, transforms.std
    mean, std = mean or prepared.meta.mean, std or prepared.meta.std
    if len(mean) != channels or len(std) != channels:
        raise TeacherError(
            f"teacher.mean: got {len(mean)} values, the images have {channels} channels; give one "
            "per channel, or change prepare.channels"
        )
    return ModelCard(
        network=NetworkSpec(
            name=config.model,
            num_classes=prepared.num_classes,
            in_channels=channels,
            width=config.width,
            code=network_code(config.model),
        ),
        mean=mean,
        std=std,
        image_size=(height, width),
        class_names=prepared.meta.class_names,
        augment=config.augment,
        data_digest=prepared.meta.digest,
    )


def _build(context: StageContext, prepared: Prepared) -> tuple[Classifier, ModelCard]:
    """The untrained, or loaded, teacher; all that can be wrong with it is found here."""
    config = context.params.teacher
    spec = teacher_card(config, prepared).network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(context.params.seed, "teacher"))
        net = build_network(spec, allow_code=True)
    loaded = None
    if config.weights is not None:
        loaded = load_pretrained(net, config, prepared.meta.class_names, context.workspace.root)
    card = teacher_card(config, prepared, loaded)
    check_network(net, spec, card.image_size)
    return Classifier(net, card.mean, card.std), card


def _checkpoint(context: StageContext, teacher: Classifier, card: ModelCard) -> Path:
    """Where this training goes on from; the name covers all that it depends on."""
    key = digest_of(
        {
            "initial": tensors_digest(teacher.state_dict()),
            "card": card,
            "config": context.params.teacher.model_dump(exclude={"min_accuracy"}),
            "seed": context.params.seed,
        }
    )
    return context.workspace.checkpoint("teacher", key)


def _train(
    context: StageContext,
    teacher: Classifier,
    prepared: Prepared,
    history: Path,
    checkpoint: Path,
) -> float:
    config, seed, device = context.params.teacher, context.params.seed, best_device()
    teacher.to(device)
    train, val = (
        Stream(prepared.split(name), seed=seed, augment=config.augment, device=device)
        for name in ("train", "val")
    )
    smoothing = config.label_smoothing
    return fit(
        teacher,
        train,
        val,
        lambda batch, logits: F.cross_entropy(logits, batch.labels_n, label_smoothing=smoothing),
        Recipe.of(config),
        history=history,
        checkpoint=checkpoint,
    )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
