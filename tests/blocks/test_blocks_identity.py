"""`identity`: what stays where a block is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet

from pbkd.activations import Activation
from pbkd.artifacts import load_tensors
from pbkd.blocks import build_candidate, settle_candidate
from pbkd.config import DistillConfig, IdentityConfig
from pbkd.config.candidates import Place
from pbkd.devices import channels_last, in_channels_last
from pbkd.distill import TraineeSpec
from pbkd.distill.trainee import WEIGHTS, Trainee
from pbkd.measure import count_macs, num_parameters
from pbkd.models.zoo import BasicBlock
from tests.blocks.library import relative_error, seen, started

X_NCHW = torch.randn(8, 8, 10, 7)


def _place(block: nn.Module, size: tuple[int, int] = (10, 7)) -> Place:
    config = settle_candidate(IdentityConfig(), block, torch.zeros(1, 8, *size))
    assert isinstance(config, IdentityConfig)
    assert config.place is not None
    return config.place


def test_a_convolution_that_keeps_the_shape_is_dropped() -> None:
    candidate = started(IdentityConfig(), nn.Conv2d(8, 8, 5, padding=2), X_NCHW)
    assert torch.equal(candidate(X_NCHW), X_NCHW)
    assert (num_parameters(candidate), count_macs(candidate, X_NCHW)) == (0, 0)


@pytest.mark.parametrize("make", [lambda: BasicBlock(8, 8, 1), lambda: resnet.BasicBlock(8, 8)])
def test_of_a_residual_block_its_skip_stays_and_its_last_relu(make: Any) -> None:
    candidate = started(IdentityConfig(), make().eval(), X_NCHW)
    assert torch.equal(candidate(X_NCHW), F.relu(X_NCHW))


def test_a_skip_with_weights_stays_with_them() -> None:
    block = seen(BasicBlock(8, 12, 2), 8, 8)
    for adapter in ("auto", "never"):
        config = IdentityConfig(adapter=adapter)  # type: ignore[arg-type]
        candidate = started(config, block, X_NCHW)
        expected = F.relu(block.downsample(X_NCHW))  # type: ignore[operator]
        torch.testing.assert_close(candidate(X_NCHW), expected)


def test_always_takes_a_convolution_in_place_of_a_skip() -> None:
    block = seen(BasicBlock(8, 12, 2), 8, 8)
    always = started(IdentityConfig(adapter="always"), block, X_NCHW)
    assert [name for name, _ in always.named_children()] == ["every", "adapter", "relu"]
    assert relative_error(always, block, X_NCHW) < 0.3


def _centre_only(conv: nn.Conv2d) -> nn.Conv2d:
    """Keep the tap in the middle of the kernel."""
    rows, columns = ((size - 1) // 2 for size in conv.kernel_size)
    kept = conv.weight[:, :, rows, columns].detach().clone()
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :, rows, columns] = kept
    return conv


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1, "stride": 2},
        {"padding": 1, "stride": (2, 1)},
        {"padding": 0},
        {"padding": 2},
        {"padding": (0, 1), "stride": (1, 2)},
        {"padding": 0, "stride": 2},
        {"padding": "same", "kernel_size": (3, 5)},
        {"padding": "valid", "kernel_size": (1, 5), "stride": 3},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "dilation": 2, "kernel_size": (3, 1)},
        {"padding": 1, "stride": 2, "groups": 4},
        {"padding": 1, "stride": 3, "bias": False},
    ],
)
def test_the_convolution_in_its_place_looks_where_the_kernels_centre_was(
    settings: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    conv = _centre_only(
        nn.Conv2d(**{"in_channels": 8, "out_channels": 12, "kernel_size": 3} | settings)
    )
    candidate = started(IdentityConfig(), conv, torch.randn(64, 8, 10, 7))
    assert relative_error(candidate, conv, X_NCHW) < 1e-3
    other = torch.randn(2, 8, 13, 12)  # settled at another size
    assert relative_error(candidate, conv, other) < 1e-3


@pytest.mark.parametrize(
    ("layers", "stride", "crop"),
    [
        ((nn.Conv2d(8, 4, 3, padding=1), nn.MaxPool2d(2)), (2, 2), (0, 0, 0, 0)),
        ((nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 3)), (1, 1), (2, 2, 2, 2)),
        ((nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1)), (10, 7), (0, 0, 0, 0)),
        ((nn.Conv2d(8, 4, 3, stride=4, padding=1), nn.ReLU()), (4, 4), (0, 0, 0, 0)),
    ],
)
def test_of_other_blocks_stride_and_crop_follow_from_the_sizes(
    layers: tuple[nn.Module, ...], stride: tuple[int, int], crop: tuple[int, ...]
) -> None:
    block = nn.Sequential(*layers).eval()
    place = _place(block)
    assert place.stride == stride
    candidate = started(IdentityConfig(), block, X_NCHW)
    assert candidate(X_NCHW).shape == block(X_NCHW).shape
    if crop != (0, 0, 0, 0):
        assert place.crop == crop


def test_an_identity_is_trained_as_others_are(tmp_path: Path) -> None:
    """It has nothing to learn: it ends before the first epoch, with a loss and a file."""
    candidate = started(IdentityConfig(), nn.Conv2d(8, 8, 3, padding=1), X_NCHW)
    spec = TraineeSpec(block="a", config=IdentityConfig(), seed=0, key="k", score_key="s")
    trainee = Trainee(spec, candidate, DistillConfig(), 10, tmp_path / "k.jsonl")
    activation = Activation(X_NCHW, X_NCHW + 1)
    trainee.step(activation)  # as the profile does
    trainee.end_epoch(float(trainee.batch_loss(activation)))
    assert not trainee.active
    trainee.write(tmp_path)
    assert load_tensors(tmp_path / WEIGHTS) == {}


def test_a_dropped_block_leaves_its_input_to_others() -> None:
    """What follows may work in place: an identity gives a tensor of its own."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))
    config = settle_candidate(IdentityConfig(), net[0], torch.randn(2, 4, 6, 6))
    assert isinstance(config, IdentityConfig)
    net[0] = build_candidate(config, net[0])
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    net(x)
    assert torch.equal(x, before)


def test_a_strided_adapter_learns() -> None:
    """A strided 1 x 1 convolution of three channels crashed in its backward pass (torch 2.14)."""
    block = channels_last(nn.Conv2d(3, 64, 3, stride=2))
    x = in_channels_last(torch.randn(33, 3, 64, 64))
    candidate = build_candidate(settle_candidate(IdentityConfig(), block, x), block)
    y = candidate(x.clone())
    assert y.shape == block(x).shape
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in candidate.parameters())
