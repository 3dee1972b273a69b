"""Tensors to one stream and back: which coding each takes, and what stands in the stream.

docs/format.md describes the codings. The writer tries those that fit and keeps the smallest; the
reader follows the list of entries and believes none of them further than it has checked.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pbkd.errors import ArtifactError
from pbkd.shrink.codes import CodeTables, read_gaps, three
from pbkd.shrink.grids import Codebook, Grid, Quantized
from pbkd.shrink.numbers import (
    DTYPES,
    Bits,
    NumberTable,
    doubled,
    tensor_of_bits,
    unordered,
)
from pbkd.shrink.range_coder import Reader
from pbkd.shrink.tables import MAX_ALPHABET

_NUM_ARGUMENTS = {
    "const": 1,
    "zlib": 1,
    "half": 1,
    "numbers": 1,
    "half_zeros": 2,
    "zeros": 2,
    "half_gaps": 1,
    "gaps": 1,
    "codes": 1,
    "code_gaps": 1,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the header.

    Attributes:
        name: in the state dict.
        dtype: one of ``DTYPES``.
        shape: of the tensor.
        coding: how its numbers stand in the stream.
        arguments: by coding; a value (const), a number of bytes (zlib), or indices of families.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    arguments: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bits of a number."""
        return 8 * DTYPES[self.dtype].itemsize

    def check(self) -> None:
        """Raise ArtifactError where type, coding and arguments do not go together."""
        if self.dtype not in DTYPES:
            raise ArtifactError(f"{self.name}: unknown type `{self.dtype}`")
        if _NUM_ARGUMENTS.get(self.coding) != len(self.arguments):
            raise ArtifactError(
                f"{self.name}: unknown coding `{self.coding}` of {len(self.arguments)} arguments"
            )
        needs_float32 = self.coding.startswith(("half", "code"))
        if needs_float32 and self.dtype != "float32":
            raise ArtifactError(f"{self.name}: coding `{self.coding}` of type {self.dtype}")
        if self.coding == "const" and self.arguments[0] >> self.width:
            raise ArtifactError(f"{self.name}: its value is larger than its type")


@dataclass(frozen=True)
class GridEntry:
    """The values that a tensor takes, in the header.

    Attributes:
        bits: of a grid; 0: a codebook.
        table: its steps or levels; the name is that of the tensor.
    """

    bits: int
    table: Entry


@dataclass(frozen=True)
class Plan:
    """What the header says of the stream.

    Attributes:
        num_number_families: tables of heads.
        code_families: (size of the alphabet, number of tables), of codes and of flags for zeros.
    """

    num_number_families: int
    code_families: tuple[tuple[int, int], ...]
    grids: tuple[GridEntry, ...]
    tensors: tuple[Entry, ...]


# ---------------------------------------------------------------- reading


def decode(words: bytes, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Quantized]]:
    """Tensors and grids of a stream.

    The caller has checked the sizes that the plan promises: they are what memory is taken for.

    Raises:
        ArtifactError: the stream is not that of the plan.
        MissingExtraError: constriction is not installed.
    """
    reader = Reader(words)
    numbers = [NumberTable.read(reader) for _ in range(plan.num_number_families)]
    codes = [CodeTables.read(reader, *family) for family in plan.code_families]
    decoder = _Decoder(reader, numbers, codes, plan.code_families)
    grids: dict[str, Quantized] = {}
    for entry in plan.grids:
        table = decoder.tensor(entry.table, None)
        grids[entry.table.name] = Grid(table, entry.bits) if entry.bits else Codebook(table)
    tensors = {entry.name: decoder.tensor(entry, grids.get(entry.name)) for entry in plan.tensors}
    reader.finish()
    return tensors, grids


