"""The integer program behind selection: one option of each group, exact in integers.

``scipy.optimize.milp`` (HiGHS) works in floating point, to tolerances. Here costs and limits are
integers, every solution is checked in integers, and one that breaks a limit is forbidden by itself
before the program is solved again. So no limit is exceeded, not by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_COST_SCALE = 1e6
"""Costs are scaled to this. HiGHS ends at a gap of 1e-6, then 1e-12 of the largest cost."""

_ROW_SCALES = (1e4, 1.0, 1e6)
"""Rows are scaled to the first; HiGHS fails where amounts differ by its tolerances at a scale."""

_MAX_FORBIDDEN = 200
_ORDER_SPAN = 10**6
_INFEASIBLE = 2
"""The status of scipy's solvers."""


@dataclass(frozen=True)
class Row:
    """The chosen options' amounts, together, are at most ``limit``; ``amounts`` (n,) int64."""

    amounts: Integers
    limit: int


@dataclass(frozen=True)
class Program:
    """Groups of options, of which one each is chosen.

    Attributes:
        sizes: options per group, n in all; arrays (n,) hold the options of one group after the
            other.
        rows: what the choice must keep to.
        allowed: (n,) bool, options that may be chosen.
    """

    sizes: tuple[int, ...]
    rows: tuple[Row, ...]
    allowed: NDArray[np.bool_]

    @classmethod
    def of(cls, sizes: Sequence[int], rows: Sequence[Row]) -> Program:
        """A program in which every option may be chosen."""
        return cls(tuple(sizes), tuple(rows), np.ones(sum(sizes), dtype=bool))

    @property
    def starts(self) -> Integers:
        """(groups,) position of each group's first option."""
        return np.concatenate(([0], np.cumsum(self.sizes)[:-1])).astype(np.int64)

    @property
    def is_settled(self) -> bool:
        """Whether each group has one allowed option left."""
        return int(self.allowed.sum()) == len(self.sizes)

    def keeps(self, chosen: Integers) -> bool:
        """Whether a choice, (groups,) positions, keeps to every row."""
        return all(int(row.amounts[chosen].sum()) <= row.limit for row in self.rows)

    def with_row(self, amounts: Integers, limit: int) -> Program:
        """The same with one more row."""
        return replace(self, rows=(*self.rows, Row(amounts, limit)))


def minimise(program: Program, costs: Sequence[Integers]) -> Integers | None:
    """The choice of least cost; among equals that of the least second cost, and so on.

    What is equal in all costs is settled by order: the earliest option of the first group, then of
    the second, and so on.

    Args:
        costs: (n,) int64 each, not negative.

    Returns:
        (groups,) position of each group's chosen option; None where no choice keeps to the rows.
    """
    chosen: Integers | None = None
    for cost in costs:
        chosen = _cheapest(program, cost)
        if chosen is None:
            return None
        program = _without_worse(program, cost, int(cost[chosen].sum()))
        if program.is_settled:
            return np.flatnonzero(program.allowed)
    return _earliest(program)


def least_relaxation(program: Program, offsets: Sequence[int], limits: Sequence[float]) -> Integers:
    """The choice that needs the smallest t >= 0 with sum + offset <= (1 + t) limit.

    Args:
        offsets: per row, what is there without any choice.
        limits: per row, of the whole and positive, as they were before they became integers.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second of start-up

    num = len(program.allowed)
    wholes = np.array(limits, dtype=np.float64)
    shares = np.array([row.amounts for row in program.rows]) / wholes[:, None]
    t_column = np.full((len(wholes), 1), -1.0)
    found = milp(
        np.append(np.zeros(num), _COST_SCALE),
        integrality=np.append(np.ones(num, dtype=np.int64), 0),
        bounds=Bounds(0, np.append(program.allowed.astype(float), np.inf)),
        constraints=[
            LinearConstraint(np.pad(_groups(program), ((0, 0), (0, 1))), 1, 1),
            LinearConstraint(
                np.hstack([shares, t_column]), -np.inf, 1 - np.array(offsets) / wholes
            ),
        ],
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None, found.message  # t has no upper bound
    return _rounded(program, found.x[:num])


def _cheapest(program: Program, cost: Integers) -> Integers | None:
    """The allowed choice of least cost that keeps to the rows."""

    forbidden: list[Integers] = []
    while len(forbidden) < _MAX_FORBIDDEN:
        chosen = _solved(program, cost, forbidden)
        if chosen is None or program.keeps(chosen):
            return chosen
        forbidden.append(chosen)
    raise AssertionError(f"{_MAX_FORBIDDEN} solutions of HiGHS break a limit")


def _solved(program: Program, cost: Integers, forbidden: Sequence[Integers]) -> Integers | None:
    """The allowed choice of least cost, but for the forbidden ones, to the solver's tolerances."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    never = np.zeros((len(forbidden), len(cost)))
    for row, chosen in zip(never, forbidden, strict=True):
        row[chosen] = 1
    for scale in _ROW_SCALES:
        matrix, limits = _scaled_rows(program, scale)
        found = milp(
            cost * (_COST_SCALE / max(1, int(cost.max()))),
            integrality=np.ones(len(cost), dtype=np.int64),
            bounds=Bounds(0, program.allowed.astype(float)),
            constraints=[
                LinearConstraint(_groups(program), 1, 1),
                LinearConstraint(matrix, -np.inf, limits),
                LinearConstraint(never, -np.inf, len(program.sizes) - 1),
            ],
            options={"mip_rel_gap": 0},
        )
        if found.x is not None:
            return _rounded(program, found.x)
        if found.status == _INFEASIBLE:
            return None
    raise AssertionError(f"HiGHS: {found.message}")


