"""Putting modules into a network and taking them out: its own blocks change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pbkd.blocks import swap, swapped
from pbkd.models import NetworkSpec, build_network
from pbkd.models.zoo import CifarResNet
from pbkd.testing import OverwritingNet


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "overwriting":
        return OverwritingNet().eval()
    spec = NetworkSpec(name=name, num_classes=3, in_channels=1, width=0.1)
    return (CifarResNet((16, 32, 64), 2, spec) if name == "resnet" else build_network(spec)).eval()


PATHS = {
    "vgg_small": ["features.0", "features.3", "features.17"],
    "resnet": ["conv1", "layer1.0", "layer2.0.conv1", "layer3.1"],
    "overwriting": ["stem", "branch", "entry", "tail"],
}


@pytest.mark.parametrize("name", PATHS)
def test_stitching_a_networks_own_blocks_back_gives_its_logits_bit_for_bit(name: str) -> None:
    net = _network(name)
    x_nchw = torch.randn(4, 1, 8, 8)
    expected = net(x_nchw)
    own = {path: copy.deepcopy(net.get_submodule(path)) for path in PATHS[name]}
    originals = swap(net, own)
    assert all(net.get_submodule(path) is module for path, module in own.items())
    assert not any(net.get_submodule(path) is module for path, module in originals.items())
    assert torch.equal(net(x_nchw), expected)


@pytest.mark.parametrize("path", PATHS["resnet"])
def test_another_block_changes_the_logits(path: str) -> None:
    net = _network("resnet")
    x_nchw = torch.randn(4, 1, 8, 8)
    before = net(x_nchw)
    other = copy.deepcopy(net.get_submodule(path))
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    with swapped(net, {path: other}):
        assert not torch.equal(net(x_nchw), before)
    assert torch.equal(net(x_nchw), before)


def test_blocks_return_after_an_exception() -> None:
    net = _network("resnet")
    before = dict(net.named_modules())
    with (
        pytest.raises(ZeroDivisionError),
        swapped(net, {"conv1": nn.Identity(), "layer2.0": nn.Identity()}),
    ):
        raise ZeroDivisionError
    assert dict(net.named_modules()) == before


@pytest.mark.parametrize("training", [True, False])
def test_a_replacement_takes_the_mode_of_what_it_replaces(training: bool) -> None:
    net = _network("resnet").train(training)
    replacement = nn.Sequential(nn.BatchNorm2d(2)).train(not training)
    with swapped(net, {"layer1.1": replacement}):
        assert all(part.training is training for part in net.modules())
    assert all(part.training is training for part in net.modules())


def test_a_block_returns_in_the_mode_that_the_network_has_by_then() -> None:
    net = _network("resnet").train()
    with swapped(net, {"layer1.1": nn.Identity()}):
        net.eval()
    assert not any(part.training for part in net.modules())


def test_parts_that_were_frozen_stay_frozen() -> None:
    net = _network("resnet").train()
    net.get_submodule("layer1.1.bn1").eval()
    with swapped(net, {"layer1.1": nn.Identity()}):
        pass
    assert not net.get_submodule("layer1.1.bn1").training
    assert net.get_submodule("layer1.1.bn2").training


def test_an_unknown_path_changes_nothing() -> None:
    net = _network("resnet")
    before = dict(net.named_modules())
    with pytest.raises(AttributeError):
        swap(net, {"conv1": nn.Identity(), "layer9": nn.Identity()})
    assert dict(net.named_modules()) == before
