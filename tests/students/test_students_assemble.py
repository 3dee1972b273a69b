"""Stitched students and their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pbkd.artifacts import tensors_digest
from pbkd.blocks import build_candidate, init_candidate
from pbkd.config import AugmentConfig, SeparableConfig
from pbkd.errors import ArtifactError
from pbkd.models import Classifier, ModelCard, NetworkSpec, build_classifier, save_model
from pbkd.students import load_model, stitch

CANDIDATES = {
    "vgg_small": {"features.3": SeparableConfig(), "features.10": SeparableConfig(depth=2)},
    "cifar_resnet20": {
        "layer1.0": SeparableConfig(batch_norm=True),  # a whole residual block
        "layer2.0": SeparableConfig(depth=2, batch_norm=True),  # one with a projection
        "layer3.1.conv1": SeparableConfig(),
    },
}


def card_of(network: str) -> ModelCard:
    return ModelCard(
        network=NetworkSpec(name=network, num_classes=4, in_channels=3, width=0.25),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
        image_size=(8, 8),
        class_names=("a", "b", "c", "d"),
        augment=AugmentConfig(),
        data_digest="data",
    )


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def teacher_of(card: ModelCard, x: torch.Tensor) -> Classifier:
    """Random weights, and batch-norm statistics that are not the initial ones."""
    torch.manual_seed(0)
    teacher = build_classifier(card)
    with torch.no_grad():
        teacher(x)
    return teacher.eval().requires_grad_(False)


def random_weights(teacher: Classifier, replacements: dict[str, SeparableConfig]):
    torch.manual_seed(1)
    return {
        path: build_candidate(config, teacher.net.get_submodule(path)).state_dict()
        for path, config in replacements.items()
    }


@pytest.mark.parametrize("network", list(CANDIDATES))
def test_without_replacements_the_student_gives_the_teachers_logits_bit_for_bit(network, x):
    teacher = teacher_of(card_of(network), x)
    student = stitch(teacher, {}, {})
    assert torch.equal(student(x), teacher(x))


@pytest.mark.parametrize("network", list(CANDIDATES))
def test_stitching_leaves_the_teacher_as_it_was(network, x):
    teacher = teacher_of(card_of(network), x)
    before, logits = tensors_digest(teacher.state_dict()), teacher(x)
    replacements = CANDIDATES[network]
    student = stitch(teacher, replacements, random_weights(teacher, replacements))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert tensors_digest(teacher.state_dict()) == before
    assert torch.equal(teacher(x), logits)
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("network", list(CANDIDATES))
def test_the_candidates_stand_where_they_belong_with_their_weights(network, x):
    teacher = teacher_of(card_of(network), x)
    replacements = CANDIDATES[network]
    weights = random_weights(teacher, replacements)
    student = stitch(teacher, replacements, weights)
    for path, state in weights.items():
        assert tensors_digest(student.net.get_submodule(path).state_dict()) == tensors_digest(state)
    assert not torch.allclose(student(x), teacher(x))
    assert all(p.requires_grad for p in student.parameters())
    assert not any(module.training for module in student.modules())


@pytest.mark.parametrize("network", list(CANDIDATES))
def test_a_saved_student_loads_with_equal_logits(network, x, tmp_path):
    card = card_of(network)
    teacher = teacher_of(card, x)
    replacements = CANDIDATES[network]
    student = stitch(teacher, replacements, random_weights(teacher, replacements))
    saved = save_model(tmp_path, student, card.model_copy(update={"replacements": replacements}))
    torch.manual_seed(77)  # what the constructors draw must not matter
    loaded, loaded_card = load_model(tmp_path)
    assert loaded_card == saved
    assert loaded_card.replacements == replacements
    assert torch.equal(loaded(x), student(x))
    assert not any(module.training for module in loaded.modules())


def test_a_whole_residual_candidate_starts_as_the_teachers_function_where_kernels_are_separable(x):
    card = card_of("cifar_resnet20")
    teacher = teacher_of(card, x)
    path, config = "layer1.0", SeparableConfig()
    block = teacher.net.get_submodule(path)
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            kernel = torch.randn(1, conv.weight.shape[1], 3, 3)
            conv.weight.copy_(kernel * torch.randn(conv.weight.shape[0], 1, 1, 1))
        candidate = build_candidate(config, block).eval()
        init_candidate(config, candidate, block, torch.randn(2, 4, 8, 8))
        student = stitch(teacher, {path: config}, {path: candidate.state_dict()})
        torch.testing.assert_close(student(x), teacher(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "damage", ["no card", "no weights", "half the weights", "other weights", "another network"]
)
def test_a_damaged_student_is_refused_by_name(x, tmp_path, damage):
    card = card_of("vgg_small")
    save_model(tmp_path, teacher_of(card, x), card)
    weights, card_file = tmp_path / "model.safetensors", tmp_path / "model.json"
    if damage == "no card":
        card_file.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "other weights":
        write_other_weights(weights, card)
    else:
        content = json.loads(card_file.read_text())
        content["network"]["width"] = 0.5
        card_file.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"model\.(json|safetensors)"):
        load_model(tmp_path)


def write_other_weights(path: Path, card: ModelCard) -> None:
    torch.manual_seed(5)
    save_model(path.parent / "other", build_classifier(card), card)
    (path.parent / "other" / path.name).replace(path)
