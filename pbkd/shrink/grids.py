"""Values that a quantized tensor can take: a grid with a step per row, or a codebook.

A tensor that lies on one is kept as integers ("codes") and what turns them into numbers again. The
network itself always holds float32: codes decode to it bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pbkd.errors import ArtifactError


@dataclass(frozen=True)
class Grid:
    """Values ``code * step``, the steps per index of the first dimension.

    Attributes:
        steps: (O,) float32, greater than 0.
        bits: codes are from -(2 ** (bits - 1) - 1) to 2 ** (bits - 1) - 1.
    """

    steps: Tensor
    bits: int

    @property
    def largest(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1) - 1)

    def codes(self, values: Tensor) -> Tensor:
        """The nearest codes, int32, of a tensor (O, ...)."""
        steps = self._steps(values)
        found = (values.detach() / steps).round().clamp(-self.largest, self.largest)
        return found.to(torch.int32)

    def values(self, codes: Tensor) -> Tensor:
        """Float32 values of codes (O, ...)."""
        return codes.to(torch.float32) * self._steps(codes)

    def _steps(self, like: Tensor) -> Tensor:
        return self.steps.to(like.device).reshape(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class Codebook:
    """Values from a table; one of the entries is 0 where the tensor has zeros that must stay.

    Attributes:
        levels: (K,) float32, rising.
    """

    levels: Tensor

    def codes(self, values: Tensor) -> Tensor:
        """The nearest entries' indices, int32."""
        levels = self.levels.to(values.device)
        between = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize(values.detach().contiguous(), between).to(torch.int32)

    def values(self, codes: Tensor) -> Tensor:
        """Float32 values of indices."""
        return self.levels.to(codes.device)[codes.long()]


Quantized = Grid | Codebook


def codes_of(name: str, values: Tensor, quantized: Quantized) -> Tensor:
    """The codes of a tensor that lies on its values exactly.

    Raises:
        ArtifactError: it does not.
    """
    codes = quantized.codes(values)
    if not torch.equal(quantized.values(codes), values):
        raise ArtifactError(
            f"{name} does not lie on the values that it was quantized to; run: pbkd shrink"
        )
    return codes
