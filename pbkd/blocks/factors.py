"""Kernels as products of smaller ones, by truncated decompositions, and least squares.

Shapes: I input channels, O output channels, G groups, kernel KH x KW, R ranks. Everything is
computed per group, in float64 but for the eigenvectors of large matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LARGE = 512
"""Rows over which eigenvectors are found in float32."""


def pair_factors(weight: Tensor, groups: int, rank: int) -> tuple[Tensor, Tensor]:
    """The best vertical and horizontal kernels whose product comes near to a kernel.

    The (I/G*KH, O/G*KW) matrix of each group is cut off at a rank (Eckart-Young): Tai et al., arXiv
    1511.06067, theorem 1.

    Args:
        weight: (O, I/G, KH, KW).
        rank: R per group.

    Returns:
        vertical (G*R, I/G, KH, 1) and horizontal (O, R, 1, KW).
    """
    num_out, in_per_group, height, width = weight.shape
    left, right = _cut_off(pair_matrices(weight, groups), rank)
    rank = left.shape[2]
    vertical = left.reshape(groups, in_per_group, height, rank).permute(0, 3, 1, 2)
    horizontal = right.reshape(groups, rank, num_out // groups, width).transpose(1, 2)
    return (
        vertical.reshape(groups * rank, in_per_group, height, 1).to(weight.dtype),
        horizontal.reshape(num_out, rank, 1, width).to(weight.dtype),
    )


def pair_matrices(weight: Tensor, groups: int) -> Tensor:
    """A kernel (O, I/G, KH, KW) as (G, I/G*KH, O/G*KW): what ``pair_factors`` cuts off."""
    num_out, in_per_group, height, width = weight.shape
    kernels = weight.detach().double().reshape(groups, -1, in_per_group, height, width)
    matrices = kernels.permute(0, 2, 3, 1, 4)
    return matrices.reshape(groups, in_per_group * height, num_out // groups * width)


def tucker_factors(
    weight: Tensor, groups: int, ranks: tuple[int, int], iterations: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Tucker-2: a smaller kernel between two matrices, one for each side's channels.

    Higher-order orthogonal iteration (De Lathauwer et al., 2000, "On the best rank-1 and
    rank-(R1, ..., RN) approximation of higher-order tensors", algorithm 4.2), which begins with the
    truncated higher-order SVD; on the two modes of channels, as in Kim et al., arXiv 1511.06530.

    Args:
        weight: (O, I/G, KH, KW).
        ranks: R1 of the inputs, R2 of the outputs, per group.

    Returns:
        (G*R1, I/G, 1, 1), (G*R2, R1, KH, KW) and (O, R2, 1, 1).
    """
    num_out, in_per_group, height, width = weight.shape
    kernels = weight.detach().double().reshape(groups, -1, in_per_group, height * width)
    rank_in, rank_out = ranks
    inner = _leading(_side(kernels, 2), rank_in)
    for _ in range(iterations):
        outer = _leading(_side(torch.einsum("goik,gir->gork", kernels, inner), 1), rank_out)
        inner = _leading(_side(torch.einsum("goik,gos->gsik", kernels, outer), 2), rank_in)
    core = torch.einsum("goik,gir,gos->gsrk", kernels, inner, outer)
    first = inner.transpose(1, 2).reshape(groups * rank_in, in_per_group, 1, 1)
    last = outer.reshape(num_out, rank_out, 1, 1)
    core = core.reshape(groups * rank_out, rank_in, height, width)
    return first.to(weight.dtype), core.to(weight.dtype), last.to(weight.dtype)


