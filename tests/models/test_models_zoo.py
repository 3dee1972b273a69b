"""The zoo: parameter counts by hand, names, width."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pbkd.errors import TeacherError
from pbkd.measure import count_macs, num_parameters
from pbkd.models import Classifier, NetworkSpec, build_network, network_names
from pbkd.models.zoo import BasicBlock, CifarResNet


def _spec(name: str, *, channels: int = 3, classes: int = 10, width: float = 1.0) -> NetworkSpec:
    return NetworkSpec(name=name, num_classes=classes, in_channels=channels, width=width)


def _conv_parameters(net: nn.Module) -> int:
    return sum(num_parameters(m) for m in net.modules() if isinstance(m, nn.Conv2d))


def test_resnet20_has_the_known_number_of_parameters() -> None:
    # 269,722 with shortcuts free of parameters, and two projections with their batch norms
    expected = 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert expected == 272_474
    assert num_parameters(build_network(_spec("resnet20"))) == expected


@pytest.mark.parametrize(
    ("name", "num_convs", "parameters"),
    [
        ("vgg11", 8, 9_217_728),
        ("vgg13", 10, 9_402_048),
        ("vgg16", 13, 14_710_464),
        ("vgg19", 16, 20_018_880),
    ],
)
def test_vgg_convolutions_have_the_known_number_of_parameters(
    name: str, num_convs: int, parameters: int
) -> None:
    with torch.device("meta"):
        net = build_network(_spec(name))
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == num_convs
    assert _conv_parameters(net) == parameters
    norms = sum(2 * m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert num_parameters(net) == parameters + norms + 512 * 10 + 10


def test_a_narrow_vgg_by_hand() -> None:
    channels = [1, 8, 8, 16, 16, 32, 32]
    pairs = list(itertools.pairwise(channels))
    convs = sum(9 * i * o for i, o in pairs)
    norms = sum(2 * o for _, o in pairs)
    net = build_network(_spec("vgg_small", channels=1, classes=3, width=0.25))
    assert num_parameters(net) == convs + norms + 32 * 3 + 3
    pixels = [64, 64, 16, 16, 4, 4]
    macs = sum(p * 9 * i * o for p, (i, o) in zip(pixels, pairs, strict=True)) + 32 * 3
    assert count_macs(net, torch.rand(1, 1, 8, 8)) == macs


def test_a_narrow_resnet_by_hand() -> None:
    w1, w2, w3 = 2, 4, 8
    stem = 9 * w1 + 2 * w1
    group1 = 6 * (9 * w1 * w1 + 2 * w1)
    group2 = 9 * w1 * w2 + 5 * 9 * w2 * w2 + 6 * 2 * w2 + w1 * w2 + 2 * w2
    group3 = 9 * w2 * w3 + 5 * 9 * w3 * w3 + 6 * 2 * w3 + w2 * w3 + 2 * w3
    net = build_network(_spec("resnet20", channels=1, classes=3, width=0.125))
    assert num_parameters(net) == stem + group1 + group2 + group3 + w3 * 3 + 3
    macs = 64 * (9 * w1 + 6 * 9 * w1 * w1)
    macs += 16 * (9 * w1 * w2 + 5 * 9 * w2 * w2 + w1 * w2)
    macs += 4 * (9 * w2 * w3 + 5 * 9 * w3 * w3 + w2 * w3)
    assert count_macs(net, torch.rand(1, 1, 8, 8)) == macs + w3 * 3


@pytest.mark.parametrize(("name", "num_convs"), [("resnet20", 19), ("resnet56", 55)])
def test_a_resnet_is_as_deep_as_its_name_says(name: str, num_convs: int) -> None:
    net = build_network(_spec(name, width=0.1))
    assert isinstance(net, CifarResNet)
    kernels = [m.kernel_size for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert kernels.count((3, 3)) == num_convs
    assert kernels.count((1, 1)) == 2


def test_a_width_never_leaves_a_layer_without_channels() -> None:
    net = build_network(_spec("vgg_small", width=0.001))
    assert {m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)} == {1}


@pytest.mark.parametrize("name", network_names())
def test_every_network_gives_logits(name: str) -> None:
    net = build_network(_spec(name, channels=2, classes=5, width=0.05)).eval()
    assert net(torch.rand(2, 2, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet2O", "did you mean `resnet20`"),
        ("vgg-16", "did you mean `vgg16`"),
        ("alexnet", "known are vgg_small, vgg11"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(TeacherError, match=f"unknown network `{name}`; {said}"):
        build_network(_spec(name))


def test_a_residual_block_adds_its_skip() -> None:
    block = BasicBlock(2, 2, 1).eval()
    nn.init.zeros_(block.bn2.weight)
    x_nchw = torch.randn(2, 2, 4, 4)
    assert torch.equal(block(x_nchw), x_nchw.relu())


def test_a_classifier_normalises_its_images() -> None:
    images = torch.rand(2, 2, 3, 3)
    model = Classifier(nn.Identity(), (0.5, 0.25), (0.1, 2.0))
    expected = torch.stack([(images[:, 0] - 0.5) / 0.1, (images[:, 1] - 0.25) / 2], dim=1)
    assert torch.equal(model(images), expected)
