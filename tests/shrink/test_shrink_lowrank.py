"""Dense layers as products of smaller ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_students import (
    every_student,
    images_of,
    learner,
    macs_of,
    reloaded,
    stitched,
    tied,
    trainer_of,
)
from torch import nn

from pbkd.artifacts import tensors_digest
from pbkd.config import Factorized, LowRankStep, TuneConfig
from pbkd.errors import ShrinkError
from pbkd.measure import num_parameters
from pbkd.models import Classifier
from pbkd.shrink import Shrunk
from pbkd.shrink.lowrank import apply

NO_TUNE = TuneConfig(epochs=0)
STEPS = {
    "pair, ratio": LowRankStep(ratio=0.5, tune=NO_TUNE),
    "pair, energy": LowRankStep(energy=0.6, tune=NO_TUNE),
    "tucker, ratio": LowRankStep(form="tucker", ratio=0.4, tune=NO_TUNE),
    "tucker, energy": LowRankStep(form="tucker", energy=0.4, tune=NO_TUNE),
}
STUDENTS = every_student()
del STUDENTS["resnet18"]  # its decompositions take seconds


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_built_from_the_card_it_gives_the_same_logits(student, step, tmp_path):
    shrunk = STUDENTS[student]
    found = apply(shrunk, step, trainer_of(tmp_path))
    (edit,) = found.card.edits
    assert isinstance(edit, Factorized)
    x = images_of(found.card)
    torch.manual_seed(77)  # what the constructors draw must not matter
    assert torch.equal(reloaded(found, tmp_path)(x), found.model(x))
    assert num_parameters(found.model) < num_parameters(shrunk.model)
    assert macs_of(found) < macs_of(shrunk)
    assert not any(module.training for module in found.model.modules())


@pytest.mark.parametrize("student", STUDENTS)
def test_every_layer_that_is_factorized_is_smaller_and_the_others_are_as_they_were(
    student, tmp_path
):
    shrunk = STUDENTS[student]
    before = tensors_digest(shrunk.model.state_dict())
    found = apply(shrunk, STEPS["pair, energy"], trainer_of(tmp_path))
    assert tensors_digest(shrunk.model.state_dict()) == before
    layers = found.card.edits[0].layers
    for path in layers:
        own, made = (net.get_submodule(path) for net in (shrunk.model.net, found.model.net))
        assert num_parameters(made) < num_parameters(own)
    for path, module in shrunk.model.net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and path not in layers:
            own = found.model.net.get_submodule(path)
            assert torch.equal(own.weight, module.weight)


def test_nearly_all_energy_is_nearly_the_same_function(tmp_path):
    shrunk = STUDENTS["cifar_resnet20"]
    # of rank 2, so that they lose nothing
    with torch.no_grad():
        for module in shrunk.model.modules():
            if isinstance(module, nn.Conv2d):
                matrix = module.weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
                u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
                low = ((u[:, :2] * s[:2]) @ v[:2]).float()
                i, kh, o, kw = (module.weight.shape[d] for d in (1, 2, 0, 3))
                module.weight.copy_(low.reshape(i, kh, o, kw).permute(2, 0, 1, 3))
            if isinstance(module, nn.Linear):
                u, s, v = torch.linalg.svd(module.weight, full_matrices=False)
                module.weight.copy_((u[:, :2] * s[:2]) @ v[:2])
    found = apply(shrunk, LowRankStep(energy=0.999999, tune=NO_TUNE), trainer_of(tmp_path))
    assert "fc" in found.card.edits[0].layers
    assert len(found.card.edits[0].layers) > 15
    x = images_of(found.card)
    torch.testing.assert_close(found.model(x), shrunk.model(x), rtol=1e-3, atol=1e-4)


def two_layers() -> Shrunk:
    """A 3 x 3 convolution and a linear layer, in the card of another network."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4)
    )
    card = STUDENTS["vgg_small"].card
    return Shrunk(Classifier(net, card.mean, card.std).eval(), card)


def test_sizes_of_two_layers_by_hand(tmp_path):
    found = apply(two_layers(), LowRankStep(ratio=0.5, tune=NO_TUNE), trainer_of(tmp_path))
    pair, linear = found.model.net[0], found.model.net[3]
    # of 432 weights, 216: a rank costs 3 * 3 + 16 * 3 = 57, so 3
    assert [tuple(conv.weight.shape) for conv in pair] == [(3, 3, 3, 1), (16, 3, 1, 3)]
    # of 256 weights, 128: a rank costs 64 + 4 = 68, so 1
    assert [tuple(layer.weight.shape) for layer in linear] == [(1, 64), (4, 1)]
    assert [layer.bias is not None for layer in (*pair, *linear)] == [False, True, False, True]


def test_parts_of_candidates_depthwise_and_pruned_layers_are_left_alone(tmp_path):
    shrunk = stitched()
    pruned = shrunk.model.net.layer2[1].conv1
    with torch.no_grad():
        pruned.weight[:2] = 0
    layers = apply(shrunk, STEPS["pair, ratio"], trainer_of(tmp_path)).card.edits[0].layers
    assert "layer2.1.conv2" in layers
    assert "layer2.1.conv1" not in layers
    assert not any(path.startswith(("layer1.0.", "layer3.1.conv1")) for path in layers)
    mobile = STUDENTS["mobilenet_v3_small"]
    for path in apply(mobile, STEPS["pair, ratio"], trainer_of(tmp_path)).card.edits[0].layers:
        layer = mobile.model.net.get_submodule(path)
        assert isinstance(layer, nn.Linear) or layer.groups == 1


def test_layers_that_share_a_weight_are_left_alone(tmp_path):
    shrunk = tied()
    found = apply(shrunk, STEPS["pair, ratio"], trainer_of(tmp_path))
    assert set(found.card.edits[0].layers) == {"stem", "fc"}
    assert found.model.net.right.weight is found.model.net.left.weight
    assert num_parameters(found.model) < num_parameters(shrunk.model)
    x = images_of(found.card)
    assert torch.equal(reloaded(found, tmp_path)(x), found.model(x))


def test_twice_factorizes_no_factor(tmp_path):
    once = apply(STUDENTS["cifar_resnet20"], STEPS["tucker, ratio"], trainer_of(tmp_path))
    with pytest.raises(ShrinkError, match="no convolution or linear layer of cifar_resnet20"):
        apply(once, STEPS["pair, ratio"], trainer_of(tmp_path))


def test_where_nothing_becomes_smaller_it_says_what_to_do(tmp_path):
    with pytest.raises(ShrinkError, match=r"low_rank, energy 0\.999.*lower it, or leave"):
        apply(two_layers(), LowRankStep(energy=0.999999, tune=NO_TUNE), trainer_of(tmp_path))


def test_it_is_trained_and_equal_runs_are_equal(tmp_path):
    step = LowRankStep(ratio=0.5, tune=TuneConfig(epochs=1, batch_size=16))
    first = apply(learner(), step, trainer_of(tmp_path / "a"))
    again = apply(learner(), step, trainer_of(tmp_path / "b"))
    untrained = apply(
        learner(), step.model_copy(update={"tune": NO_TUNE}), trainer_of(tmp_path / "c")
    )
    assert (tmp_path / "a" / "tune.jsonl").is_file()
    assert not (tmp_path / "c" / "tune.jsonl").exists()
    assert tensors_digest(first.model.state_dict()) == tensors_digest(again.model.state_dict())
    assert replace(first, model=None) == replace(again, model=None)
    assert untrained.model.state_dict().keys() == first.model.state_dict().keys()