def _without_worse(program: Program, cost: Integers, least: int) -> Program:
    """Keep the choices whose cost is ``least``, the smallest there is.

    A row says so. Options that no such choice can hold are left out: with any multipliers l >= 0 of
    the rows, the sum over groups of the least (cost + l amounts), less l limits, is a lower bound
    of the cost, and an option adds to it what it lies above its group's least.
    """
    multipliers = _multipliers(program, cost)
    priced = cost + sum(
        (m * row.amounts for m, row in zip(multipliers, program.rows, strict=True)),
        np.zeros(len(cost)),
    )
    priced[~program.allowed] = np.inf
    lowest = np.minimum.reduceat(priced, program.starts)
    bound = lowest.sum() - sum(
        m * row.limit for m, row in zip(multipliers, program.rows, strict=True)
    )
    slack = least - bound + 1e-9 * (1 + np.abs(lowest).sum() + abs(bound))
    allowed = program.allowed & (priced - np.repeat(lowest, program.sizes) <= max(slack, 0.0))
    return replace(program, allowed=allowed).with_row(cost, least)


def _multipliers(program: Program, cost: Integers) -> list[float]:
    """Of each row, from the linear relaxation; zeros where it has no solution to tolerance."""
    from scipy.optimize import linprog

    if not program.rows:
        return []
    matrix, limits = _scaled_rows(program, _ROW_SCALES[0])
    cost_scale = _COST_SCALE / max(1, int(cost.max()))
    kept = program.allowed
    found = linprog(
        (cost * cost_scale)[kept],
        A_ub=matrix[:, kept],
        b_ub=limits,
        A_eq=_groups(program)[:, kept],
        b_eq=np.ones(len(program.sizes)),
        bounds=(0, 1),
        method="highs",
    )
    if found.status != 0:
        return [0.0] * len(program.rows)
    per_row = [-float(m) / cost_scale for m in found.ineqlin.marginals]
    scales = [_scale(row, _ROW_SCALES[0]) for row in program.rows]
    return [max(0.0, m * s) for m, s in zip(per_row, scales, strict=True)]


def _earliest(program: Program) -> Integers:
    """Of the choices that are left, the one whose options come first, group by group."""
    chosen: Integers | None = None
    groups = [
        np.flatnonzero(program.allowed[start : start + size]) + start
        for start, size in zip(program.starts.tolist(), program.sizes, strict=True)
    ]
    undecided = [options for options in groups if len(options) > 1]
    while undecided:
        together, span = [], 1  # as many groups as one cost can tell apart, like digits
        while undecided and span * len(undecided[0]) <= _ORDER_SPAN:
            span *= len(undecided[0])
            together.append(undecided.pop(0))
        order = np.zeros(len(program.allowed), dtype=np.int64)
        weight = 1
        for options in reversed(together):
            order[options] = weight * np.arange(len(options))
            weight *= len(options)
        chosen = _cheapest(program, order)
        assert chosen is not None  # one was found before
        allowed = program.allowed.copy()
        for options in together:
            allowed[options] = np.isin(options, chosen)
        program = replace(program, allowed=allowed)
    if chosen is None:
        chosen = np.flatnonzero(program.allowed)
    return chosen


def _groups(program: Program) -> NDArray[np.float64]:
    """(groups, n) of 0 and 1: which options belong to a group."""
    return np.repeat(np.eye(len(program.sizes)), program.sizes, axis=1)


def _scaled_rows(
    program: Program, largest: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(rows, n) amounts and (rows,) limits, each row's largest amount at ``largest``."""
    matrix = np.zeros((len(program.rows), len(program.allowed)))
    limits = np.zeros(len(program.rows))
    for index, row in enumerate(program.rows):
        matrix[index], limits[index] = (
            row.amounts * _scale(row, largest),
            row.limit * _scale(row, largest),
        )
    return matrix, limits


def _scale(row: Row, largest: float) -> float:
    return largest / max(1, int(row.amounts.max()))


def _rounded(program: Program, x: NDArray[np.float64]) -> Integers:
    """(groups,) position of the option nearest to 1 in each group."""
    ends = np.cumsum(program.sizes)
    return np.array(
        [
            start + int(np.argmax(x[start:end]))
            for start, end in zip(program.starts, ends, strict=True)
        ],
        dtype=np.int64,
    )
