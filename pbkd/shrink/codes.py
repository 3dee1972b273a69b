"""Small integers in the stream: codes under a family's tables, and positions as gaps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pbkd.errors import ArtifactError
from pbkd.shrink.contexts import KINDS, Codes, Effects, Fitted, effect_histogram
from pbkd.shrink.range_coder import Reader, Writer
from pbkd.shrink.tables import Ints

MAX_GAP = 255
"""A gap of 255 is followed by no number: it goes on."""
MAX_TABLES = 16
_BASE_BITS = 4
_COUNT_BITS = 40


@dataclass(frozen=True)
class CodeTables:
    """What the tensors of a family share.

    Attributes:
        tables: T frequency tables (A,).
        effects: a table for each kind of effects that is used.
    """

    tables: list[Ints]
    effects: tuple[Ints | None, ...]

    @classmethod
    def write(cls, writer: Writer, fitted: Fitted) -> CodeTables:
        """Write the tables."""
        tables = [writer.table(histogram) for histogram in fitted.histograms]
        shared: list[Ints | None] = []
        for kind in KINDS:
            used = effect_histogram(fitted.effects, kind)
            writer.number(int(used is not None), 1)
            shared.append(None if used is None else writer.table(used))
        return cls(tables, tuple(shared))

    @classmethod
    def read(cls, reader: Reader, alphabet: int, num_tables: int) -> CodeTables:
        """What ``write`` wrote."""
        tables = [reader.table(alphabet) for _ in range(num_tables)]
        effects = (
            reader.table(2 * reach + 1) if reader.number(1) else None for reach in KINDS.values()
        )
        return cls(tables, tuple(effects))

    def write_codes(self, writer: Writer, codes: Codes, effects: Effects) -> None:
        """A tensor's effects, then its codes: under one table after the other."""
        if len(self.tables) > 1:
            writer.number(effects.base, _BASE_BITS)
        for (kind, reach), table in zip(KINDS.items(), self.effects, strict=True):
            values = getattr(effects, kind)
            if table is not None:
                writer.number(int(values.any()), 1)
                if values.any():
                    writer.symbols(values + reach, table)
        classes = effects.classes(len(self.tables))
        for index, table in enumerate(self.tables):
            writer.symbols(codes[classes == index].astype(np.int64), table)

    def read_codes(self, reader: Reader, shape: tuple[int, int, int]) -> Codes:
        """What ``write_codes`` wrote, (O, I, K)."""
        base = reader.number(_BASE_BITS) if len(self.tables) > 1 else 0
        values = []
        for size, reach, table in zip(shape, KINDS.values(), self.effects, strict=True):
            if table is not None and reader.number(1):
                values.append(reader.symbols(size, table).astype(np.int64) - reach)
            else:
                values.append(np.zeros(size, np.int64))
        if len(self.tables) == 1:
            return reader.symbols(math.prod(shape), self.tables[0]).reshape(shape)
        classes = Effects(base, *values).classes(len(self.tables))
        codes = np.empty(shape, np.int32)
        for index, table in enumerate(self.tables):
            chosen = classes == index
            codes[chosen] = reader.symbols(int(chosen.sum()), table)
        return codes


def three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(O, I, K) of a tensor: its first two dimensions, and the product of the others."""
    first, second, *rest = (*shape, 1, 1)
    return first, second, math.prod(rest)


def write_gaps(writer: Writer, nonzero: NDArray[np.bool_]) -> None:
    """Positions of the true ones in (N,), each as the number of false ones before it."""
    symbols = gap_symbols(nonzero)
    writer.number(len(symbols), _COUNT_BITS)
    frequencies = writer.table(np.bincount(symbols, minlength=MAX_GAP + 1))
    writer.symbols(symbols, frequencies)


def gap_symbols(nonzero: NDArray[np.bool_]) -> Ints:
    """Gaps below 255; before a longer one stands 255 as often as it fits."""
    gaps = np.diff(np.flatnonzero(nonzero), prepend=-1) - 1
    longs = gaps // MAX_GAP
    symbols = np.full(len(gaps) + int(longs.sum()), MAX_GAP, np.int64)
    symbols[np.cumsum(longs + 1) - 1] = gaps % MAX_GAP
    return symbols


def read_gaps(reader: Reader, numel: int) -> NDArray[np.bool_]:
    """What ``write_gaps`` wrote; ArtifactError where it runs out of the tensor."""
    count = reader.number(_COUNT_BITS)
    if count > numel + numel // MAX_GAP:
        raise ArtifactError(f"{count} gaps in {numel} numbers")
    symbols = reader.symbols(count, reader.table(MAX_GAP + 1)).astype(np.int64)
    is_long = symbols == MAX_GAP
    ends = np.cumsum(np.where(is_long, MAX_GAP, symbols + 1)) - 1
    positions = ends[~is_long]
    if len(positions) and int(positions[-1]) >= numel:
        raise ArtifactError("gaps run out of the tensor")
    nonzero = np.zeros(numel, np.bool_)
    nonzero[positions] = True
    return nonzero
