"""Which students are made: those of the named budgets and those of the sweep, or why not."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from pbkd.config import Figure, StitchConfig, StudentConfig, SweepConfig
from pbkd.errors import BudgetError
from pbkd.students.select import (
    BlockOptions,
    Choice,
    Figures,
    Selection,
    nearest,
    smallest,
    teacher_figures,
    try_select,
)

_log = logging.getLogger(__name__)

_NAMES: dict[Figure, str] = {
    "parameters": "parameters",
    "macs": "MACs",
    "bytes": "bytes",
    "latency": "latency",
}


class ChosenStudent(BaseModel):
    """A student that is to be made.

    Attributes:
        limits: figure to what was allowed; latency in milliseconds.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    limits: dict[Figure, float]
    selection: Selection


def needs_latency(config: StitchConfig) -> bool:
    """Whether some student's limits are of latency, so that it must be measured."""
    limited = any("latency" in student.limits for student in config.students.values())
    return limited or (config.sweep is not None and config.sweep.along == "latency")


def limits_of(budget: StudentConfig, teacher: Figures) -> dict[Figure, float]:
    """A budget's limits as figures; latency in milliseconds where the teacher's was measured."""
    limits = {}
    for figure, limit in budget.limits.items():
        whole = teacher.of(figure)
        if whole is not None:
            limits[figure] = limit.of(whole)
    return limits


def choose_students(
    blocks: Sequence[BlockOptions], rest: Figures, config: StitchConfig
) -> list[ChosenStudent]:
    """The students of ``stitch.students``, then those of ``stitch.sweep``, smallest first.

    Args:
        blocks: with every trained candidate and its damage.
        rest: figures of the network without the blocks.

    Raises:
        BudgetError: names every student whose limits cannot be kept, with the nearest figures that
            can be had; or nothing is left to make.
    """
    allowed = [block.within(config.max_damage) for block in blocks]
    teacher = teacher_figures(blocks, rest)
    chosen, problems = [], []
    for name, budget in config.students.items():
        limits = limits_of(budget, teacher)
        selection = try_select(allowed, rest, limits)
        if selection is None:
            problems.append(_explained(name, limits, blocks, allowed, rest, config.max_damage))
            continue
        if selection.is_teacher:
            _log.warning("student %s: the teacher itself keeps to the limits", name)
        chosen.append(ChosenStudent(name=name, limits=limits, selection=selection))
    if problems:
        raise BudgetError("; ".join(problems))
    if config.sweep is not None:
        chosen += _swept(allowed, rest, config.sweep, chosen)
    if not chosen:
        raise BudgetError(
            f"stitch.sweep: no choice of candidates has less {_NAMES[_along(config)]} than the "
            f"teacher; {_left_out(blocks, allowed, config.max_damage)}; raise stitch.max_damage, "
            "or add smaller candidates to blocks.candidates"
        )
    reasons = {block.block: _refusal(block, config.max_damage) for block in blocks}
    return [_with_reasons(student, reasons) for student in chosen]


def check_budgets(blocks: Sequence[BlockOptions], rest: Figures, config: StitchConfig) -> None:
    """Refuse budgets that no choice keeps to, however well the candidates train.

    Needs no training: parameters, MACs and bytes are those of the structures. Limits on latency are
    left out, where it was not measured.

    Raises:
        BudgetError: as ``choose_students``.
    """
    harmless = [block.as_if_harmless() for block in blocks]
    teacher = teacher_figures(blocks, rest)
    problems = []
    for name, budget in config.students.items():
        limits = limits_of(budget, teacher)
        if try_select(harmless, rest, limits) is None:
            problems.append(_explained(name, limits, harmless, harmless, rest, math.inf))
    if problems:
        raise BudgetError("; ".join(problems))


# ---------------------------------------------------------------- the sweep


def _swept(
    blocks: Sequence[BlockOptions],
    rest: Figures,
    sweep: SweepConfig,
    named: Sequence[ChosenStudent],
) -> list[ChosenStudent]:
    """Students along a figure; what equals the teacher, a named or a smaller one is dropped."""
    figure = sweep.along
    whole = teacher_figures(blocks, rest).of(figure)
    assert whole is not None
    known = {student.selection.names: student.name for student in reversed(named)}
    students = []
    for index, limit in enumerate(_spread(smallest(blocks, rest, figure), whole, sweep.points)):
        name = f"sweep-{index + 1}"
        selection = try_select(blocks, rest, {figure: limit})
        assert selection is not None, limit  # the smallest value can be reached
        same = "the teacher" if selection.is_teacher else known.get(selection.names)
        if same is not None:
            _log.info("%s (%s): the same as %s, dropped", name, _text(figure, limit), same)
            continue
        known[selection.names] = name
        students.append(ChosenStudent(name=name, limits={figure: limit}, selection=selection))
    return students


