"""What the writer of a `.pbkd` file decides: a coding per tensor, and who shares which tables.

All costs are integers, bits times 256, so that equal models give equal bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pbkd.errors import ArtifactError
from pbkd.shrink.codec import Entry, GridEntry, Plan, alphabet_of
from pbkd.shrink.codes import MAX_GAP, CodeTables, gap_symbols, three, write_gaps
from pbkd.shrink.contexts import Codes, Fitted, fit_family
from pbkd.shrink.grids import Grid, Quantized
from pbkd.shrink.numbers import (
    DTYPES,
    Bits,
    NumberFamily,
    bits_of_tensor,
    dtype_name,
    fit_numbers,
    halved,
    ordered,
)
from pbkd.shrink.range_coder import Writer
from pbkd.shrink.tables import best_table

_MIN_ZEROS = 0.05
"""Share of zeros from which leaving them out is tried."""
_MIN_ZEROS_OF_GAPS = 0.8
"""Share of zeros from which codes are tried as gaps and what is not 0."""


@dataclass(frozen=True)
class _Draft:
    """A tensor with its coding, before families are known.

    Attributes:
        entry: its arguments are still empty where families come into them.
        nonzero: (N,), where zeros are left out by gaps.
        codes: codes, or flags of what is not 0.
        code_key: who may share tables of codes with it.
        patterns: ordered, of the numbers that are written.
        number_key: who may share a table of heads with it; and their width in bits.
        deflated: its bytes, compressed.
    """

    entry: Entry
    nonzero: NDArray[np.bool_] | None = None
    codes: Codes | None = None
    code_key: tuple[str, int] = ("", 0)
    patterns: Bits | None = None
    number_key: tuple[str, int] = ("", 0)
    deflated: bytes = b""


def encode(tensors: Mapping[str, Tensor], grids: Mapping[str, Quantized]) -> tuple[Plan, bytes]:
    """Tensors, and grids of some of them, as one stream.

    Raises:
        ArtifactError: a tensor has a type that the file does not know.
        MissingExtraError: constriction is not installed.
    """
    tables = {name: _table_of(grids[name]) for name in tensors if name in grids}
    drafts = [
        _plain(name, table, "steps" if isinstance(grids[name], Grid) else "levels")
        for name, table in tables.items()
    ]
    drafts += [_draft(name, tensor, grids.get(name)) for name, tensor in tensors.items()]
    numbers = _grouped(
        [(i, d.number_key, d.patterns) for i, d in enumerate(drafts) if d.patterns is not None],
        fit_numbers,
    )
    codes = _grouped(
        [(i, d.code_key, d.codes) for i, d in enumerate(drafts) if d.codes is not None],
        fit_family,
    )
    entries = [
        replace(
            draft.entry, arguments=_arguments(draft, codes.places.get(i), numbers.places.get(i))
        )
        for i, draft in enumerate(drafts)
    ]
    bits = [g.bits if isinstance(g, Grid) else 0 for g in (grids[name] for name in tables)]
    plan = Plan(
        num_number_families=len(numbers.fits),
        code_families=tuple((f.histograms.shape[1], f.histograms.shape[0]) for f in codes.fits),
        grids=tuple(map(GridEntry, bits, entries[: len(tables)])),
        tensors=tuple(entries[len(tables) :]),
    )
    return plan, _written(drafts, numbers, codes)


def _written(
    drafts: list[_Draft], numbers: _Grouped[NumberFamily], codes: _Grouped[Fitted]
) -> bytes:
    """The stream: tables of heads, tables of codes, then the drafts in their order."""
    writer = Writer()
    heads = [family.write_table(writer) for family in numbers.fits]
    tables = [CodeTables.write(writer, fit) for fit in codes.fits]
    for i, draft in enumerate(drafts):
        if draft.deflated:
            writer.uniform(np.frombuffer(draft.deflated, np.uint8).astype(np.int64), 8)
        if draft.nonzero is not None:
            write_gaps(writer, draft.nonzero)
        if draft.codes is not None:
            family, place = codes.places[i]
            effects = codes.fits[family].effects[place]
            tables[family].write_codes(writer, draft.codes, effects)
        if draft.patterns is not None:
            family, place = numbers.places[i]
            numbers.fits[family].write(writer, place, draft.patterns, heads[family])
    return writer.words()


def _arguments(
    draft: _Draft, code_place: tuple[int, int] | None, number_place: tuple[int, int] | None
) -> tuple[int, ...]:
    places = [place[0] for place in (code_place, number_place) if place is not None]
    return (*draft.entry.arguments, *places)


# ---------------------------------------------------------------- families


class _Priced(Protocol):
    @property
    def cost(self) -> int: ...


_F = TypeVar("_F", bound=_Priced)
_D = TypeVar("_D")


@dataclass(frozen=True)
class _Grouped(Generic[_F]):
    """Families, and of each draft that is in one: (family, place in it)."""

    fits: list[_F]
    places: dict[int, tuple[int, int]]


def _grouped(
    members: Sequence[tuple[int, tuple[str, int], _D]],
    fit: Callable[[list[_D], int], _F],
) -> _Grouped[_F]:
    """Those of one key share a family, or have one each where that is smaller."""
    keys = dict.fromkeys(key for _, key, _ in members)
    fits: list[_F] = []
    places: dict[int, tuple[int, int]] = {}
    for key in keys:
        indices = [i for i, own, _ in members if own == key]
        data = [item for _, own, item in members if own == key]
        shared = fit(data, key[1])
        alone = [fit([item], key[1]) for item in data] if len(data) > 1 else []
        if alone and sum(family.cost for family in alone) < shared.cost:
            places |= {i: (len(fits) + n, 0) for n, i in enumerate(indices)}
            fits += alone
        else:
            places |= {i: (len(fits), n) for n, i in enumerate(indices)}
            fits.append(shared)
    return _Grouped(fits, places)


# ---------------------------------------------------------------- drafts


def _table_of(grid: Quantized) -> Tensor:
    return grid.steps if isinstance(grid, Grid) else grid.levels


def _draft(name: str, tensor: Tensor, grid: Quantized | None) -> _Draft:
    if grid is not None and (coded := _coded(name, tensor, grid)) is not None:
        return coded
    kind = "matrix" if tensor.dim() > 1 else "vector"
    return _plain(name, tensor, f"{name.rpartition('.')[2]} {kind}")


def _coded(name: str, tensor: Tensor, grid: Quantized) -> _Draft | None:
    """As codes of its grid; None where it is constant, or does not come out bit for bit."""
    try:
        alphabet, zero = alphabet_of(grid)
    except ArtifactError:
        return None
    bits = bits_of_tensor(tensor)
    if tensor.dtype != torch.float32 or not tensor.dim() or (bits == bits[:1]).all():
        return None
    codes = grid.codes(tensor)
    if not np.array_equal(bits_of_tensor(grid.values(codes)), bits):
        return None
    shape = tuple(tensor.shape)
    offset = zero if isinstance(grid, Grid) else 0
    symbols = (codes.cpu().numpy() + offset).astype(np.int32).reshape(three(shape))
    key = f"grid {grid.bits}" if isinstance(grid, Grid) else f"codebook {name}"
    dense = _Draft(
        Entry(name, "float32", shape, "codes", ()), codes=symbols, code_key=(key, alphabet)
    )
    nonzero = symbols.reshape(-1) != zero
    if nonzero.mean() > 1 - _MIN_ZEROS_OF_GAPS:
        return dense
    left = symbols.reshape(-1)[nonzero].reshape(1, -1, 1)
    sparse = _Draft(
        Entry(name, "float32", shape, "code_gaps", ()),
        nonzero=nonzero,
        codes=left,
        code_key=(f"{key} gaps", alphabet),
    )
    gaps = _gap_cost(nonzero) + fit_family([left], alphabet).cost
    return sparse if gaps < fit_family([symbols], alphabet).cost else dense


def _plain(name: str, tensor: Tensor, role: str) -> _Draft:
    """As numbers: constant, compressed bytes, or heads and tails, with or without the zeros."""
    dtype, shape, bits = dtype_name(name, tensor), tuple(tensor.shape), bits_of_tensor(tensor)
    if len(bits) == 0 or (bits == bits[0]).all():
        value = int(bits[0]) if len(bits) else 0
        return _Draft(Entry(name, dtype, shape, "const", (value,)))
    halves = halved(bits) if dtype == "float32" else None
    kind = torch.float16 if halves is not None else DTYPES[dtype]
    width = 8 * kind.itemsize
    half = halves is not None
    patterns = ordered(bits if halves is None else halves, kind)
    number_key = (f"{role} {kind}", width)
    choices = [
        (
            fit_numbers([patterns], width).cost,
            _Draft(
                Entry(name, dtype, shape, "half" if half else "numbers", ()),
                patterns=patterns,
                number_key=number_key,
            ),
        )
    ]
    nonzero = bits != 0
    if nonzero.mean() < 1 - _MIN_ZEROS:
        numbers = _Draft(
            Entry(name, dtype, shape, "", ()), patterns=patterns[nonzero], number_key=number_key
        )
        left = fit_numbers([patterns[nonzero]], width).cost
        flags = nonzero.astype(np.int32).reshape(three(shape))
        prefix = "half_" if half else ""
        choices += [
            (
                left + fit_family([flags], 2).cost,
                replace(
                    numbers,
                    entry=replace(numbers.entry, coding=f"{prefix}zeros"),
                    codes=flags,
                    code_key=("flags", 2),
                ),
            ),
            (
                left + _gap_cost(nonzero),
                replace(
                    numbers,
                    entry=replace(numbers.entry, coding=f"{prefix}gaps"),
                    nonzero=nonzero,
                ),
            ),
        ]
    raw = bits.astype(f"<u{DTYPES[dtype].itemsize}").tobytes()
    deflated = zlib.compress(raw, 9)
    choices.append(
        (
            256 * 8 * len(deflated),
            _Draft(Entry(name, dtype, shape, "zlib", (len(deflated),)), deflated=deflated),
        )
    )
    return min(choices, key=lambda choice: choice[0])[1]


def _gap_cost(nonzero: NDArray[np.bool_]) -> int:
    return best_table(np.bincount(gap_symbols(nonzero), minlength=MAX_GAP + 1))[1] + 256 * 40
