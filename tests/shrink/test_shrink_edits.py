"""Structures that are built again from a card's edits."""

from __future__ import annotations

import pytest
import torch
from tiny_students import card_of, images_of, student_of
from torch import nn

from pbkd.config import Factorized, LowRankConfig, Resized
from pbkd.errors import ArtifactError
from pbkd.measure import num_parameters
from pbkd.students import apply_edits, build_model, load_model
from pbkd.students.edits import LinearPair, sizes_of


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
        nn.LayerNorm(5),
    )


RESIZED = Resized(
    layers={
        "0": (6, 3, 1),
        "1": (6,),
        "2": (6,),
        "3": (6, 6, 6),
        "4": (6,),
        "6": (4, 96),
        "7": (4,),
    }
)


def test_layers_have_the_sizes_of_the_edit_and_run():
    net = small_net()
    apply_edits(net, [RESIZED])
    assert {path: sizes_of(net)[path] for path in RESIZED.layers} == RESIZED.layers
    assert net(torch.rand(2, 3, 4, 4)).shape == (2, 4)
    # by hand: 6*3*9+6, 2*6, 6, 6*9, 2*6, 4*96+4, 2*4
    assert num_parameters(net) == 168 + 12 + 6 + 54 + 12 + 388 + 8
    assert net[1].running_mean.shape == net[1].running_var.shape == (6,)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_fresh_weights_are_numbers_and_learn_where_the_old_ones_did():
    net = small_net()
    net[0].requires_grad_(False)
    net.eval()
    apply_edits(net, [RESIZED, Factorized(layers={"6": LowRankConfig(ratio=0.9)})])
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert net[0].weight.std() > 0
    assert net[1].running_var.tolist() == [1.0] * 6
    assert net[1].bias.tolist() == [0.0] * 6
    assert not net[0].weight.requires_grad
    assert net[1].weight.requires_grad
    assert not any(module.training for module in net.modules())


def test_edits_are_applied_in_their_order():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    apply_edits(
        net,
        [
            Resized(layers={"0": (6, 8), "1": (3, 6)}),
            Factorized(layers={"0": LowRankConfig(energy=0.5, ranks=((3,),))}),
            Resized(layers={"0.reduce": (2, 8), "0.expand": (6, 2)}),
        ],
    )
    assert isinstance(net[0], LinearPair)
    assert num_parameters(net) == 2 * 8 + 6 * 2 + 6 + 3 * 6 + 3


def test_a_parameter_of_no_layer_can_be_resized():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4, 1, 1))

    net = nn.Sequential(Scaled())
    assert sizes_of(net) == {"0.scale": (4, 1, 1)}
    apply_edits(net, [Resized(layers={"0.scale": (2, 1, 1)})])
    assert net[0].scale.shape == (2, 1, 1)


@pytest.mark.parametrize(
    ("path", "sizes", "message"),
    [
        ("9", (1,), "edit of 9: Sequential has no such layer"),
        ("0", (6, 3), r"edit of 0: got sizes \(6, 3\), expected 3 of at most \(8, 3, 1\)"),
        ("0", (9, 3, 1), "edit of 0: got sizes"),
        ("3", (6, 6, 4), r"edit of 3: got sizes \(6, 6, 4\), expected channels that 4 groups"),
        ("4", (5,), "edit of 4: .* 2 groups divide"),
        ("5", (5,), "edit of 5: Flatten has no channels"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused(path, sizes, message):
    with pytest.raises(ArtifactError, match=message):
        apply_edits(small_net(), [Resized(layers={path: sizes})])


@pytest.mark.parametrize(
    ("path", "config"),
    [
        ("1", LowRankConfig(ratio=0.5)),
        ("0", LowRankConfig(energy=0.5)),  # not settled
        ("6", LowRankConfig(energy=0.5)),
        ("6", LowRankConfig(energy=0.5, ranks=((500,),))),
        ("9", LowRankConfig(ratio=0.5)),
    ],
)
def test_a_factorization_that_does_not_fit_is_refused(path, config):
    with pytest.raises(ArtifactError, match=f"edit of {path}: "):
        apply_edits(small_net(), [Factorized(layers={path: config})])


def test_a_card_with_edits_of_another_network_is_refused(tmp_path):
    shrunk = student_of(card_of("vgg_small"))
    card = shrunk.card.model_copy(update={"edits": (Resized(layers={"conv1": (1, 1, 1)}),)})
    with pytest.raises(ArtifactError, match="edit of conv1: Vgg has no such layer"):
        build_model(card)
    shrunk.save(tmp_path)
    assert load_model(tmp_path)[1].edits == ()


def test_a_given_network_stands_for_the_one_that_the_card_names():
    shrunk = student_of(card_of("vgg_small"))
    unknown = shrunk.card.network.model_copy(update={"name": "Mine"})
    card = shrunk.card.model_copy(update={"network": unknown})
    net = build_model(shrunk.card).net
    model = build_model(card, net).eval()
    model.load_state_dict(shrunk.model.state_dict())
    x = images_of(card)
    assert torch.equal(model(x), shrunk.model(x))
