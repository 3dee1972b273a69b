"""`low_rank`: a convolution as two or three smaller ones of a lower rank.

Ranks follow from a share of the weights (structure alone) or of the energy (the teacher's weights,
so that ``settle`` writes them into the config).
"""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn

from pbkd.blocks.factors import (
    channel_matrices,
    pair_factors,
    pair_matrices,
    pair_weights,
    rank_of_energy,
    tucker_factors,
    tucker_weights,
)
from pbkd.blocks.kinds.convs import (
    SKIPS,
    Part,
    conv_at,
    conv_like,
    inherit_parts,
    needs_dense,
    with_parts,
)
from pbkd.blocks.kinds.kind import Kind
from pbkd.config import LowRankConfig
from pbkd.errors import CandidateError

Ranks = tuple[int, ...]


def build(config: LowRankConfig, block: nn.Module) -> nn.Module:
    """See ``Kind.build``; inside a block, convolutions that would not become smaller stay."""
    ranks = _ranks(config, block)
    parts = {path: _part(config, conv_at(block, path), rank) for path, rank in ranks.items()}
    return with_parts(block, parts)


def init(config: LowRankConfig, candidate: nn.Module, block: nn.Module, x_nchw: Tensor) -> None:
    """See ``Kind.init``; the inputs are not needed."""
    if config.init == "inherit":
        inherit_parts(candidate, block, _ranks(config, block))


def settle(config: LowRankConfig, block: nn.Module, x_nchw: Tensor) -> LowRankConfig:
    """See ``Kind.settle``: the ranks that keep the energy of the block's weights."""
    if config.energy is None:
        return config
    energy, ranks = config.energy, []
    for path in _convs(config, block):
        conv = conv_at(block, path)
        if config.form == "pair":
            matrices = [pair_matrices(conv.weight, conv.groups)]
        else:
            matrices = list(channel_matrices(conv.weight, conv.groups))
        ranks.append(tuple(rank_of_energy(each, energy) for each in matrices))
    return config.model_copy(update={"ranks": tuple(ranks)})


KIND = Kind(build, init, settle)


class Pair(Part):
    """k x 1, then 1 x k; exact at full rank."""

    def __init__(self, conv: nn.Conv2d, rank: int) -> None:
        inner = rank * conv.groups
        super().__init__(
            OrderedDict(
                vertical=_along(conv, 0, conv.in_channels, inner, bias=False),
                horizontal=_along(conv, 1, inner, conv.out_channels, bias=conv.bias is not None),
            )
        )
        self.rank = rank

    def inherit(self, conv: nn.Conv2d) -> None:
        """Take over the truncated decomposition of a convolution."""
        vertical, horizontal = pair_factors(conv.weight, conv.groups, self.rank)
        self.take(conv, vertical=vertical, horizontal=horizontal)


class Tucker(Part):
    """1 x 1 to fewer channels, k x k, 1 x 1 to the outputs; exact at full ranks."""

    def __init__(self, conv: nn.Conv2d, ranks: tuple[int, int]) -> None:
        groups = conv.groups
        inner, outer = (rank * groups for rank in ranks)
        core = conv_like(conv, inner, outer, groups=groups, bias=False)
        bias = conv.bias is not None
        super().__init__(
            OrderedDict(
                # without a bias: zeros of the padding stay zeros
                reduce=nn.Conv2d(conv.in_channels, inner, 1, groups=groups, bias=False),
                core=core,
                expand=nn.Conv2d(outer, conv.out_channels, 1, groups=groups, bias=bias),
            )
        )
        self.ranks = ranks

    def inherit(self, conv: nn.Conv2d) -> None:
        """Take over the truncated decomposition of a convolution."""
        reduce, core, expand = tucker_factors(conv.weight, conv.groups, self.ranks)
        self.take(conv, reduce=reduce, core=core, expand=expand)


def _part(config: LowRankConfig, conv: nn.Conv2d, ranks: Ranks) -> Part:
    return Pair(conv, ranks[0]) if config.form == "pair" else Tucker(conv, (ranks[0], ranks[1]))


def _convs(config: LowRankConfig, block: nn.Module) -> list[str]:
    """Convolutions with a rank to lower; 1 x 1 ones too for pairs, but for a block's skip."""
    if isinstance(block, nn.Conv2d):
        if config.form == "tucker":
            needs_dense(block, "`form: tucker` has no channels to take out of it; try `pair`")
        elif max(block.kernel_size) == 1 and block.groups == block.in_channels > 1:
            raise CandidateError("is a depthwise 1 x 1 convolution: of rank 1 already")
        return [""]
    found = []
    for path, child in block.named_modules():
        if not isinstance(child, nn.Conv2d):
            continue
        dense, pointwise = child.groups < child.in_channels, max(child.kernel_size) == 1
        if config.form == "tucker":
            fits = dense and not pointwise
        else:
            fits = not pointwise or (dense and path.split(".")[0] not in SKIPS)
        if fits:
            found.append(path)
    if not found:
        raise CandidateError(
            f"{type(block).__name__} holds no convolution (nn.Conv2d) with a rank to lower"
        )
    return found


def _ranks(config: LowRankConfig, block: nn.Module) -> dict[str, Ranks]:
    """Path to ranks, for each convolution that becomes smaller."""
    paths = _convs(config, block)
    if config.energy is not None and len(config.ranks) != len(paths):
        raise CandidateError(
            f"has {len(paths)} convolutions, `ranks` {len(config.ranks)}; leave `ranks` out, take "
            "configs as pbkd.blocks.find_blocks gives them, which settles them"
        )
    ranks = {}
    for index, path in enumerate(paths):
        conv = conv_at(block, path)
        if config.energy is not None:
            rank = config.ranks[index]
        else:
            assert config.ratio is not None
            rank = _rank_of_ratio(config.form, conv, config.ratio)
        if config.form == "pair":
            weights = pair_weights(conv, rank[0])
        else:
            weights = tucker_weights(conv, (rank[0], rank[1]))
        if weights < conv.weight.numel():
            ranks[path] = rank
    if not ranks:
        raise CandidateError("at such a rank its factors have as many weights as the convolution")
    return ranks


def _rank_of_ratio(form: str, conv: nn.Conv2d, ratio: float) -> Ranks:
    """The largest ranks within a share of the weights, at least 1."""
    if form == "pair":
        return (max(1, math.floor(ratio * conv.weight.numel() / pair_weights(conv, 1))),)
    # ranks t*I and t*O, so that the quadratic a*t^2 + b*t = ratio * a, per group
    num_in, num_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    a, b = num_in * num_out * math.prod(conv.kernel_size), num_in**2 + num_out**2
    t = (math.sqrt(b * b + 4 * a * a * ratio) - b) / (2 * a)
    return tuple(max(1, math.floor(t * channels)) for channels in (num_in, num_out))


def _along(conv: nn.Conv2d, axis: int, num_in: int, num_out: int, *, bias: bool) -> nn.Conv2d:
    """A convolution's kernel size, stride, padding and dilation, along one axis only."""

    def only(values: tuple[int, ...], other: int) -> tuple[int, int]:
        return (values[0], other) if axis == 0 else (other, values[1])

    return nn.Conv2d(
        num_in,
        num_out,
        only(conv.kernel_size, 1),
        stride=only(conv.stride, 1),
        padding=conv.padding if isinstance(conv.padding, str) else only(conv.padding, 0),
        dilation=only(conv.dilation, 1),
        groups=conv.groups,
        bias=bias,
        padding_mode=conv.padding_mode,
    )
