"""The search for a short block phase: what to cache, how to cut the line into jobs.

A candidate is a content of the cache and a cut of the line. Its wall time is the filling plus the
makespan. For few trainees all candidates are looked at (exhaustive.py). Otherwise contents are
improved block by block, and each content's line is cut with a range of caps on a job's cost, and
to the size of the workers. No clock: the effort is counted in steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pbkd.plan.contents import first_contents, fits, neighbours, used_levels
from pbkd.plan.grouping import (
    Group,
    Prices,
    cheapest_groups,
    groups_of,
    price,
    sized_ends,
)
from pbkd.plan.line import (
    Levels,
    Line,
    empty_cache,
    fill_area_s,
    full_cache,
    new_bytes,
)
from pbkd.plan.placement import Placement, place_jobs, place_roughly, quick_makespan

Allowed = Literal["auto", "cache", "relay"]

_MAX_STEPS = 1_500_000
"""Trainees that all sweeps of one search pass, one to two seconds; a fifth for long lines."""

_LARGE = 2_000
"""Trainees above which fewer caps are tried and one candidate is placed with care."""

_SIZE_ROUNDS = (1, 2, 3)
"""Jobs per worker when the line is cut to the size of the workers."""

_NUMBERS = (*range(1, 9), 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256, 512, 1024)
"""Workers that the line is cut for, beside all of them: the fastest ones."""

_SIZE_STEP = 1e-3
"""Relative step at which the sizes of jobs are settled."""

_IMPROVED = 12
"""Contents that are improved, the best ones of those that the search begins with."""

_NEAR = 1.1
"""Quick wall times within this of the shortest are worth a careful placement."""

_SAME = 1e-3
"""Wall times this near to each other, relatively, count as equal: then fewer jobs, less disk."""


@dataclass(frozen=True)
class Candidate:
    """A content of the cache, a cut, and what a quick placement makes of them.

    Attributes:
        levels: no more than the groups read.
        fill_s: wall time of the filling.
        score_s: filling, quick makespan, and what the longest job puts at risk.
    """

    line: Line
    levels: Levels
    groups: tuple[Group, ...]
    fill_s: float
    score_s: float

    @property
    def costs(self) -> list[float]:
        """Of the jobs, in the line's order."""
        return [group.cost_s for group in self.groups]

    @cached_property
    def disk_bytes(self) -> int:
        """To be written."""
        return new_bytes(self.line, self.levels)


@dataclass(frozen=True)
class Placed:
    """A candidate with its careful placement; ``risk_s`` is what its longest job puts at risk."""

    candidate: Candidate
    placement: Placement
    risk_s: float = 0.0

    @property
    def score_s(self) -> float:
        """Filling, makespan and risk."""
        return self.candidate.fill_s + self.placement.makespan_s + self.risk_s

    def exactly(self, speeds: Sequence[float]) -> Placed:
        """With the exact search, where the rough placement is above its bound."""
        if self.placement.makespan_s <= self.placement.bound_s:
            return self
        return Placed(self.candidate, place_jobs(self.candidate.costs, speeds), self.risk_s)


