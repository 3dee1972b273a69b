"""The kind `separable`: shapes, counts by hand, and weights inherited from the teacher's kernel."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet

from pbkd.blocks import build_candidate, candidate_name, init_candidate
from pbkd.blocks.candidates import Separable
from pbkd.blocks.inherit import rank_one_factors
from pbkd.config import SeparableConfig
from pbkd.errors import CandidateError
from pbkd.measure import count_macs, num_parameters
from pbkd.models.zoo import BasicBlock

PLAIN = SeparableConfig()
DEEP = SeparableConfig(depth=2)
NORMED = SeparableConfig(batch_norm=True)
DEEP_NORMED = SeparableConfig(depth=2, batch_norm=True)
RANDOM = SeparableConfig(init="random")
ALL = [PLAIN, DEEP, NORMED, DEEP_NORMED]


def _inherited(config: SeparableConfig, block: nn.Module, x_nchw: Tensor) -> nn.Module:
    """The candidate as training would start with it, in evaluation mode."""
    candidate = build_candidate(config, block).to(x_nchw.dtype).eval()
    init_candidate(config, candidate, block, x_nchw)
    return candidate


# ---------------------------------------------------------------- structure


@st.composite
def _convs(draw: st.DrawFn) -> nn.Conv2d:
    groups = draw(st.integers(1, 3))
    same = draw(st.booleans())
    pair = st.tuples(st.integers(0, 2), st.integers(0, 2))
    return nn.Conv2d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        stride=1 if same else draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding="same" if same else draw(pair),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    ).eval()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=60, deadline=None)
@given(conv=_convs(), config=st.sampled_from([*ALL, RANDOM]))
def test_a_candidate_gives_the_shape_of_its_convolution(
    conv: nn.Conv2d, config: SeparableConfig
) -> None:
    x_nchw = torch.rand(2, conv.in_channels, 9, 8)
    candidate = _inherited(config, conv, x_nchw)
    assert candidate(x_nchw).shape == conv(x_nchw).shape
    names = [name.rstrip("01") for name, _ in candidate.named_children()]
    pair = ["depthwise", "norm", "pointwise"] if config.batch_norm else ["depthwise", "pointwise"]
    assert names == (pair if config.depth == 1 else [*pair, "relu", *pair])


CONV = {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": 1}


@pytest.mark.parametrize(
    ("settings", "config", "parameters", "macs"),
    [
        (CONV, PLAIN, 54 + 48 + 8, 64 * (54 + 48)),
        (CONV | {"bias": False}, PLAIN, 54 + 48, 64 * (54 + 48)),
        (CONV | {"groups": 2}, PLAIN, 54 + 24 + 8, 64 * (54 + 24)),
        (CONV | {"stride": 2}, PLAIN, 54 + 48 + 8, 16 * (54 + 48)),
        (CONV | {"kernel_size": (1, 5), "padding": 0}, PLAIN, 30 + 48 + 8, 32 * (30 + 48)),
        (CONV | {"dilation": 2, "padding": 0}, PLAIN, 54 + 48 + 8, 16 * (54 + 48)),
        (CONV, NORMED, 54 + 12 + 48 + 8, 64 * (54 + 48)),
        (CONV, DEEP, 54 + 36 + 54 + 48 + 8, 64 * (54 + 36 + 54 + 48)),
        (CONV | {"stride": 2}, DEEP, 90 + 102 + 8, 64 * 90 + 16 * 102),
        (CONV | {"groups": 2}, DEEP, 54 + 18 + 54 + 24 + 8, 64 * (54 + 18 + 54 + 24)),
        (CONV, DEEP_NORMED, 90 + 12 + 102 + 12 + 8, 64 * (90 + 102)),
    ],
)
def test_parameters_and_macs_by_hand(
    settings: dict[str, Any], config: SeparableConfig, parameters: int, macs: int
) -> None:
    candidate = build_candidate(config, nn.Conv2d(**settings))
    assert num_parameters(candidate) == parameters
    assert count_macs(candidate, torch.rand(1, 6, 8, 8)) == macs


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (PLAIN, "separable"),
        (DEEP, "separable-depth.2"),
        (DEEP_NORMED, "separable-depth.2-batch_norm.true"),
        (RANDOM, "separable-init.random"),
    ],
)
def test_a_name_tells_what_is_not_the_default(config: SeparableConfig, name: str) -> None:
    assert candidate_name(config) == name


# ---------------------------------------------------------------- inheriting a convolution

KINDS = [
    CONV,
    CONV | {"bias": False, "stride": 2},
    CONV | {"groups": 2},
    CONV | {"in_channels": 6, "out_channels": 6, "groups": 6},
    CONV | {"kernel_size": (1, 5), "padding": "same", "padding_mode": "circular"},
    CONV | {"kernel_size": 5, "dilation": 2, "padding": 4, "padding_mode": "reflect"},
]


def _conv64(settings: dict[str, Any], seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(**settings).double().eval()


def _make_separable(conv: nn.Conv2d) -> None:
    """Give a convolution a kernel that is an outer product for each input channel."""
    num_out, in_per_group, *kernel = conv.weight.shape
    shapes = torch.randn(conv.groups, 1, in_per_group, *kernel, dtype=torch.float64)
    factors = torch.randn(conv.groups, num_out // conv.groups, in_per_group, 1, 1).double()
    with torch.no_grad():
        conv.weight.copy_((shapes * factors).reshape(conv.weight.shape))


@pytest.mark.parametrize("settings", KINDS)
def test_a_separable_kernel_is_inherited_exactly(settings: dict[str, Any]) -> None:
    conv = _conv64(settings)
    _make_separable(conv)
    x_nchw = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(_inherited(PLAIN, conv, x_nchw)(x_nchw), conv(x_nchw))


def _composed(conv: nn.Conv2d) -> Tensor:
    """The kernel of the two inherited convolutions, one after the other."""
    depthwise, pointwise = rank_one_factors(conv.weight, conv.groups)
    num_out, in_per_group = pointwise.shape[:2]
    out_per_group = num_out // conv.groups
    rows = []
    for out in range(num_out):
        first = (out // out_per_group) * in_per_group
        rows.append(pointwise[out] * depthwise[first : first + in_per_group, 0])
    return torch.stack(rows).detach()


@pytest.mark.parametrize("settings", KINDS)
def test_the_error_of_any_other_kernel_is_its_tail_of_singular_values(
    settings: dict[str, Any],
) -> None:
    conv = _conv64(settings)
    weight = conv.weight.detach().numpy()
    out_per_group, in_per_group = conv.out_channels // conv.groups, weight.shape[1]
    tail = 0.0
    for channel in range(conv.in_channels):
        group, within = divmod(channel, in_per_group)
        kernels = weight[group * out_per_group : (group + 1) * out_per_group, within]
        values = np.linalg.svd(kernels.reshape(out_per_group, -1), compute_uv=False)
        tail += float((values[1:] ** 2).sum())
    error = float((_composed(conv) - conv.weight.detach()).square().sum())
    assert error == pytest.approx(tail, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize("settings", KINDS)
def test_depth_2_starts_as_depth_1_on_inputs_that_are_not_negative(
    settings: dict[str, Any],
) -> None:
    conv = _conv64(settings)
    x_nchw = torch.rand(2, 6, 9, 9, dtype=torch.float64)
    one, two = _inherited(PLAIN, conv, x_nchw), _inherited(DEEP, conv, x_nchw)
    assert len(two) == len(one) + 3  # type: ignore[arg-type]
    torch.testing.assert_close(two(x_nchw), one(x_nchw))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("settings", KINDS)
def test_a_batch_norm_starts_as_if_it_were_not_there(settings: dict[str, Any], depth: int) -> None:
    conv = _conv64(settings)
    x_nchw = torch.randn(4, 6, 9, 9, dtype=torch.float64) + 2
    plain = _inherited(SeparableConfig(depth=depth), conv, x_nchw)  # type: ignore[arg-type]
    config = SeparableConfig(depth=depth, batch_norm=True)  # type: ignore[arg-type]
    normed = _inherited(config, conv, x_nchw)
    torch.testing.assert_close(normed(x_nchw), plain(x_nchw))
    # its statistics are those of the batch, so training mode changes nothing either
    torch.testing.assert_close(normed.train()(x_nchw), plain(x_nchw))


def test_a_kernel_of_ones_by_hand() -> None:
    conv = nn.Conv2d(1, 2, 3, bias=False).eval()
    nn.init.ones_(conv.weight)
    candidate = _inherited(PLAIN, conv, torch.rand(1, 1, 5, 5))
    depthwise, pointwise = (part.weight.detach() for part in candidate)  # type: ignore[union-attr]
    product = depthwise.flatten()[:, None] * pointwise.flatten()  # type: ignore[operator]
    torch.testing.assert_close(product, torch.ones(9, 2))
    # the singular value, sqrt(18), is shared
    torch.testing.assert_close(depthwise.norm(), pointwise.norm())  # type: ignore[operator]


def test_random_weights_come_from_the_seed_and_not_from_the_teacher() -> None:
    conv = _conv64(CONV).float()
    x_nchw = torch.rand(2, 6, 8, 8)
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(_inherited(RANDOM, conv, x_nchw).state_dict())
    inherited = _inherited(PLAIN, conv, x_nchw).state_dict()
    assert states[0].keys() == inherited.keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
        assert not torch.equal(value, states[2][name])
        assert not torch.equal(value, inherited[name])


# ---------------------------------------------------------------- whole blocks


def _randomise(block: nn.Module) -> nn.Module:
    """Kernels that are separable, and batch norms that have seen something."""
    torch.manual_seed(0)
    for part in block.double().modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight)
        elif isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1):
            _make_separable(part)
    return block.eval()


WHOLE = {
    "pbkd": (lambda: BasicBlock(4, 6, 2), ["conv1", "conv2"]),
    "torchvision": (lambda: resnet.BasicBlock(4, 4), ["conv1", "conv2"]),
    "bottleneck": (lambda: resnet.Bottleneck(4, 4, downsample=nn.Conv2d(4, 16, 1)), ["conv2"]),
    "sequence": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)), ["1"]),
}


@pytest.mark.parametrize("config", [PLAIN, NORMED])
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_block_keeps_skip_and_norms_and_inherits(
    name: str, config: SeparableConfig
) -> None:
    make, convs = WHOLE[name]
    block = _randomise(make())
    x_nchw = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    candidate = _inherited(config, block, x_nchw)
    replaced = [path for path, part in candidate.named_modules() if isinstance(part, Separable)]
    assert replaced == convs
    assert type(candidate) is type(block)
    state, kept = block.state_dict(), candidate.state_dict()
    for key, value in state.items():
        if not any(key.startswith(path + ".") for path in convs):
            assert torch.equal(kept[key], value)
    torch.testing.assert_close(candidate(x_nchw.clone()), block(x_nchw.clone()))


@pytest.mark.parametrize("config", [*ALL, RANDOM])
def test_a_candidate_shares_nothing_with_its_block(config: SeparableConfig) -> None:
    block = BasicBlock(4, 4, 1)
    before = copy.deepcopy(block.state_dict())
    candidate = _inherited(config, block, torch.rand(2, 4, 6, 6))
    with torch.no_grad():
        for parameter in candidate.parameters():
            parameter.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("config", ALL)
def test_initialising_leaves_the_inputs_and_the_mode_alone(config: SeparableConfig) -> None:
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    x_nchw = torch.randn(2, 4, 6, 6)
    before = x_nchw.clone()
    candidate = build_candidate(config, block)
    init_candidate(config, candidate, block, x_nchw)
    assert torch.equal(x_nchw, before)
    assert all(part.training for part in candidate.modules())
    assert not any(part._forward_pre_hooks for part in candidate.modules())


@pytest.mark.parametrize(
    "block", [nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4)], ids=lambda b: str(b)
)
def test_a_block_without_a_dense_convolution_has_no_candidate(block: nn.Module) -> None:
    with pytest.raises(CandidateError, match="holds no dense k x k convolution"):
        build_candidate(PLAIN, nn.Sequential(block))


def test_a_separable_pair_equals_its_convolutions_by_hand() -> None:
    conv = _conv64(CONV | {"stride": 2})
    x_nchw = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    candidate = _inherited(PLAIN, conv, x_nchw)
    expected = F.conv2d(x_nchw, _composed(conv), conv.bias, stride=2, padding=1)
    torch.testing.assert_close(candidate(x_nchw), expected)
