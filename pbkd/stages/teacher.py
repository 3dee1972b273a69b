"""Stage `teacher`: train the network that is to be compressed, and check that it is good enough."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.nn import functional as F

from pbkd.artifacts import atomic_dir, write_json
from pbkd.config import TeacherConfig
from pbkd.data import Prepared, Stream, load_prepared
from pbkd.devices import best_device
from pbkd.errors import TeacherError
from pbkd.models import (
    Classifier,
    ModelCard,
    NetworkSpec,
    build_classifier,
    fit,
    save_model,
)
from pbkd.seeding import derive_seed
from pbkd.stages.context import StageContext

_log = logging.getLogger(__name__)


def run(context: StageContext) -> None:
    """Write ``artifacts/teacher/``: model, history, validation accuracy.

    Raises:
        TeacherError: unknown network, or a validation accuracy below ``teacher.min_accuracy``.
    """
    config, seed = context.params.teacher, context.params.seed
    prepared = load_prepared(context.workspace.prepared)
    card = teacher_card(config, prepared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "teacher"))
        teacher = build_classifier(card)
    with atomic_dir(context.workspace.artifacts("teacher")) as folder:
        accuracy = _train(teacher, prepared, config, seed, folder / "history.jsonl")
        if accuracy < config.min_accuracy:
            raise TeacherError(
                f"teacher {config.model}: validation accuracy {accuracy:.4f}, expected at least "
                f"{config.min_accuracy:g} (teacher.min_accuracy); train longer or lower the floor"
            )
        save_model(folder, teacher.cpu(), card)
        write_json(folder / "teacher.json", {"val_accuracy": accuracy})
    _log.info("teacher %s: validation accuracy %.4f", config.model, accuracy)


def teacher_card(config: TeacherConfig, prepared: Prepared) -> ModelCard:
    """The card of the teacher that these parameters give for this data."""
    channels, height, width = prepared.image_shape
    return ModelCard(
        network=NetworkSpec(
            name=config.model,
            num_classes=prepared.num_classes,
            in_channels=channels,
            width=config.width,
        ),
        mean=prepared.meta.mean,
        std=prepared.meta.std,
        image_size=(height, width),
        class_names=prepared.meta.class_names,
        augment=config.augment,
        data_digest=prepared.meta.digest,
    )


def _train(
    teacher: Classifier, prepared: Prepared, config: TeacherConfig, seed: int, history: Path
) -> float:
    device = best_device()
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
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=config.weight_decay,
        history=history,
    )
