"""Which table codes which symbol: a class per weight, the sum of what its place tells.

The codes of a trained network are not alike: a filter, an input channel or a place in the kernel
may hold many zeros, another few. A *family* is a list of tables, from narrow to wide; a weight
(o, i, k) is coded under table ``base + rows[o] + columns[i] + places[k]``, cut to the list's ends.
All of these are small integers and stand in the file. Here is how the writer finds them: by descent
on the bits of everything that is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pbkd.shrink.tables import Ints, best_table, symbol_costs

ROW_REACH = 7
"""Effects of rows are from -7 to 7."""
REACH = 3
"""Effects of columns and places are from -3 to 3."""
KINDS = {"rows": ROW_REACH, "columns": REACH, "places": REACH}
"""The kinds of effects with their reach, in the order of the file."""
NUM_TABLES = (1, 2, 4, 8, 16)
_ROUNDS = 4

Codes = NDArray[np.int32]
"""Codes of a tensor, (O, I, K), from 0 on."""


@dataclass(frozen=True)
class Effects:
    """What the places of one tensor (O, I, K) add to its base.

    Attributes:
        base: 0 or more.
        rows: (O,), columns: (I,), places: (K,); all 0 where they do not matter.
    """

    base: int
    rows: Ints
    columns: Ints
    places: Ints

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Effects:
        """All weights under table 0."""
        return cls(0, *(np.zeros(size, np.int64) for size in shape))

    def changed(self, kind: str, values: Ints) -> Effects:
        """With other effects of one kind."""
        changes: dict[str, Any] = {kind: values}
        return replace(self, **changes)

    def totals(self) -> Ints:
        """The sum for each weight, (O, I, K), not yet cut."""
        inner: Ints = self.columns[:, None] + self.places
        return self.base + self.rows[:, None, None] + inner

    def classes(self, num_tables: int) -> NDArray[np.int8]:
        """The table of each weight, (O, I, K)."""
        return self.totals().clip(0, num_tables - 1).astype(np.int8)


@dataclass(frozen=True)
class Fitted:
    """How a family's tensors are coded with the fewest bits.

    Attributes:
        histograms: (T, A) counts of the symbols under each table.
        effects: per tensor.
        cost: bits times 256, tables and effects included.
    """

    histograms: Ints
    effects: list[Effects]
    cost: int


def fit_family(tensors: list[Codes], alphabet: int) -> Fitted:
    """The best number of tables and the effects for codes below A."""
    best = _fit(tensors, alphabet, NUM_TABLES[0])
    for number in NUM_TABLES[1:]:
        found = _fit(tensors, alphabet, number)
        if found.cost > best.cost and number > 2:
            break
        best = min(best, found, key=lambda fit: fit.cost)
    return best


def _fit(tensors: list[Codes], alphabet: int, num_tables: int) -> Fitted:
    if num_tables == 1:
        effects = [Effects.none(symbols.shape) for symbols in tensors]
        return _finished(tensors, effects, alphabet, 1)
    rows = _row_classes(tensors, alphabet, num_tables)
    effects = []
    for symbols, classes in zip(tensors, rows, strict=True):
        base = int(np.sort(classes)[len(classes) // 2])
        deltas = (classes - base).clip(-ROW_REACH, ROW_REACH)
        effects.append(replace(Effects.none(symbols.shape), base=base, rows=deltas))
    best = found = _finished(tensors, effects, alphabet, num_tables)
    for _ in range(_ROUNDS):
        effects = _descended(tensors, effects, _costs(found.histograms))
        found = _finished(tensors, effects, alphabet, num_tables)
        if found.cost < best.cost:
            best = found
    return best


def _row_classes(tensors: list[Codes], alphabet: int, num_tables: int) -> list[NDArray[np.int64]]:
    """Tables of all rows, narrow ones first: k-means by bits, begun with rows by their bits."""
    per_row = np.concatenate([_histograms(s.reshape(len(s), -1), alphabet) for s in tensors])
    plain = _costs(per_row.sum(0)[None])[0]
    surprise = np.log(per_row @ plain / np.maximum(per_row.sum(1), 1) + 1)
    order = np.argsort(surprise, kind="stable")
    mass = np.cumsum(per_row.sum(1)[order])
    ends = np.searchsorted(mass, (mass[-1] // 100, mass[-1] - mass[-1] // 100))
    low, high = surprise[order[np.minimum(ends, len(order) - 1)]]
    share = (surprise - low) / max(high - low, 1e-9)
    classes = (share * num_tables).astype(np.int64).clip(0, num_tables - 1)
    for _ in range(_ROUNDS // 2):
        tables = np.zeros((num_tables, alphabet), np.int64)
        np.add.at(tables, classes, per_row)
        tables += per_row.sum(0) // (1 + 20 * num_tables)  # none is left without symbols
        costs = _costs(tables)
        width = (tables * costs).sum(1) / np.maximum(tables.sum(1), 1)
        costs = costs[np.argsort(width, kind="stable")]
        classes = (per_row @ costs.T).argmin(1)
    return np.split(classes, np.cumsum([len(s) for s in tensors])[:-1])


def _descended(tensors: list[Codes], effects: list[Effects], costs: Ints) -> list[Effects]:
    """Effects anew, one kind after the other, under the costs (T, A) of the present tables."""
    for kind in ("columns", "places", "rows"):
        price = _prices([getattr(e, kind) for e in effects], KINDS[kind])
        effects = [
            e.changed(kind, _best(symbols, e, kind, costs, price))
            for symbols, e in zip(tensors, effects, strict=True)
        ]
    return effects


def _best(symbols: Codes, effects: Effects, kind: str, costs: Ints, price: Ints) -> Ints:
    """The effects of one kind with the fewest bits; all 0 where that is cheaper."""
    reach, size = KINDS[kind], len(getattr(effects, kind))
    num_tables, alphabet = costs.shape
    fixed = effects.changed(kind, np.zeros(size, np.int64))
    total = fixed.totals()
    low = int(total.min())
    span = int(total.max()) - low + 1
    axis = list(KINDS).index(kind)
    along = np.arange(size).reshape([-1 if a == axis else 1 for a in range(3)])
    index = (along * span + (total - low)) * alphabet + symbols
    found = np.bincount(index.reshape(-1), minlength=size * span * alphabet)
    found = found.reshape(size, span * alphabet)
    bits = np.empty((size, 2 * reach + 1), np.int64)
    for delta in range(-reach, reach + 1):
        tables = np.arange(low + delta, low + delta + span).clip(0, num_tables - 1)
        bits[:, delta + reach] = found @ costs[tables].reshape(-1)
    chosen = (bits + price).argmin(1)
    plain = int(bits[:, reach].sum())
    if int((bits + price)[np.arange(size), chosen].sum()) >= plain:
        return np.zeros(size, np.int64)
    result: Ints = chosen - reach
    return result


def _finished(
    tensors: list[Codes], effects: list[Effects], alphabet: int, num_tables: int
) -> Fitted:
    """Histograms and all bits of a choice."""
    histograms = np.zeros((num_tables, alphabet), np.int64)
    for symbols, effect in zip(tensors, effects, strict=True):
        tables = effect.classes(num_tables).astype(np.int64)
        index = (tables * alphabet + symbols).reshape(-1)
        found = np.bincount(index, minlength=num_tables * alphabet)
        histograms += found.reshape(num_tables, alphabet)
    cost = sum(best_table(histogram)[1] for histogram in histograms)
    for kind in KINDS:
        used = effect_histogram(effects, kind)
        if used is not None:
            cost += best_table(used)[1]
    return Fitted(histograms, effects, cost)


def effect_histogram(effects: Sequence[Effects], kind: str) -> Ints | None:
    """Counts of a kind's effects, from -reach to reach, of the tensors that use it; None: none."""
    reach = KINDS[kind]
    used = [getattr(e, kind) for e in effects if getattr(e, kind).any()]
    return np.bincount(np.concatenate(used) + reach, minlength=2 * reach + 1) if used else None


def _costs(histograms: Ints) -> Ints:
    """Bits times 256 of each symbol under each table, (T, A)."""
    return np.stack(
        [symbol_costs(best_table(histogram)[0].frequencies) for histogram in histograms]
    )


def _prices(values: list[Ints], reach: int) -> Ints:
    """Bits times 256 of an effect, as the last round used them; at first, larger ones cost more."""
    seen = np.bincount(np.concatenate(values) + reach, minlength=2 * reach + 1)
    if seen[reach] == seen.sum():
        prices = 1 + 1.5 * np.abs(np.arange(-reach, reach + 1))
    else:
        prices = -np.log2((seen + 0.25) / (seen.sum() + 0.25 * len(seen)))
    return np.rint(256 * prices).astype(np.int64)


def _histograms(symbols: Codes, alphabet: int) -> Ints:
    """Counts per row, (O, A)."""
    index = np.arange(len(symbols))[:, None] * alphabet + symbols
    counts = np.bincount(index.reshape(-1), minlength=len(symbols) * alphabet)
    return counts.reshape(len(symbols), alphabet)
