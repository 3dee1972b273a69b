"""Decompositions against numpy's and against brute force: `low_rank`, `grouped`, `bottleneck`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pbkd.blocks.factors import (
    channel_matrices,
    fit_pointwise,
    grouped_factors,
    pair_factors,
    pair_matrices,
    rank_of_energy,
    tucker_factors,
)
from pbkd.blocks.inherit import rank_one_factors
from pbkd.blocks.kinds import low_rank
from pbkd.blocks.kinds.low_rank import Pair, Tucker
from pbkd.config import BottleneckConfig, GroupedConfig, LowRankConfig
from pbkd.measure import num_parameters
from tests.blocks.library import CONVS, conv_of, inputs_for, started

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def _full_rank(conv: nn.Conv2d) -> int:
    matrices = pair_matrices(conv.weight, conv.groups)
    return min(matrices.shape[1:])


@pytest.mark.parametrize("name", CONVS)
def test_at_full_rank_the_factors_give_the_convolution(name: str) -> None:
    conv = conv_of(name).double()
    sides = (conv.in_channels // conv.groups, conv.out_channels // conv.groups)
    x_nchw = inputs_for(conv).double()
    for part in (Pair(conv, _full_rank(conv)), Tucker(conv, sides)):
        part.double().inherit(conv)
        torch.testing.assert_close(part(x_nchw), conv(x_nchw))


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(6, 6, 5, padding=2, groups=6), nn.Conv2d(6, 9, 1), nn.Conv2d(6, 8, 1, 2)]
)
def test_depthwise_and_1x1_convolutions_have_pairs(conv: nn.Conv2d) -> None:
    part = Pair(conv, _full_rank(conv))
    part.inherit(conv)
    x_nchw = torch.randn(2, 6, 9, 7)
    torch.testing.assert_close(part(x_nchw), conv(x_nchw), atol=1e-5, rtol=1e-4)


def test_large_matrices_are_exact_too() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(260, 260, (3, 1), bias=False)
    part = Pair(conv, _full_rank(conv))
    part.inherit(conv)
    x_nchw = torch.randn(1, 260, 4, 2)
    torch.testing.assert_close(part(x_nchw), conv(x_nchw), atol=1e-4, rtol=1e-4)


def _of_pair(weight: Tensor, groups: int, rank: int) -> Tensor:
    vertical, horizontal = pair_factors(weight, groups, rank)
    per_group = weight.shape[0] // groups
    kernels = [
        torch.einsum(
            "rih,orw->oihw",
            vertical[group * rank : (group + 1) * rank, :, :, 0],
            horizontal[group * per_group : (group + 1) * per_group, :, 0],
        )
        for group in range(groups)
    ]
    return torch.cat(kernels)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_of_a_pair_is_the_tail_of_singular_values(groups: int, rank: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 5, dtype=torch.float64)
    tail = 0.0
    for matrix in pair_matrices(weight, groups).numpy():
        tail += float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())
    error = float((_of_pair(weight, groups, rank) - weight).square().sum())
    assert error == pytest.approx(tail, rel=1e-9)


def _of_tucker(weight: Tensor, ranks: tuple[int, int], iterations: int) -> Tensor:
    first, core, last = tucker_factors(weight, 1, ranks, iterations)
    return torch.einsum("rihw,srHW,oshw->oiHW", first, core, last)


def test_iterations_bring_tucker_nearer_than_the_truncated_decomposition() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    inner, outer = (torch.linalg.svd(m[0])[0] for m in channel_matrices(weight, 1))
    projected = torch.einsum(
        "oihw,ij,op->pjhw", weight, inner[:, :2] @ inner[:, :2].T, outer[:, :3] @ outer[:, :3].T
    )
    truncated = float((projected - weight).norm())
    errors = [float((_of_tucker(weight, (2, 3), n) - weight).norm()) for n in (1, 3, 30)]
    assert truncated > errors[0] >= errors[1] >= errors[2]
    assert errors[1] == pytest.approx(errors[2], rel=1e-2)


def test_a_kernel_of_low_multilinear_rank_is_found() -> None:
    torch.manual_seed(0)
    factors = (torch.randn(shape).double() for shape in ((2, 3, 3, 3), (8, 2), (6, 3)))
    weight = torch.einsum("srhw,os,ir->oihw", *factors)
    torch.testing.assert_close(_of_tucker(weight, (3, 2), 1), weight)
    assert [rank_of_energy(m, 0.9999) for m in channel_matrices(weight, 1)] == [3, 2]


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_rank_of_an_energy_is_the_least_that_keeps_it(energy: float, groups: int) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(groups, 7, 9, dtype=torch.float64)
    squares = (np.linalg.svd(matrices.numpy(), compute_uv=False) ** 2).sum(0)
    shares = squares.cumsum() / squares.sum()
    expected = next(rank for rank in range(1, 8) if shares[rank - 1] >= energy)
    assert rank_of_energy(matrices, energy) == expected


def test_a_kernel_of_zeros_has_rank_1_and_stays_finite() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    nn.init.zeros_(conv.weight)
    x_nchw = torch.randn(2, 8, 6, 6)
    for form in ("pair", "tucker"):
        config = LowRankConfig(form=form, energy=0.9)  # type: ignore[arg-type]
        candidate = started(config, conv, x_nchw)
        torch.testing.assert_close(candidate(x_nchw), conv(x_nchw))
        assert all(parameter.isfinite().all() for parameter in candidate.parameters())


@pytest.mark.parametrize("form", ["pair", "tucker"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_ratio_gives_the_largest_ranks_within_it(form: str, ratio: float, groups: int) -> None:
    conv = nn.Conv2d(32, 48, 3, groups=groups, bias=False)
    config = LowRankConfig(form=form, ratio=ratio)  # type: ignore[arg-type]
    candidate = low_rank.build(config, conv)
    limit = ratio * conv.weight.numel()
    assert num_parameters(candidate) <= limit
    if form == "pair":
        assert isinstance(candidate, Pair)
        larger: nn.Module = Pair(conv, candidate.rank + 1)
    else:
        assert isinstance(candidate, Tucker)
        larger = Tucker(conv, (candidate.ranks[0] + 1, candidate.ranks[1] + 2))
    assert num_parameters(larger) > limit


def test_inside_a_block_what_would_not_become_smaller_stays() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 16, 3), nn.Conv2d(16, 16, 3))
    candidate = started(LowRankConfig(ratio=0.5), block.eval(), torch.randn(2, 1, 8, 8))
    kinds = [type(part).__name__ for part in candidate.children()]
    assert kinds == ["Conv2d", "ReLU", "Pair", "Pair"]
    assert torch.equal(candidate[0].weight, block[0].weight)  # type: ignore[index, arg-type]


# ---------------------------------------------------------------- grouped, bottleneck


def test_with_a_group_per_channel_the_factors_are_those_of_a_separable_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    for groups in (1, 2):
        grouped, pointwise = grouped_factors(weight, groups, 4 * groups)
        depthwise, other = rank_one_factors(weight, groups)
        scale = (grouped / depthwise)[:, :, :1, :1]
        torch.testing.assert_close(grouped, depthwise * scale)  # up to their signs
        torch.testing.assert_close(scale.abs(), torch.ones_like(scale))
        torch.testing.assert_close(pointwise.abs(), other.abs())


@pytest.mark.parametrize("outer", [1, 2])
def test_a_kernel_of_the_grouped_form_is_inherited_exactly(outer: int) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
    last = nn.Conv2d(8, 12, 1, groups=outer, bias=False)
    conv = nn.Conv2d(8, 12, 3, padding=1, groups=outer)
    delta = torch.zeros(8, 8, 5, 5)
    delta[range(8), range(8), 2, 2] = 1
    with torch.no_grad():  # the response to a point in each channel is the kernel, turned round
        response = last(first(delta))[:, :, 1:4, 1:4].flip(2, 3).transpose(0, 1)
        each = 8 // outer
        rows = [response[o, (o // (12 // outer)) * each :][:each] for o in range(12)]
        conv.weight.copy_(torch.stack(rows))
    x_nchw = torch.randn(2, 8, 7, 5)
    candidate = started(GroupedConfig(groups=4), conv, x_nchw)
    torch.testing.assert_close(candidate(x_nchw), conv(x_nchw), atol=1e-5, rtol=1e-4)


def test_fewer_outputs_than_a_groups_inputs_leave_zeros() -> None:
    conv = nn.Conv2d(8, 2, 3)
    x_nchw = torch.randn(2, 8, 7, 5)
    candidate = started(GroupedConfig(groups=2), conv, x_nchw)
    torch.testing.assert_close(candidate(x_nchw), conv(x_nchw), atol=1e-5, rtol=1e-4)


def test_a_bottleneck_with_batch_norm_fits_its_last_layer() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    x_nchw = torch.randn(16, 8, 9, 9)
    candidate = started(BottleneckConfig(ratio=0.5, batch_norm=True), block, x_nchw)
    with torch.no_grad():
        got, expected = candidate(x_nchw), block(x_nchw)
        error = float((got - expected).square().mean())
        for name, parameter in candidate.named_parameters():
            if "expand.bias" in name:
                parameter.add_(0.05)  # any other mean is worse
        worse = float((candidate(x_nchw) - expected).square().mean())
    torch.testing.assert_close(got.mean((0, 2, 3)), expected.mean((0, 2, 3)), atol=1e-3, rtol=1e-2)
    assert error < worse


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_map_is_found_by_least_squares(groups: int, bias: bool) -> None:
    torch.manual_seed(0)
    truth = nn.Conv2d(6, 4, 1, groups=groups, bias=bias)
    found = nn.Conv2d(6, 4, 1, groups=groups, bias=bias)
    x_nchw = torch.randn(64, 6, 8, 8) + 1
    with torch.no_grad():
        fit_pointwise(found, x_nchw, truth(x_nchw))
    torch.testing.assert_close(found.weight, truth.weight, atol=1e-3, rtol=0)
    if bias:
        torch.testing.assert_close(found.bias, truth.bias, atol=1e-3, rtol=0)


def test_channels_of_zeros_do_not_break_the_least_squares() -> None:
    conv = nn.Conv2d(6, 4, 1)
    fit_pointwise(conv, torch.zeros(2, 6, 3, 3), torch.ones(2, 4, 3, 3))
    torch.testing.assert_close(
        conv(torch.zeros(1, 6, 3, 3)), torch.ones(1, 4, 3, 3), atol=0.1, rtol=0
    )
