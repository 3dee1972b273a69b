"""Choose, per block, a trained candidate or the teacher's own module: least damage within limits.

The damage of a student is predicted as the sum of its candidates' damages, its figures as sums over
its blocks and the rest of the network. The choice is a mixed-integer program; see ``program.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import get_args

import numpy as np
from pydantic import BaseModel, ConfigDict

from pbkd.config import CandidateConfig, Figure
from pbkd.errors import BudgetError
from pbkd.students.program import Integers, Program, Row, least_relaxation, minimise

FIGURES: tuple[Figure, ...] = get_args(Figure)

_NS_PER_MS = 10**6
_RESOLUTION = 10**9
"""Damages are compared in units of 1e-9 nats, so that equal ones are equal."""


class Figures(BaseModel):
    """Figures of a whole student, or of one option of one block.

    Attributes:
        macs: multiply-accumulates of one image.
        bytes: in the file of weights.
        latency_ms: of one batch; None: not measured. Sums are kept to the nanosecond.
    """

    model_config = ConfigDict(frozen=True)

    parameters: int
    macs: int
    bytes: int
    latency_ms: float | None = None

    def of(self, figure: Figure) -> float | None:
        """One of them by its name in a budget."""
        values: dict[Figure, float | None] = {
            "parameters": self.parameters,
            "macs": self.macs,
            "bytes": self.bytes,
            "latency": self.latency_ms,
        }
        return values[figure]


class Option(BaseModel):
    """A candidate of a block, with its figures there.

    Attributes:
        damage_kl: of the trained candidate, nats; None where it is not finite.
    """

    model_config = ConfigDict(frozen=True)

    config: CandidateConfig
    name: str
    damage_kl: float | None
    figures: Figures


class BlockOptions(BaseModel):
    """What can stand in one block: the teacher's own module, or one of the candidates."""

    model_config = ConfigDict(frozen=True)

    block: str
    own: Figures
    candidates: tuple[Option, ...]

    def within(self, max_damage: float) -> BlockOptions:
        """The same with those candidates alone whose damage is finite and at most so much."""
        kept = [
            option
            for option in self.candidates
            if option.damage_kl is not None and option.damage_kl <= max_damage
        ]
        return self.model_copy(update={"candidates": tuple(kept)})

    def as_if_harmless(self) -> BlockOptions:
        """The same with no damage: what could be chosen if every candidate trained perfectly."""
        harmless = [option.model_copy(update={"damage_kl": 0.0}) for option in self.candidates]
        return self.model_copy(update={"candidates": tuple(harmless)})


class Choice(BaseModel):
    """What was chosen for a block, and why; ``config`` is null where the teacher's module stays.

    Attributes:
        damage_kl: of the chosen candidate, nats; where none was allowed, the least there was.
    """

    model_config = ConfigDict(frozen=True)

    block: str
    candidate: str | None
    config: CandidateConfig | None
    damage_kl: float | None
    reason: str


class Selection(BaseModel):
    """A student, as predicted.

    Attributes:
        figures: of the whole student.
        damage: sum of the chosen candidates' damages, nats.
    """

    model_config = ConfigDict(frozen=True)

    choices: tuple[Choice, ...]
    figures: Figures
    damage: float

    @property
    def is_teacher(self) -> bool:
        """Whether every block keeps the teacher's module."""
        return all(choice.candidate is None for choice in self.choices)

    @property
    def names(self) -> tuple[str | None, ...]:
        """The chosen candidates' names, block by block."""
        return tuple(choice.candidate for choice in self.choices)

    @property
    def replacements(self) -> dict[str, str]:
        """Block path to the candidate that comes there."""
        return {c.block: c.candidate for c in self.choices if c.candidate is not None}


def select(
    blocks: Sequence[BlockOptions], rest: Figures, limits: Mapping[Figure, float]
) -> Selection:
    """The student of least damage within all limits.

    Exactly one option per block; of equal damage (to 1e-9 nats) the one of fewest parameters, then
    of fewest MACs, then the one whose options come first, block by block (the teacher's own module
    before the candidates, those in their order). Equal inputs give equal students.

    Args:
        blocks: with the candidates that may be chosen; one whose damage is None is left out.
        rest: figures of the network without these blocks.
        limits: of the whole student, latency in milliseconds; none is exceeded, not by one.

    Raises:
        BudgetError: no choice keeps to the limits.
    """
    found = try_select(blocks, rest, limits)
    if found is None:
        wanted = ", ".join(f"{figure} {limit:g}" for figure, limit in limits.items())
        raise BudgetError(f"no choice of candidates keeps to the limits ({wanted}); raise them")
    return found


