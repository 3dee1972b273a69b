"""Recalibrated batch norm against averages taken by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pbkd.config import AugmentConfig
from pbkd.data import Split, Stream
from pbkd.models import NetworkSpec, build_network
from pbkd.students import recalibrate
from pbkd.testing import random_split

BATCH = 16


@pytest.fixture
def train() -> Stream:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (100, 3, 8, 8), dtype=np.uint8)
    split = Split(images, generator.integers(0, 4, 100))
    return Stream(split, seed=1, augment=AugmentConfig(pad=1))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = build_network(
        NetworkSpec(name="cifar_resnet20", num_classes=4, in_channels=3, width=0.25)
    )
    net(torch.rand(4, 3, 8, 8))  # statistics of a life before
    return net.eval()


def norms_of(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def inputs_by_hand(model: nn.Module, train: Stream, num_batches: int) -> dict[str, list[Tensor]]:
    """What each batch norm sees in training mode, batch by batch."""
    model = copy.deepcopy(model).train()
    inputs: dict[str, list[Tensor]] = {}
    for name, norm in norms_of(model).items():
        seen = inputs.setdefault(name, [])
        norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].double()))
    with torch.no_grad():
        for index, batch in enumerate(train.epoch(0, BATCH)):
            if index < num_batches:
                model(batch.images_nchw)
    return inputs


@pytest.mark.parametrize("num_batches", [1, 4])
def test_statistics_are_plain_averages_over_the_batches(net, train, num_batches):
    inputs = inputs_by_hand(net, train, num_batches)
    recalibrate(net, train, num_batches=num_batches, batch_size=BATCH)
    for name, norm in norms_of(net).items():
        assert len(inputs[name]) == num_batches
        mean = torch.stack([x.mean((0, 2, 3)) for x in inputs[name]]).mean(0)
        variance = torch.stack([x.var((0, 2, 3), unbiased=True) for x in inputs[name]]).mean(0)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-4, atol=1e-5)


def test_no_more_batches_are_used_than_an_epoch_has(net, train):
    recalibrate(net, train, num_batches=1000, batch_size=BATCH)
    assert {int(norm.num_batches_tracked) for norm in norms_of(net).values()} == {100 // BATCH}


def test_weights_momentum_and_mode_are_as_before(net, train):
    for index, norm in enumerate(norms_of(net).values()):
        norm.momentum = None if index == 0 else 0.01 * index
    momenta = [norm.momentum for norm in norms_of(net).values()]
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    recalibrate(net, train, num_batches=2, batch_size=BATCH)
    assert [norm.momentum for norm in norms_of(net).values()] == momenta
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())
    assert not any(module.training for module in net.modules())


def test_what_the_statistics_were_does_not_matter(net, train):
    other = copy.deepcopy(net)
    for norm in norms_of(other).values():
        norm.running_mean.fill_(100)
    for model in (net, other):
        recalibrate(model, train, num_batches=2, batch_size=BATCH)
    for own, norm in zip(norms_of(net).values(), norms_of(other).values(), strict=True):
        assert torch.equal(own.running_mean, norm.running_mean)


def test_a_model_without_batch_norm_is_left_alone(train):
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, train, num_batches=2, batch_size=BATCH)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_dropout_does_not_disturb_the_statistics() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.9), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    stream = Stream(random_split(32), seed=0, augment=AugmentConfig())
    found = []
    for _ in range(2):
        recalibrate(net, stream, num_batches=2, batch_size=16)
        found.append(net[2].running_var.clone())
    assert torch.equal(*found)
    plain = nn.Sequential(*list(net)[1:])
    recalibrate(plain, stream, num_batches=2, batch_size=16)
    assert torch.equal(plain[1].running_var, found[0])


def test_batches_of_large_images_are_taken_in_parts(net):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (8, 3, 1024, 1024), dtype=np.uint8)
    train = Stream(Split(images, np.zeros(8, np.int64)), seed=1, augment=AugmentConfig())
    sizes: list[int] = []
    net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    recalibrate(net, train, num_batches=1, batch_size=8)
    assert sizes == [4, 4]
