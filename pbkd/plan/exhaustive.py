"""All contents of the cache and all cuts of a short line: the best plan of few trainees."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pbkd.plan.contents import fits, used_levels
from pbkd.plan.grouping import Group, Prices, price
from pbkd.plan.line import (
    CUT,
    SIDES,
    Levels,
    Line,
    empty_cache,
    fill_area_s,
    full_cache,
)
from pbkd.plan.placement import place_jobs
from pbkd.plan.search import Candidate, Placed, Search

_MAX_TRAINEES = 8
_MAX_CONTENTS = 300
_MAX_PLACED = 300
"""Candidates that are placed with care."""

_SAME = 1e-3


def is_short(line: Line) -> bool:
    """Whether all candidates can be looked at."""
    options = 1
    for block, has in zip(line.blocks, line.has_trainees, strict=True):
        options *= (1 + block.is_cut) * (1 + has)
    return 0 < line.size <= _MAX_TRAINEES and options <= _MAX_CONTENTS


def all_placed(search: Search) -> list[Placed]:
    """Every candidate that may be the best, placed; a superset of the shortest within 0.1 %.

    Candidates go by a lower bound of their wall time, the smallest first, until that bound is
    above the shortest wall time so far.
    """
    line, speeds = search.line, search.speeds
    cuts = _cuts(line.size)
    bounds: list[tuple[float, int, int]] = []
    contents = [levels for levels in _contents(search) if fits(line, levels)]
    priced = [price(line, levels, search.allowed) for levels in contents]
    for number, (levels, prices) in enumerate(zip(contents, priced, strict=True)):
        costs = _stretch_costs(prices)[cuts]
        longest = costs.max(axis=1) / speeds[0]
        area = costs.sum(axis=1) / search.total_speed
        fill_s = fill_area_s(line, levels) / search.total_speed
        walls = fill_s + np.maximum(area, longest)
        bounds += [(wall, number, cut) for cut, wall in enumerate(walls.tolist())]
    bounds.sort()
    placed: list[Placed] = []
    best_s = float("inf")
    for bound, number, cut in bounds:
        if bound > best_s * (1 + _SAME) or len(placed) >= _MAX_PLACED:
            break
        groups = _groups(priced[number], cuts[cut])
        if groups is None:
            continue
        one = _place(search, contents[number], groups)
        placed.append(one)
        best_s = min(best_s, one.score_s)
    return placed


def _place(search: Search, levels: Levels, groups: tuple[Group, ...]) -> Placed:
    if search.allowed != "cache":
        levels = used_levels(search.line, levels, groups)
    fill_s = fill_area_s(search.line, levels) / search.total_speed
    costs = [group.cost_s for group in groups]
    placement, risk_s = place_jobs(costs, search.speeds), search.risk_s(costs)
    score_s = fill_s + placement.makespan_s + risk_s
    candidate = Candidate(search.line, levels, groups, fill_s, score_s)
    return Placed(candidate, placement, risk_s)


def _contents(search: Search) -> Iterator[Levels]:
    line = search.line
    if search.allowed == "relay":
        yield empty_cache(line)
    elif search.allowed == "cache":
        yield full_cache(line)
    else:
        allowed = [
            CUT * block.is_cut | SIDES * has
            for block, has in zip(line.blocks, line.has_trainees, strict=True)
        ]
        options = [[level for level in range(4) if level & bits == level] for bits in allowed]
        yield from itertools.product(*options)


def _cuts(num: int) -> NDArray[np.int64]:
    """(2 ** (num - 1), num): per cut the stretches ``first * (num + 1) + end``; 0: none."""
    cuts = np.zeros((2 ** (num - 1), num), dtype=np.int64)
    for number in range(len(cuts)):
        ends = [end for end in range(1, num) if number >> (end - 1) & 1]
        for job, (first, end) in enumerate(itertools.pairwise([0, *ends, num])):
            cuts[number, job] = first * (num + 1) + end
    return cuts


def _stretch_costs(prices: Prices) -> NDArray[np.float64]:
    """Cost by ``first * (num + 1) + end``: infinite where memory or the source forbids it."""
    line = prices.line
    num = line.size
    costs = np.full((num + 1) * (num + 1), np.inf)
    costs[0] = 0.0
    for end in range(1, num + 1):
        for first in range(line.memory_first[end], end):
            if prices.relay or prices.cached_first[end] <= first:
                costs[first * (num + 1) + end] = prices.group(first, end).cost_s
    return costs


def _groups(prices: Prices, cut: NDArray[np.int64]) -> tuple[Group, ...] | None:
    """The groups of a cut; None where one of them is forbidden."""
    line = prices.line
    stretches = [divmod(code, line.size + 1) for code in cut.tolist() if code]
    if any(first < line.memory_first[end] for first, end in stretches):
        return None
    return tuple(prices.group(first, end) for first, end in stretches)