@dataclass(frozen=True)
class _Decoder:
    reader: Reader
    numbers: list[NumberTable]
    codes: list[CodeTables]
    code_families: tuple[tuple[int, int], ...]

    def tensor(self, entry: Entry, grid: Quantized | None) -> Tensor:
        try:
            if entry.coding.startswith("code"):
                return self._coded(entry, grid)
            bits = self._bits(entry)
            return tensor_of_bits(bits, DTYPES[entry.dtype], entry.shape)
        except ArtifactError as error:
            raise ArtifactError(f"{entry.name}: {error}") from None
        except IndexError:
            raise ArtifactError(f"{entry.name}: no such family {entry.arguments}") from None

    def _bits(self, entry: Entry) -> Bits:
        if entry.coding == "const":
            value: Bits = np.full(entry.numel, entry.arguments[0], f"<u{entry.width // 8}")
            return value
        if entry.coding == "zlib":
            return self._deflated(entry)
        is_half = entry.coding.startswith("half")
        dtype = torch.float16 if is_half else DTYPES[entry.dtype]
        family = self.numbers[entry.arguments[-1]]
        nonzero = None
        if entry.coding.endswith("zeros"):
            nonzero = self._symbols(entry, entry.arguments[0], 2).reshape(-1) == 1
        elif entry.coding.endswith("gaps"):
            nonzero = read_gaps(self.reader, entry.numel)
        count = entry.numel if nonzero is None else int(nonzero.sum())
        found = unordered(family.numbers(self.reader, count, 8 * dtype.itemsize), dtype)
        found = doubled(found) if is_half else found
        if nonzero is None:
            return found
        bits = np.zeros(entry.numel, np.uint64)
        bits[nonzero] = found
        return bits

    def _deflated(self, entry: Entry) -> Bits:
        size, width = entry.arguments[0], entry.width // 8
        if size > entry.numel * width + 64:
            raise ArtifactError(f"{size} compressed bytes for {entry.numel} numbers")
        raw = self.reader.uniform(size, 8).astype(np.uint8).tobytes()
        inflater = zlib.decompressobj()
        try:
            whole = inflater.decompress(raw, entry.numel * width + 1)
        except zlib.error as error:
            raise ArtifactError(f"compressed bytes do not decode ({error})") from None
        if len(whole) != entry.numel * width:
            raise ArtifactError(f"decompresses to {len(whole)} bytes, not {entry.numel * width}")
        return np.frombuffer(whole, f"<u{width}").astype(np.uint64)

    def _coded(self, entry: Entry, grid: Quantized | None) -> Tensor:
        if grid is None:
            raise ArtifactError("its codes have no grid")
        alphabet, zero = alphabet_of(grid)
        if isinstance(grid, Grid) and (not entry.shape or len(grid.steps) != entry.shape[0]):
            raise ArtifactError(f"{len(grid.steps)} steps for shape {entry.shape}")
        family = entry.arguments[0]
        if entry.coding == "codes":
            symbols = self._symbols(entry, family, alphabet)
        else:
            nonzero = read_gaps(self.reader, entry.numel)
            symbols = np.full(entry.numel, zero, np.int32)
            symbols[nonzero] = self._symbols(entry, family, alphabet, int(nonzero.sum()))
        offset = zero if isinstance(grid, Grid) else 0
        codes = torch.from_numpy(symbols.reshape(entry.shape) - offset)
        return grid.values(codes)

    def _symbols(
        self, entry: Entry, family: int, alphabet: int, count: int | None = None
    ) -> NDArray[np.int32]:
        """Codes of the whole tensor, (O, I, K), or of some of its numbers, (count,)."""
        tables = self.codes[family]
        if self.code_families[family][0] != alphabet:
            raise ArtifactError(f"{alphabet} codes under tables of {self.code_families[family][0]}")
        if count is None:
            return tables.read_codes(self.reader, three(entry.shape))
        return tables.read_codes(self.reader, (1, count, 1)).reshape(-1)


def alphabet_of(grid: Quantized) -> tuple[int, int]:
    """How many symbols there are, and which one stands for 0 (a codebook without 0: the first).

    Raises:
        ArtifactError: fewer than 2, or more than 256.
    """
    if isinstance(grid, Grid):
        size, zero = 2 * grid.largest + 1, grid.largest
    else:
        zeros = torch.nonzero(grid.levels == 0)
        size, zero = len(grid.levels), int(zeros[0]) if len(zeros) else 0
    if not 2 <= size <= MAX_ALPHABET:
        raise ArtifactError(f"got {size} different values, expected 2 to {MAX_ALPHABET}")
    return size, zero
