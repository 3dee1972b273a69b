"""Weights for a candidate from the kernel that it replaces.

Shapes: I input channels, O output channels, G groups, kernel KH x KW.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pbkd.measure import eval_mode


def rank_one_factors(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The best separable approximation of a kernel: rank 1 per input channel, by SVD.

    For input channel i, the (O/G, KH*KW) matrix of its kernels is replaced by the outer product of
    its leading singular vectors (Eckart-Young), with the singular value shared between them.

    Args:
        weight: (O, I/G, KH, KW) kernel of an ``nn.Conv2d``.
        groups: G.

    Returns:
        depthwise (I, 1, KH, KW) and pointwise (O, I/G, 1, 1).
    """
    num_out, in_per_group, height, width = weight.shape
    out_per_group = num_out // groups
    matrices = (
        weight.detach()
        .reshape(groups, out_per_group, in_per_group, height * width)
        .transpose(1, 2)
        .reshape(groups * in_per_group, out_per_group, height * width)
    )
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    scale = values[:, 0].sqrt()
    depthwise = (right[:, 0] * scale[:, None]).reshape(-1, 1, height, width)
    columns = (left[:, :, 0] * scale[:, None]).reshape(groups, in_per_group, out_per_group)
    pointwise = columns.transpose(1, 2).reshape(num_out, in_per_group, 1, 1)
    return depthwise.to(weight.dtype), pointwise.to(weight.dtype)


def pass_through(depthwise: nn.Conv2d, pointwise: nn.Conv2d) -> None:
    """Set a channel-keeping pair of convolutions ("same" padding, odd kernel) to the identity."""
    with torch.no_grad():
        depthwise.weight.zero_()
        height, width = depthwise.kernel_size
        depthwise.weight[:, 0, (height - 1) // 2, (width - 1) // 2] = 1
        per_group = pointwise.weight.shape[1]
        eye = torch.eye(per_group).repeat(pointwise.groups, 1)
        pointwise.weight.copy_(eye[:, :, None, None])


def neutral_batch_norms(module: nn.Module, x_nchw: Tensor) -> None:
    """Set every batch norm so that, on this batch, it changes nothing: scale and shift undo it.

    Weights inherited around a batch norm then still give the teacher's function at the start.
    """

    def set_to_identity(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean = args[0].mean((0, 2, 3))
        variance = args[0].var((0, 2, 3), unbiased=False)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.bias.copy_(mean)
        norm.weight.copy_((variance + norm.eps).sqrt())

    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(set_to_identity) for norm in norms]
    try:
        with torch.no_grad(), eval_mode(module):
            module(x_nchw)
    finally:
        for hook in hooks:
            hook.remove()