def try_select(
    blocks: Sequence[BlockOptions], rest: Figures, limits: Mapping[Figure, float]
) -> Selection | None:
    """As ``select``; None where no choice keeps to the limits."""
    table = _Table(blocks, rest)
    program = Program.of(table.sizes, [table.row(figure, limits[figure]) for figure in limits])
    costs = [table.damages, table.amounts("parameters"), table.amounts("macs")]
    chosen = minimise(program, costs)
    return None if chosen is None else table.selection(chosen)


def teacher_figures(blocks: Sequence[BlockOptions], rest: Figures) -> Figures:
    """The figures of the whole network with its own modules."""
    own = _Table([block.model_copy(update={"candidates": ()}) for block in blocks], rest)
    return own.selection(own.starts).figures


def smallest(blocks: Sequence[BlockOptions], rest: Figures, figure: Figure) -> float:
    """The smallest value of one figure that any choice gives."""
    table = _Table(blocks, rest)
    least = np.minimum.reduceat(table.amounts(figure), table.starts).sum()
    return _value(int(least) + _units(rest, figure), figure)


def nearest(
    blocks: Sequence[BlockOptions], rest: Figures, limits: Mapping[Figure, float]
) -> Selection:
    """The choice that needs the smallest common relaxation of limits that cannot be kept.

    It minimises t, where every figure is at most (1 + t) times its limit.
    """
    table = _Table(blocks, rest)
    program = Program.of(table.sizes, [table.row(figure, limits[figure]) for figure in limits])
    offsets = [_units(rest, figure) for figure in limits]
    exact = [limits[figure] * _scale(figure) for figure in limits]
    return table.selection(least_relaxation(program, offsets, exact))


class _Table:
    """The options of all blocks as arrays (n,), those of one block after the other, own first."""

    def __init__(self, blocks: Sequence[BlockOptions], rest: Figures) -> None:
        self.blocks, self.rest = blocks, rest
        self.options: list[tuple[BlockOptions, Option | None]] = []
        self.sizes: list[int] = []
        for block in blocks:
            usable = [option for option in block.candidates if option.damage_kl is not None]
            self.options += [(block, None), *((block, option) for option in usable)]
            self.sizes.append(1 + len(usable))
        self.starts = np.cumsum([0, *self.sizes[:-1]])

    @property
    def damages(self) -> Integers:
        """In units of 1e-9 nats; rounding can make a KL of nothing negative."""
        nats = [option.damage_kl or 0.0 if option else 0.0 for _, option in self.options]
        return np.array([max(0, round(value * _RESOLUTION)) for value in nats], dtype=np.int64)

    def amounts(self, figure: Figure) -> Integers:
        """One figure of every option, in whole units."""
        return np.array([_units(_figures(entry), figure) for entry in self.options], dtype=np.int64)

    def row(self, figure: Figure, limit: float) -> Row:
        """What the blocks may have of a figure, together."""
        return Row(self.amounts(figure), _whole(limit, figure) - _units(self.rest, figure))

    def selection(self, chosen: Integers) -> Selection:
        """What a choice, (blocks,) positions, comes to."""
        entries = [self.options[index] for index in chosen.tolist()]
        everything = [self.rest, *(_figures(entry) for entry in entries)]
        totals = {
            figure: sum(_units(part, figure) for part in everything)
            for figure in FIGURES
            if figure != "latency"
        }
        latency_ms = None
        if all(part.latency_ms is not None for part in everything):
            latency_ms = _value(sum(_units(part, "latency") for part in everything), "latency")
        return Selection(
            choices=tuple(_choice(*entry) for entry in entries),
            figures=Figures(**totals, latency_ms=latency_ms),
            damage=float(sum(option.damage_kl or 0.0 for _, option in entries if option)),
        )


def _choice(block: BlockOptions, option: Option | None) -> Choice:
    if option is None:
        reason = "the limits leave room for the teacher's own module"
        return Choice(block=block.block, candidate=None, config=None, damage_kl=None, reason=reason)
    return Choice(
        block=block.block,
        candidate=option.name,
        config=option.config,
        damage_kl=option.damage_kl,
        reason="part of the least damage within the limits",
    )


def _figures(entry: tuple[BlockOptions, Option | None]) -> Figures:
    block, option = entry
    return block.own if option is None else option.figures


def _units(figures: Figures, figure: Figure) -> int:
    """A figure as an integer: a count, or nanoseconds."""
    value = figures.of(figure)
    assert value is not None, f"{figure} was not measured"
    return round(value * _NS_PER_MS) if figure == "latency" else int(value)


def _whole(limit: float, figure: Figure) -> int:
    """The largest figure, as an integer, that is not over the limit."""
    units = math.floor(Fraction(limit) * _scale(figure))
    return units + 1 if _value(units + 1, figure) <= limit else units  # what 0.1 ms stands for


def _value(units: int, figure: Figure) -> float:
    return units / _scale(figure)


def _scale(figure: Figure) -> int:
    """Units in 1 of a figure: nanoseconds in a millisecond."""
    return _NS_PER_MS if figure == "latency" else 1