def channel_matrices(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """A kernel as (G, I/G, O/G*KH*KW) and (G, O/G, I/G*KH*KW): what Tucker's ranks are of."""
    kernels = weight.detach().double().reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    return _side(kernels, 2), _side(kernels, 1)


def grouped_factors(weight: Tensor, groups: int, more_groups: int) -> tuple[Tensor, Tensor]:
    """The best convolution in more groups, and a 1 x 1 one behind it, for a kernel.

    The n = I / ``more_groups`` input channels of a group keep n outputs: the leading n left
    singular vectors of their (O/G, n*KH*KW) matrix. With a group per channel these are the factors
    of a separable convolution.

    Args:
        weight: (O, I/G, KH, KW).
        more_groups: a multiple of G that divides I.

    Returns:
        (I, n, KH, KW) and (O, I/G, 1, 1).
    """
    num_out, in_per_group, height, width = weight.shape
    num_in = in_per_group * groups
    each, parts = num_in // more_groups, more_groups // groups
    matrices = weight.detach().double().reshape(groups, num_out // groups, parts, each, -1)
    matrices = matrices.transpose(1, 2).reshape(more_groups, num_out // groups, -1)
    left, right = _cut_off(matrices, each)
    rank = left.shape[2]  # fewer than n where there are fewer outputs
    left, right = F.pad(left, (0, each - rank)), F.pad(right, (0, 0, 0, each - rank))
    columns = left.reshape(groups, parts, num_out // groups, each).transpose(1, 2)
    return (
        right.reshape(num_in, each, height, width).to(weight.dtype),
        columns.reshape(num_out, in_per_group, 1, 1).to(weight.dtype),
    )


def rank_of_energy(matrices: Tensor, energy: float) -> int:
    """The least rank that keeps a share of the squared singular values of (G, M, N) matrices.

    The matrices of all groups get one rank; the share is of their sum.
    """
    squares = _squared_singular_values(matrices)
    kept = squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    enough = (kept >= energy - 1e-9).nonzero()  # rounding must not cost a rank
    return int(enough[0]) + 1 if len(enough) else 1


def fit_pointwise(conv: nn.Conv2d, x_nchw: Tensor, y_nchw: Tensor) -> None:
    """Set a 1 x 1 convolution, in place, to the least squares of y given x, by normal equations.

    A ridge keeps channels apart that are always equal or always 0; it is the stronger, the fewer
    pixels there are for a channel.

    Args:
        x_nchw: (N, I, H, W), what the convolution gets at stride 1.
        y_nchw: (N, O, H, W), what it should give.
    """
    groups, has_bias = conv.groups, conv.bias is not None
    x = x_nchw.detach().double().reshape(len(x_nchw), groups, conv.weight.shape[1], -1)
    y = y_nchw.detach().double().reshape(len(y_nchw), groups, conv.out_channels // groups, -1)
    if has_bias:
        x = torch.cat([x, torch.ones_like(x[:, :, :1])], 2)
    gram = torch.einsum("ngip,ngjp->gij", x, x)
    mixed = torch.einsum("ngip,ngop->gio", x, y)
    size = gram.shape[-1]
    num_pixels = x.shape[0] * x.shape[3]
    strength = 1e-6 + 1e-2 * size / num_pixels
    ridge = strength * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve(gram + ridge[:, None, None] * eye, mixed)
    with torch.no_grad():
        if conv.bias is not None:
            conv.bias.copy_(solved[:, -1].flatten())
            solved = solved[:, :-1]
        conv.weight.copy_(solved.transpose(1, 2).reshape(conv.weight.shape))


def _cut_off(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(G, M, N) as (G, M, R) times (G, R, N): the nearest of that rank, norms shared evenly.

    By the eigenvectors of the smaller side's Gram matrix: a fraction of the time of an SVD.
    """
    if matrices.shape[1] > matrices.shape[2]:
        right, left = _cut_off(matrices.transpose(1, 2), rank)
        return left.transpose(1, 2), right.transpose(1, 2)
    vectors = _leading(matrices, rank)
    right = vectors.transpose(1, 2) @ matrices
    scale = right.norm(dim=2).sqrt()  # of the singular values
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return vectors * scale[:, None], right / scale[:, :, None]


def _leading(matrices: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of (G, M, N) matrices: (G, M, min(rank, M))."""
    gram = matrices @ matrices.transpose(1, 2)
    if gram.shape[1] > _LARGE:
        gram = gram.float()  # a third of the time; what is projected on them stays exact
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(2)[:, :, :rank].to(matrices.dtype)


def _squared_singular_values(matrices: Tensor) -> Tensor:
    """Of (G, M, N) matrices, from large to small, summed over the groups."""
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.transpose(1, 2)
    squares: Tensor = torch.linalg.eigvalsh(matrices @ matrices.transpose(1, 2))
    return squares.flip(1).clamp_min(0).sum(0)


def _side(kernels: Tensor, mode: int) -> Tensor:
    """(G, O, I, K) with one mode as rows: (G, rows, all others)."""
    return kernels.movedim(mode, 1).flatten(2)


def pair_weights(conv: nn.Conv2d, rank: int) -> int:
    """Number of weights of the pair that stands for a convolution."""
    height, width = conv.kernel_size
    rows = conv.in_channels // conv.groups * height
    columns = conv.out_channels // conv.groups * width
    return conv.groups * rank * (rows + columns)


def tucker_weights(conv: nn.Conv2d, ranks: tuple[int, int]) -> int:
    """Number of weights of the three convolutions that stand for one."""
    rank_in, rank_out = ranks
    num_in, num_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    core = rank_in * rank_out * math.prod(conv.kernel_size)
    return conv.groups * (num_in * rank_in + core + num_out * rank_out)
