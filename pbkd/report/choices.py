"""What stands in each block: a table for one student, a matrix for a family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pbkd.report.results import TraineeFigures
from pbkd.report.tables import Table
from pbkd.students import Choice

_TITLE = "What was chosen"


@dataclass(frozen=True)
class Cell:
    """A student's choice for a block.

    Attributes:
        candidate: None where the teacher's own module stays.
        damage: nats, as text; empty where the teacher's own module stays.
        shade: 0 to 100, higher for more damage.
        reason: why it was chosen.
    """

    candidate: str | None
    damage: str
    shade: int
    reason: str


@dataclass(frozen=True)
class ChoiceMatrix:
    """Blocks as rows, students as columns."""

    title: str
    students: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def choice_table(choices: Sequence[Choice], trainees: Sequence[TraineeFigures]) -> Table:
    """Per block of one student: what stands there now, at which damage, and why."""
    dropped = {(t.block, t.candidate): t.damage.accuracy_drop for t in trainees}
    rows = []
    for choice in choices:
        drop = dropped.get((choice.block, choice.candidate or ""))
        rows.append(
            (
                choice.block,
                choice.candidate or "teacher's own",
                _damage(choice.damage_kl),
                "" if drop is None else f"{100 * drop:.2f}",
                choice.reason,
            )
        )
    heads = ("block", "chosen", "damage (nats)", "accuracy lost (points)", "why")
    return Table(_TITLE, heads, tuple(rows))


def candidate_table(trainees: Sequence[TraineeFigures]) -> Table:
    """Every candidate with its damage, in the order of the network."""
    rows = [
        (t.block, t.candidate, _damage(t.damage.kl), f"{100 * t.damage.accuracy_drop:.2f}")
        for t in trainees
    ]
    heads = ("block", "candidate", "damage (nats)", "accuracy lost (points)")
    return Table("All candidates in numbers", heads, tuple(rows))


def choice_matrix(choices: Mapping[str, Sequence[Choice]]) -> ChoiceMatrix:
    """All students' choices, blocks in the order of the network."""
    taken = {(student, choice.block): choice for student, own in choices.items() for choice in own}
    damages = [
        c.damage_kl
        for c in taken.values()
        if c.candidate and c.damage_kl is not None and c.damage_kl > 0
    ]
    low, high = min(damages, default=1.0), max(damages, default=1.0)
    blocks = dict.fromkeys(choice.block for own in choices.values() for choice in own)

    def cell(student: str, block: str) -> Cell | None:
        choice = taken.get((student, block))
        if choice is None:
            return None
        if choice.candidate is None:
            return Cell(None, "", 0, choice.reason)
        return Cell(
            choice.candidate,
            _damage(choice.damage_kl),
            _shade(choice.damage_kl, low, high),
            choice.reason,
        )

    return ChoiceMatrix(
        _TITLE,
        tuple(choices),
        tuple((block, tuple(cell(student, block) for student in choices)) for block in blocks),
    )


def _damage(kl: float | None) -> str:
    return "not finite" if kl is None else f"{kl:.4f}"


def _shade(kl: float | None, low: float, high: float) -> int:
    """From 6 for the least damage to 40 for the most, on a logarithmic scale."""
    if kl is None or kl <= 0 or high <= low:
        return 6
    return round(6 + 34 * math.log(kl / low) / math.log(high / low))