class Search:
    """Candidates of one line on given workers; remembers what it has looked at.

    Of more workers than trainees all share the filling, and the fastest train.
    """

    def __init__(self, line: Line, speeds: Sequence[float], allowed: Allowed) -> None:
        self.line = line
        self.speeds = tuple(sorted(speeds, reverse=True))[: line.size]
        self.total_speed = sum(speeds)
        self.allowed: Allowed = allowed
        self.steps = 0
        self.max_steps = _MAX_STEPS // 5 if line.size > _LARGE else _MAX_STEPS
        self.found: dict[tuple[Group, ...], Candidate] = {}
        self._seen: set[Levels] = set()

    # ------------------------------------------------------------ one content of the cache

    def candidate(self, levels: Levels, groups: Sequence[Group], best_s: float) -> Candidate | None:
        """The candidate, or None where its wall time is surely above ``best_s``."""
        if self.allowed != "cache":
            levels = used_levels(self.line, levels, groups)
        fill_s = fill_area_s(self.line, levels) / self.total_speed
        costs = [group.cost_s for group in groups]
        lowest = max(sum(costs) / self.total_speed, max(costs, default=0.0) / self.speeds[0])
        if fill_s + lowest > best_s:
            return None
        key = tuple(groups)
        if key not in self.found:
            score_s = fill_s + quick_makespan(costs, self.speeds) + self.risk_s(costs)
            self.found[key] = Candidate(self.line, levels, key, fill_s, score_s)
        return self.found[key]

    def risk_s(self, costs: Sequence[float]) -> float:
        """What several workers may have to wait for the longest job beside its planned time."""
        if len(self.speeds) == 1:
            return 0.0
        return self.line.limits.risk * max(costs, default=0.0) / self.speeds[0]

    def best_cut(self, levels: Levels, best_s: float, thorough: bool) -> Candidate | None:
        """The best candidate of one content; None where none is shorter than ``best_s``."""
        prices = price(self.line, levels, self.allowed)
        self.steps += self.line.size
        whole = cheapest_groups(prices, float("inf"))
        best = self.candidate(levels, whole, best_s)
        fair_s = sum(group.cost_s for group in whole) / self.total_speed
        for cap_s in self._caps(fair_s, self._num_caps() if thorough else 3):
            self.steps += 2 * self.line.size
            candidate = self.candidate(levels, cheapest_groups(prices, cap_s), best_s)
            best = _shorter(best, candidate)
            best_s = best.score_s if best else best_s
        for sizes in self._size_patterns(thorough):
            groups = self._cut_to_size(prices, sizes, best_s)
            candidate = self.candidate(levels, groups, best_s) if groups else None
            best = _shorter(best, candidate)
            best_s = best.score_s if best else best_s
        return best

    def quick(self, levels: Levels, best_s: float = float("inf")) -> Candidate | None:
        """The best of a few cuts if it is shorter than ``best_s``; each content once."""
        if levels in self._seen:
            return None
        self._seen.add(levels)
        return self.best_cut(levels, best_s, thorough=False)

    def _num_caps(self) -> int:
        return 8 if self.line.size > _LARGE else 32

    def _caps(self, fair_s: float, count: int) -> list[float]:
        """From more than a fair share of the fastest worker to a part of the slowest one's."""
        highest = 1.5 * fair_s * self.speeds[0]
        lowest = min(fair_s * self.speeds[-1] / 6, highest / 12)
        ratio = lowest / highest if highest else 1.0
        return [highest * ratio ** (number / (count - 1)) for number in range(count)]

    def _size_patterns(self, thorough: bool) -> Iterator[list[float]]:
        """Relative job sizes, some jobs for each worker; thorough: or of the fastest workers."""
        num = len(self.speeds)
        numbers = {num}
        if thorough and self.line.size <= _LARGE:
            numbers |= {n for n in _NUMBERS if n < min(num, self.line.size)}
        for number in sorted(numbers, reverse=True):
            some = list(self.speeds[:number])
            for order in [some] if some[0] == some[-1] else [some, some[::-1]]:
                for rounds in _SIZE_ROUNDS:
                    if rounds == 1 or number * rounds <= self.line.size:
                        yield order * rounds

    def _cut_to_size(
        self, prices: Prices, sizes: Sequence[float], best_s: float
    ) -> list[Group] | None:
        """The cut with jobs in proportion to ``sizes`` and the least largest one.

        None where a job would take longer than ``best_s``.
        """
        low, high = 0.0, best_s
        if best_s == float("inf"):
            high = prices.group(0, self.line.size).cost_s / sizes[0]
        ends = sized_ends(prices, [high * size for size in sizes])
        self.steps += len(sizes)
        if ends is None:
            return None
        while high - low > _SIZE_STEP * high:
            self.steps += len(sizes)
            middle = (low + high) / 2
            tried = sized_ends(prices, [middle * size for size in sizes])
            if tried is None:
                low = middle
            else:
                high, ends = middle, tried
        return groups_of(prices, ends)

    # ------------------------------------------------------------ what to cache

    def run(self) -> None:
        """Fill ``found``."""
        if self.allowed != "auto":
            full = full_cache(self.line) if self.allowed == "cache" else empty_cache(self.line)
            self.best_cut(full, float("inf"), thorough=True)
            return
        starts: list[Candidate] = []
        for levels in first_contents(self.line):
            if fits(self.line, levels) and self.steps < self.max_steps // 2:
                start = self.quick(levels)
                starts += [start] if start else []
        starts.sort(key=_wall)
        improved = [self._improve(start) for start in starts[:_IMPROVED]]
        ranked = sorted([*improved, *starts], key=_wall)
        for levels in list(dict.fromkeys(candidate.levels for candidate in ranked))[:3]:
            self.best_cut(levels, ranked[0].score_s * (1 + _SAME), thorough=True)

    def _improve(self, best: Candidate) -> Candidate:
        """Change one block's level at a time while that shortens the wall time."""
        changed = True
        while changed:
            changed = False
            for neighbour in neighbours(self.line, best.levels):
                if self.steps > self.max_steps:
                    return best
                if not fits(self.line, neighbour):
                    continue
                candidate = self.quick(neighbour, best.score_s * (1 - 1e-6))
                if candidate is not None and candidate.score_s < best.score_s:
                    best, changed = candidate, True
        return best

    # ------------------------------------------------------------ the choice

    @property
    def shortest_s(self) -> float:
        """Quick wall time of the best candidate."""
        return min(candidate.score_s for candidate in self.found.values())

    def choose(self) -> Placed:
        """Place the best candidates with care; of equal wall times the fewest jobs, least disk."""
        num = 1 if self.line.size > _LARGE else 8
        ranked = sorted(self.found.values(), key=_wall)
        near = [c for c in ranked if c.score_s <= ranked[0].score_s * _NEAR]
        few = sorted(near, key=lambda c: (len(c.groups), c.disk_bytes, c.score_s))
        unique = list({c.groups: c for c in [*ranked[:num], *few[:num]]}.values())
        rough = [
            Placed(c, place_roughly(c.costs, self.speeds), self.risk_s(c.costs)) for c in unique
        ]
        rough.sort(key=lambda placed: placed.score_s)
        picked = {id(placed): placed for placed in [*rough[:2], preferred(rough)]}
        return preferred([placed.exactly(self.speeds) for placed in picked.values()])


def preferred(placed: Sequence[Placed]) -> Placed:
    """Shortest wall time; among those as short, within 0.1 %, the fewest jobs, then least disk."""
    limit = min(one.score_s for one in placed) * (1 + _SAME)
    short = [one for one in placed if one.score_s <= limit]
    return min(
        short, key=lambda one: (len(one.candidate.groups), one.candidate.disk_bytes, one.score_s)
    )


def _shorter(one: Candidate | None, other: Candidate | None) -> Candidate | None:
    if one is None or other is None:
        return one or other
    return min(one, other, key=_wall)


def _wall(candidate: Candidate) -> float:
    return candidate.score_s