_NEXT_TO_NOTHING = 1e-3


def _spread(low: float, high: float, points: int) -> list[float]:
    """From ``low`` on, evenly on a logarithmic scale; ``high`` would be the next one."""
    low = max(low, _NEXT_TO_NOTHING * high)  # of a network that candidates leave no parameters
    return [low * (high / low) ** (index / points) for index in range(points)]


def _along(config: StitchConfig) -> Figure:
    assert config.sweep is not None  # StitchConfig asks for a student or a sweep
    return config.sweep.along


# ---------------------------------------------------------------- what to say


def _explained(
    name: str,
    limits: Mapping[Figure, float],
    blocks: Sequence[BlockOptions],
    allowed: Sequence[BlockOptions],
    rest: Figures,
    max_damage: float,
) -> str:
    """Why a budget cannot be kept, and what could be."""
    wanted = " and ".join(_text(figure, limit) for figure, limit in limits.items())
    text = f"student {name}: no choice of candidates keeps to {wanted}; "
    text += _reachable(allowed, rest, limits)
    lifted = [block.within(math.inf) for block in blocks]
    if lifted != list(allowed):
        fits = try_select(lifted, rest, limits) is not None
        instead = "the limits can be kept" if fits else _reachable(lifted, rest, limits)
        text += f"; {_left_out(blocks, allowed, max_damage)}, without it {instead}"
    outside = {figure: rest.of(figure) or 0.0 for figure in limits}
    if alone := [_text(f, outside[f]) for f, limit in limits.items() if outside[f] > limit]:
        return (
            f"{text}. What lies outside of the blocks has {' and '.join(alone)} alone: raise the "
            "limits, or take more into blocks, by blocks.select or blocks.paths"
        )
    return f"{text}. Raise the limits, or add smaller candidates to blocks.candidates"


def _reachable(
    blocks: Sequence[BlockOptions], rest: Figures, limits: Mapping[Figure, float]
) -> str:
    least = ", ".join(_text(figure, smallest(blocks, rest, figure)) for figure in limits)
    if len(limits) == 1:
        return f"the smallest reachable is {least}"
    figures = nearest(blocks, rest, limits).figures
    values = {figure: figures.of(figure) or 0.0 for figure in limits}
    excess = max(values[figure] / limit - 1 for figure, limit in limits.items())
    together = ", ".join(_text(figure, value) for figure, value in values.items())
    return (
        f"the smallest reachable are, each alone, {least}; nearest to all together is {together} "
        f"(at most {excess:.1%} over)"
    )


def _left_out(
    blocks: Sequence[BlockOptions], allowed: Sequence[BlockOptions], max_damage: float
) -> str:
    total, kept = (sum(len(block.candidates) for block in each) for each in (blocks, allowed))
    return f"stitch.max_damage {max_damage:g} leaves out {total - kept} of {total} candidates"


def _text(figure: Figure, value: float) -> str:
    if figure == "latency":
        return f"latency {value:.4g} ms"
    return f"{math.floor(value):,} {_NAMES[figure]}"


def _refusal(block: BlockOptions, max_damage: float) -> Choice | None:
    """The choice of a block that has no candidate within the damage; None where it has one."""
    if block.within(max_damage).candidates:
        return None
    damages = [o.damage_kl for o in block.candidates if o.damage_kl is not None]
    least = min(damages, default=None)
    text = "not finite" if least is None else f"{least:.3g}"
    reason = f"damage {text} is over stitch.max_damage {max_damage:g}"
    return Choice(block=block.block, candidate=None, config=None, damage_kl=least, reason=reason)


def _with_reasons(student: ChosenStudent, refusals: Mapping[str, Choice | None]) -> ChosenStudent:
    choices = [refusals[choice.block] or choice for choice in student.selection.choices]
    selection = student.selection.model_copy(update={"choices": tuple(choices)})
    return student.model_copy(update={"selection": selection})
