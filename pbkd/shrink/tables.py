"""Frequency tables of few bits: levels on a scale of logarithms, straight lines between them.

Tables are made of integers only, so that every machine decodes with the same ones; docs/format.md,
section "Tables".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

PRECISION = 24
"""Bits of a probability."""
MAX_ALPHABET = 256
MAX_LEVEL = 63
LEVEL_BITS = (0, 4, 5, 6)
"""Of a level, by precision; 0: all symbols alike."""
STRIDES = (1, 2, 4, 8)
"""Symbols from knot to knot."""
_WIDE = 16
"""Alphabets up to this size always have a knot per symbol."""

WEIGHTS: Ints = np.array(
    [0] + [math.isqrt(math.isqrt(1 << (32 + level))) for level in range(1, MAX_LEVEL + 1)],
    dtype=np.int64,
)
"""Of each level: floor(2 ** (8 + level / 4)); level 0 is (almost) never seen."""


@dataclass(frozen=True)
class Table:
    """A frequency table as it is written.

    Attributes:
        alphabet: number of symbols, A, 2 to 256.
        first, last: the symbols that are seen.
        precision: 0: those are alike; 1, 2, 3: their levels have 4, 5, 6 bits.
        stride_index: which of the strides.
        units: the levels at the knots, in steps of the precision.
    """

    alphabet: int
    first: int
    last: int
    precision: int
    stride_index: int
    units: Ints

    @property
    def levels(self) -> Ints:
        """(A,), in quarters of log2; 63 the most, 0 none."""
        levels = np.zeros(self.alphabet, np.int64)
        size = self.last - self.first + 1
        if self.precision == 0:
            levels[self.first : self.last + 1] = MAX_LEVEL
        else:
            knots = self.units << (3 - self.precision)
            stride = STRIDES[self.stride_index]
            levels[self.first : self.last + 1] = _interpolated(knots, stride, size)
        return levels

    @property
    def frequencies(self) -> Ints:
        """(A,), together 2 ** 24 - A."""
        weights = WEIGHTS[self.levels]
        total = int(weights.sum())
        if total == 0:
            weights, total = np.ones_like(weights), len(weights)
        free = (1 << PRECISION) - len(weights)
        frequencies = weights * free // total
        frequencies[int(weights.argmax())] += free - int(frequencies.sum())
        return frequencies

    def cost(self, histogram: Ints) -> int:
        """Bits times 256 of the table and of the symbols that it codes; an integer, so that choices
        do not hang on how a machine adds."""
        bits = 4 + 2 * symbol_bits(self.alphabet) + len(self.units) * LEVEL_BITS[self.precision]
        return int((histogram * symbol_costs(self.frequencies)).sum()) + 256 * bits


def symbol_bits(alphabet: int) -> int:
    """Bits that tell a symbol of an alphabet."""
    return (alphabet - 1).bit_length()


def symbol_costs(frequencies: Ints) -> Ints:
    """What each symbol costs under a table: (A,) bits times 256."""
    costs: Ints = np.rint(256 * (PRECISION - np.log2(frequencies + 1.0))).astype(np.int64)
    return costs


def num_knots(stride: int, size: int) -> int:
    """Knots that cover so many symbols."""
    return size if stride == 1 or size == 1 else (size - 2) // stride + 2


def best_table(histogram: Ints) -> tuple[Table, int]:
    """The table with the least cost for counts (A,), and that cost."""
    alphabet = len(histogram)
    seen = np.flatnonzero(histogram)
    first, last = (int(seen[0]), int(seen[-1])) if len(seen) else (0, alphabet - 1)
    part = histogram[first : last + 1]
    tables = [Table(alphabet, first, last, 0, 0, part[:0])]
    for stride_index, stride in enumerate(STRIDES if len(part) > _WIDE else STRIDES[:1]):
        ideal = _ideal_knots(part, stride)
        for precision in (1, 2, 3):
            units = _units(ideal, precision)
            tables.append(Table(alphabet, first, last, precision, stride_index, units))
    costs = [table.cost(histogram) for table in tables]
    best = costs.index(min(costs))
    return tables[best], costs[best]


def _units(ideal: NDArray[np.float64], precision: int) -> Ints:
    """Levels in steps of a precision; the most frequent knot has the largest."""
    step = 1 << (3 - precision)
    largest = MAX_LEVEL // step
    is_seen = np.isfinite(ideal)
    units = np.rint(np.where(is_seen, ideal, 0) / step).astype(np.int64) + largest
    return np.where(is_seen, units.clip(1, largest), 0)


def _interpolated(knots: Ints, stride: int, size: int) -> Ints:
    """Levels on straight lines between knots at 0, stride, 2 * stride, ..."""
    places = np.arange(size)
    left, share = places // stride, places % stride
    right = np.minimum(left + 1, len(knots) - 1)
    return (knots[left] * (stride - share) + knots[right] * share) // stride


def _ideal_knots(histogram: Ints, stride: int) -> NDArray[np.float64]:
    """Quarters of log2 of the frequency around each knot, at most 0; -inf where there is none."""
    size = len(histogram)
    counts = np.zeros(num_knots(stride, size))
    places = np.arange(size)
    left, share = places // stride, (places % stride) / stride
    right = np.minimum(left + 1, len(counts) - 1)
    widths = np.zeros_like(counts)
    for index, part in ((left, 1 - share), (right, share)):
        np.add.at(counts, index, histogram * part)
        np.add.at(widths, index, part)
    density = counts / np.maximum(widths, 1e-9)
    if stride > 1:  # between knots every symbol is possible
        density = np.maximum(density, 1e-3)
    with np.errstate(divide="ignore"):
        logs: NDArray[np.float64] = 4 * np.log2(density / max(density.max(), 1e-9))
    return logs
