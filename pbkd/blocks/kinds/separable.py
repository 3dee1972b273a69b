"""`separable`: depthwise and pointwise convolutions for a k x k convolution."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from pbkd.blocks.inherit import neutral_batch_norms, pass_through, rank_one_factors
from pbkd.blocks.kinds.convs import Part, conv_at, convs_of, inherit_parts, inputs_of, with_parts
from pbkd.blocks.kinds.kind import Kind
from pbkd.config import SeparableConfig


def build(config: SeparableConfig, block: nn.Module) -> nn.Module:
    """See ``Kind.build``."""
    return with_parts(
        block, {path: Separable(config, conv_at(block, path)) for path in convs_of(block)}
    )


def init(config: SeparableConfig, candidate: nn.Module, block: nn.Module, x_nchw: Tensor) -> None:
    """See ``Kind.init``; the inputs set the batch norms."""
    if config.init == "random":
        return
    parts = inherit_parts(candidate, block, convs_of(block))
    if config.batch_norm:
        for part, inputs in zip(parts, inputs_of(candidate, parts, x_nchw), strict=True):
            neutral_batch_norms(part, inputs)


KIND = Kind(build, init)


class Separable(Part):
    """Depthwise and pointwise convolutions with the stride, padding, dilation, groups, bias of one.

    With ``depth: 2`` a channel-keeping separable convolution and a ReLU come first, as in Blakeney
    et al., arXiv 2012.03096.
    """

    def __init__(self, config: SeparableConfig, conv: nn.Conv2d) -> None:
        layers: list[tuple[str, nn.Module]] = []
        if config.depth == 2:
            layers += [
                *_pair(config, conv, "0", keeps_shape=True),
                ("relu", nn.ReLU()),
            ]
        layers += _pair(config, conv, str(config.depth - 1), keeps_shape=False)
        super().__init__(OrderedDict(layers))
        self.depth = config.depth

    def inherit(self, conv: nn.Conv2d) -> None:
        """Take over a convolution: its rank-1 factors, behind an identity where depth is 2."""
        last = str(self.depth - 1)
        with torch.no_grad():
            depthwise, pointwise = rank_one_factors(conv.weight, conv.groups)
            self.conv(f"depthwise{last}").weight.copy_(depthwise)
            final = self.conv(f"pointwise{last}")
            final.weight.copy_(pointwise)
            if conv.bias is not None and final.bias is not None:
                final.bias.copy_(conv.bias)
        if self.depth == 2:
            pass_through(self.conv("depthwise0"), self.conv("pointwise0"))


def _pair(
    config: SeparableConfig, conv: nn.Conv2d, suffix: str, *, keeps_shape: bool
) -> list[tuple[str, nn.Module]]:
    channels = conv.in_channels
    depthwise = nn.Conv2d(
        channels,
        channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=1 if keeps_shape else conv.stride,  # type: ignore[arg-type]
        padding="same" if keeps_shape else conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=channels,
        bias=False,
        padding_mode=conv.padding_mode,
    )
    pointwise = nn.Conv2d(
        channels,
        channels if keeps_shape else conv.out_channels,
        1,
        groups=conv.groups,
        bias=not keeps_shape and conv.bias is not None,
    )
    layers: list[tuple[str, nn.Module]] = [("depthwise" + suffix, depthwise)]
    if config.batch_norm:
        layers.append(("norm" + suffix, nn.BatchNorm2d(channels)))
    return [*layers, ("pointwise" + suffix, pointwise)]
