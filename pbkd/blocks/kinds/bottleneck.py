"""`bottleneck`: 1 x 1 to fewer channels, k x k among them, 1 x 1 back.

Without batch norm it is linear, as the convolution is, and starts as its Tucker decomposition with
equal ranks. With batch norm and ReLU between, the last 1 x 1 is fitted by least squares.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from pbkd.blocks.factors import fit_pointwise, tucker_factors
from pbkd.blocks.inherit import neutral_batch_norms
from pbkd.blocks.kinds.convs import (
    Part,
    conv_at,
    conv_like,
    convs_of,
    inherit_parts,
    inputs_of,
    needs_dense,
    with_parts,
)
from pbkd.blocks.kinds.kind import Kind
from pbkd.config import BottleneckConfig
from pbkd.measure import eval_mode


def build(config: BottleneckConfig, block: nn.Module) -> nn.Module:
    """See ``Kind.build``."""
    return with_parts(
        block, {path: Bottleneck(config, conv_at(block, path)) for path in _convs(block)}
    )


def init(config: BottleneckConfig, candidate: nn.Module, block: nn.Module, x_nchw: Tensor) -> None:
    """See ``Kind.init``; the inputs set the batch norms and what follows them."""
    paths = _convs(block)
    parts = inherit_parts(candidate, block, paths)
    if not config.batch_norm:
        return
    convs = [conv_at(block, path) for path in paths]
    targets = inputs_of(block, convs, x_nchw)
    # one after the other: each makes good what those before it changed (Zhang et al., 1505.06798)
    for part, conv, target in zip(parts, convs, targets, strict=True):
        (inputs,) = inputs_of(candidate, [part], x_nchw)
        neutral_batch_norms(part, inputs)
        with torch.no_grad(), eval_mode(part):
            features = nn.Sequential(*list(part)[:-1])(inputs)
            fit_pointwise(part.conv("expand"), features, conv(target))


KIND = Kind(build, init)


class Bottleneck(Part):
    """Stride, padding and dilation are those of the k x k in the middle, groups of all three."""

    def __init__(self, config: BottleneckConfig, conv: nn.Conv2d) -> None:
        groups = conv.groups
        smaller = min(conv.in_channels, conv.out_channels) // groups
        self.width = max(1, round(config.ratio * smaller))
        inner, norm = self.width * groups, config.batch_norm
        core = conv_like(conv, inner, inner, groups=groups, bias=False)
        reduce = nn.Conv2d(conv.in_channels, inner, 1, groups=groups, bias=False)
        bias = conv.bias is not None or norm  # what a ReLU leaves has a mean
        expand = nn.Conv2d(inner, conv.out_channels, 1, groups=groups, bias=bias)
        layers: OrderedDict[str, nn.Module] = OrderedDict(reduce=reduce)
        if norm:
            layers.update(norm0=nn.BatchNorm2d(inner), relu0=nn.ReLU())
        layers["core"] = core
        if norm:
            layers.update(norm1=nn.BatchNorm2d(inner), relu1=nn.ReLU())
        layers["expand"] = expand
        super().__init__(layers)

    def inherit(self, conv: nn.Conv2d) -> None:
        """Take over the Tucker decomposition of a convolution, with equal ranks."""
        widths = (self.width, self.width)
        reduce, core, expand = tucker_factors(conv.weight, conv.groups, widths)
        self.take(conv, reduce=reduce, core=core, expand=expand)


def _convs(block: nn.Module) -> list[str]:
    if isinstance(block, nn.Conv2d):
        needs_dense(block, "it has no k x k to narrow; `low_rank` fits")
    return convs_of(block)
