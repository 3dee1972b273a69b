"""Baselines: really random weights, the student's seconds, and what they learn from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pbkd.blocks import build_candidate, swap
from pbkd.config import AugmentConfig, FinetuneConfig, SeparableConfig, TeacherConfig
from pbkd.data import Split, Stream
from pbkd.models import Classifier, ModelCard, NetworkSpec, build_classifier, predict
from pbkd.students.baseline import (
    Baseline,
    random_student,
    scratch_recipe,
    train_baseline,
)
from pbkd.testing import random_split

CARD = ModelCard(
    network=NetworkSpec(name="vgg_small", num_classes=3, in_channels=1, width=0.25),
    mean=(0.5,),
    std=(0.25,),
    image_size=(8, 8),
    class_names=("a", "b", "c"),
    augment=AugmentConfig(),
    replacements={"features.3": SeparableConfig(), "features.7": SeparableConfig(depth=1)},
    data_digest="",
)
RECIPE = TeacherConfig(batch_size=16, lr=0.05)


def stream(seed: int = 0, *, shuffled: bool = False) -> Stream:
    """Classes told apart by brightness."""
    noise = random_split(48, seed=seed)
    images = noise.images // 3 + (noise.labels * 80).astype(np.uint8)[:, None, None, None]
    labels = np.random.default_rng(1).permutation(noise.labels) if shuffled else noise.labels
    return Stream(Split(images, labels), seed=0, augment=AugmentConfig())


def teacher() -> Classifier:
    torch.manual_seed(7)
    return build_classifier(CARD).eval().requires_grad_(False)


def train(folder: Path, kind: str, device_s: float = 0.5, **more: object) -> Baseline:
    arguments = {"train": stream(), "val": stream(1), "config": FinetuneConfig()} | more
    model = arguments.pop("model", None) or random_student(CARD, 0)
    return train_baseline(
        kind,
        model,
        arguments.pop("teacher", None) or teacher(),
        recipe=RECIPE,
        device_s=device_s,
        history=folder / "history.jsonl",
        **arguments,
    )


def test_the_architecture_is_the_students_and_every_weight_is_random() -> None:
    student = build_classifier(CARD)
    swap(
        student.net,
        {
            path: build_candidate(config, student.net.get_submodule(path))
            for path, config in CARD.replacements.items()
        },
    )
    one, same, other = (random_student(CARD, seed) for seed in (0, 0, 1))
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    assert {name: tensor.shape for name, tensor in one.state_dict().items()} == shapes
    for name, tensor in one.named_parameters():
        assert tensor.requires_grad
        assert torch.equal(tensor, same.get_parameter(name))
        if tensor.dim() > 1:
            assert not torch.equal(tensor, other.get_parameter(name))
            assert not torch.equal(tensor, student.get_parameter(name))


def test_random_weights_leave_other_draws_alone() -> None:
    before = torch.get_rng_state()
    random_student(CARD, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["scratch", "distill"])
def test_both_kinds_learn_and_say_what_they_took(tmp_path: Path, kind: str) -> None:
    good = random_student(CARD, 5)
    train(tmp_path, "scratch", 3.0, model=good)
    assert predict(good, stream(1), batch_size=64).accuracy > 0.8
    model = random_student(CARD, 0)
    before = predict(model, stream(1), batch_size=64).accuracy
    got = train(tmp_path, kind, 3.0, model=model, teacher=good)
    assert got.kind == kind
    assert got.device_s == 3.0
    assert got.duration_s > 0
    assert 2.8 < got.duration_s < 4.0
    assert got.epochs > 3
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert len(lines) == got.epochs
    assert got.val_accuracy == predict(model, stream(1), batch_size=64).accuracy > before


def test_more_seconds_are_more_epochs(tmp_path: Path) -> None:
    few, many = (train(tmp_path, "scratch", seconds).epochs for seconds in (0.3, 3.0))
    assert many > 3 * few


def test_only_scratch_needs_true_labels(tmp_path: Path) -> None:
    """With `label_weight: 0`, distillation learns the same from shuffled labels."""
    states = {}
    for kind in ("scratch", "distill"):
        for shuffled in (False, True):
            model = random_student(CARD, 0)
            config = FinetuneConfig(label_weight=0.0)
            train(  # one step
                tmp_path, kind, 1e-9, model=model, train=stream(shuffled=shuffled), config=config
            )
            loss = (tmp_path / "history.jsonl").read_text()
            states[kind, shuffled] = json.loads(loss)["train_loss"]
    assert states["distill", False] == states["distill", True]
    assert states["scratch", False] != states["scratch", True]


def test_a_loaded_teachers_recipe_is_not_that_of_random_weights() -> None:
    own = TeacherConfig(lr=0.03, batch_size=32)
    assert scratch_recipe(own) == own
    loaded = TeacherConfig(lr=1e-4, epochs=2, weights="weights.pt")
    assert scratch_recipe(loaded) == TeacherConfig()


def test_the_teacher_is_left_as_it_was(tmp_path: Path) -> None:
    model, before = teacher(), teacher().state_dict()
    train(tmp_path, "distill", teacher=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_diverging_baseline_begins_again(tmp_path: Path) -> None:
    model: nn.Module = random_student(CARD, 0)
    recipe = RECIPE.model_copy(update={"lr": 1e9})
    got = train_baseline(
        "scratch",
        model,
        teacher(),
        stream(),
        stream(1),
        FinetuneConfig(restarts=1),
        recipe,
        0.5,
        tmp_path / "history.jsonl",
    )
    assert math.isfinite(got.val_accuracy)
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
