"""A model and its two files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pbkd.config import AugmentConfig
from pbkd.errors import ArtifactError
from pbkd.models import (
    Classifier,
    ModelCard,
    NetworkSpec,
    build_classifier,
    load_teacher,
    load_weights,
    read_card,
    save_model,
)

CARD = ModelCard(
    network=NetworkSpec(name="vgg_small", num_classes=3, in_channels=1, width=0.1),
    mean=(0.4,),
    std=(0.3,),
    image_size=(8, 8),
    class_names=("a", "b", "c"),
    augment=AugmentConfig(pad=1),
    data_digest="d",
)


def _model(card: ModelCard = CARD, seed: int = 0) -> Classifier:
    """Random weights, random batch-norm statistics."""
    torch.manual_seed(seed)
    model = build_classifier(card)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_model(folder, _model(), CARD)
    return folder


@pytest.mark.parametrize("name", ["vgg_small", "cifar_resnet20"])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    card = CARD.model_copy(update={"network": CARD.network.model_copy(update={"name": name})})
    model = _model(card)
    written = save_model(tmp_path, model, card)
    loaded, read = load_teacher(tmp_path)
    assert read == written == card.model_copy(update={"digest": read.digest})
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(loaded(images), model.eval()(images))


def test_a_loaded_teacher_is_frozen_and_in_evaluation_mode(saved: Path) -> None:
    teacher, _ = load_teacher(saved)
    assert not any(part.training for part in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_weights_that_a_changed_network_does_not_take_are_refused(saved: Path) -> None:
    card = read_card(saved)
    other = _model(
        CARD.model_copy(update={"network": CARD.network.model_copy(update={"width": 0.2})})
    )
    with pytest.raises(ArtifactError, match="does not fit network"):
        load_weights(saved, other, card)


def test_the_digest_is_of_the_weights_and_the_card(tmp_path: Path, saved: Path) -> None:
    digest = read_card(saved).digest
    assert save_model(tmp_path / "same", _model(), CARD).digest == digest
    assert save_model(tmp_path / "other", _model(seed=1), CARD).digest != digest
    renamed = CARD.model_copy(update={"class_names": CARD.class_names[::-1]})
    assert save_model(tmp_path / "renamed", _model(), renamed).digest != digest


@pytest.mark.parametrize("kept", [0, 6, 300, -1])
def test_truncated_weights_are_refused(saved: Path, kept: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        load_teacher(saved)


def test_a_changed_weight_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="do not belong together"):
        load_teacher(saved)


def test_the_weights_of_another_model_are_refused(tmp_path: Path, saved: Path) -> None:
    save_model(tmp_path / "other", _model(seed=1), CARD)
    shutil.copy(tmp_path / "other" / "model.safetensors", saved)
    with pytest.raises(ArtifactError, match="do not belong together"):
        load_teacher(saved)


def test_missing_files_are_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors is missing"):
        load_teacher(saved)
    (saved / "model.json").unlink()
    with pytest.raises(ArtifactError, match=r"model\.json is missing"):
        load_teacher(saved)


Edit = Callable[[dict[str, Any]], object]
UNFIT: dict[str, Edit] = {
    "other architecture": lambda card: card["network"].update(name="cifar_resnet20"),
    "other width": lambda card: card["network"].update(width=0.2),
    "other classes": lambda card: card["network"].update(num_classes=4),
    "other channels": lambda card: card["network"].update(in_channels=2),
    "other normalisation": lambda card: card.update(mean=[0.1, 0.2, 0.3]),
    "other class names": lambda card: card["class_names"].reverse(),
}
UNREADABLE: dict[str, Edit] = {
    "unknown key": lambda card: card.update(extra=1),
    "missing key": lambda card: card.pop("class_names"),
    "wrong type": lambda card: card.update(image_size="8"),
    "unknown candidate": lambda card: card.update(replacements={"features.0": {"kind": "x"}}),
}


def _edit(folder: Path, edit: Edit) -> None:
    card = json.loads((folder / "model.json").read_text())
    edit(card)
    (folder / "model.json").write_text(json.dumps(card))


@pytest.mark.parametrize("edit", UNFIT.values(), ids=UNFIT)
def test_weights_that_do_not_fit_an_edited_card_are_refused(saved: Path, edit: Edit) -> None:
    _edit(saved, edit)
    with pytest.raises(ArtifactError, match="do not belong together"):
        load_teacher(saved)


@pytest.mark.parametrize("edit", UNREADABLE.values(), ids=UNREADABLE)
def test_a_card_that_cannot_be_read_is_refused(saved: Path, edit: Edit) -> None:
    _edit(saved, edit)
    with pytest.raises(ArtifactError, match="not a model card of this version"):
        load_teacher(saved)


def test_an_edited_digest_is_refused(saved: Path) -> None:
    _edit(saved, lambda card: card.update(digest="0" * 32))
    with pytest.raises(ArtifactError, match="do not belong together"):
        load_teacher(saved)
