"""`grouped`: a k x k convolution in groups, then 1 x 1 over all channels."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from pbkd.blocks.factors import grouped_factors
from pbkd.blocks.kinds.convs import (
    Part,
    conv_at,
    conv_like,
    convs_of,
    inherit_parts,
    needs_dense,
    with_parts,
)
from pbkd.blocks.kinds.kind import Kind
from pbkd.config import GroupedConfig
from pbkd.errors import CandidateError


def build(config: GroupedConfig, block: nn.Module) -> nn.Module:
    """See ``Kind.build``; inside a block, convolutions that cannot be grouped so stay."""
    return with_parts(
        block,
        {path: Grouped(conv_at(block, path), config.groups) for path in _convs(config, block)},
    )


def init(config: GroupedConfig, candidate: nn.Module, block: nn.Module, x_nchw: Tensor) -> None:
    """See ``Kind.init``; the inputs are not needed."""
    inherit_parts(candidate, block, _convs(config, block))


KIND = Kind(build, init)


class Grouped(Part):
    """The first has the stride, padding and dilation, the second the groups and bias."""

    def __init__(self, conv: nn.Conv2d, groups: int) -> None:
        num, bias = conv.in_channels, conv.bias is not None
        super().__init__(
            OrderedDict(
                grouped=conv_like(conv, num, num, groups=groups, bias=False),
                pointwise=nn.Conv2d(num, conv.out_channels, 1, groups=conv.groups, bias=bias),
            )
        )
        self.groups = groups

    def inherit(self, conv: nn.Conv2d) -> None:
        """Take over the best factors of such a form."""
        grouped, pointwise = grouped_factors(conv.weight, conv.groups, self.groups)
        self.take(conv, grouped=grouped, pointwise=pointwise)


def _convs(config: GroupedConfig, block: nn.Module) -> list[str]:
    """Of the dense convolutions, those that such groups divide."""
    if isinstance(block, nn.Conv2d):
        needs_dense(block, "nothing to group")
    paths = convs_of(block)
    fitting = [path for path in paths if _divides(conv_at(block, path), config.groups)]
    if not fitting:
        conv = conv_at(block, paths[0])
        raise CandidateError(
            f"{config.groups} groups do not divide its {conv.in_channels} input channels"
            + (f" in {conv.groups} groups" if conv.groups > 1 else "")
            + "; change `groups`"
        )
    return fitting


def _divides(conv: nn.Conv2d, groups: int) -> bool:
    return conv.in_channels % groups == 0 and groups % conv.groups == 0 and groups > conv.groups
