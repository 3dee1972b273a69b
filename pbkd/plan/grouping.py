"""Cutting the line of trainees into jobs, given what can be read from a cache.

A job is a stretch ``[first, end)`` of the line. Fed by a relay it costs ``job_s + teacher up to its
last block, to train and to score + gain of its best start + own``, where the gain, at most 0, is
what a cached start spares; it depends on the first block alone. Fed by a cache it costs ``job_s +
teacher up to its last block, to score + reads + own``. Both are a term of the end plus a term of
the beginning, and the stretches that keep to a cap are windows that only move forward: so the
cheapest cut is found in one sweep.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from pbkd.plan.line import Levels, Line, holds_cut, holds_sides

Source = Literal["cache", "relay"]

FROM_IMAGES = -1
"""Start of a relay that begins with the images."""

_FEWER_JOBS = 1e-9
"""Of cuts of equal cost the one with fewer jobs: what a job counts more, of all costs."""

_OVER_CAP = 1e3
"""How much more a second counts that a single trainee is above the cap."""


class Group(NamedTuple):
    """One job: trainees ``first`` to ``end - 1``; ``start`` is a block's index or FROM_IMAGES."""

    first: int
    end: int
    source: Source
    start: int
    cost_s: float


@dataclass(frozen=True)
class Prices:
    """What stretches cost under given contents of a cache.

    Attributes:
        gain: (n,), of a relay that begins with trainee i: at most 0.
        start: (n,), where that relay begins.
        relay_end: (n + 1,), ``job_s + teacher + own`` up to trainee j - 1.
        relay_first: (n,), ``gain - own`` before trainee i: the cost is the sum of the two.
        cache_end, cache_first: the same for a job that reads.
        cached_first: (n + 1,), the first trainee that a reading job may begin with that ends
            before j; j where the last block is not cached.
        relay: whether jobs may relay.
    """

    line: Line
    start: tuple[int, ...]
    relay_end: tuple[float, ...]
    relay_first: tuple[float, ...]
    cache_end: tuple[float, ...]
    cache_first: tuple[float, ...]
    cached_first: tuple[int, ...]
    relay: bool

    def group(self, first: int, end: int) -> Group:
        """The stretch with its cheapest source; a relay where both cost the same."""
        relay_s = self.relay_end[end] + self.relay_first[first]
        if self.cached_first[end] <= first:
            cache_s = self.cache_end[end] + self.cache_first[first]
            if not self.relay or cache_s < relay_s:
                return Group(first, end, "cache", FROM_IMAGES, cache_s)
        assert self.relay
        return Group(first, end, "relay", self.start[first], relay_s)


def price(line: Line, levels: Levels, allowed: Literal["auto", "cache", "relay"]) -> Prices:
    """Prices when the cache holds ``levels`` and what is there already.

    Args:
        allowed: "relay": from the images alone; "cache": read alone; "auto": all.
    """
    gain, starts = _best_starts(line, levels, allowed != "relay")
    readable = [
        allowed != "relay" and holds_sides(line, levels, block) for block in range(len(line.blocks))
    ]
    reads_to = [0.0]
    for block, has, ready in zip(line.blocks, line.has_trainees, readable, strict=True):
        cost = block.read_input_s + block.read_output_s if has and ready else 0.0
        reads_to.append(reads_to[-1] + cost)
    cached_first = [0]
    for end, block_index in enumerate(line.block_of, start=1):
        cached_first.append(cached_first[-1] if readable[block_index] else end)
    job_s = line.limits.job_s
    own = [own + line.score_to[b] for b, own in zip(line.block_of, line.own_to[1:], strict=True)]
    ends = list(zip(line.block_of, own, strict=True))
    firsts = list(zip(line.block_of, line.own_to[:-1], strict=True))
    return Prices(
        line=line,
        start=tuple(starts[block] for block in line.block_of),
        relay_end=(job_s, *(job_s + line.teacher_to[b + 1] + own for b, own in ends)),
        relay_first=tuple(gain[b] - own for b, own in firsts),
        cache_end=(job_s, *(job_s + reads_to[b + 1] + own for b, own in ends)),
        cache_first=tuple(-reads_to[b] - own for b, own in firsts),
        cached_first=tuple(cached_first),
        relay=allowed != "cache",
    )


def cheapest_groups(prices: Prices, cap_s: float) -> list[Group]:
    """The cut of least total cost whose jobs all keep to ``cap_s`` and to memory.

    A single trainee above the cap gets a job of its own. One sweep with a queue per source that
    holds the beginnings that may still be the best (sliding-window minimum): O(n).
    """
    line = prices.line
    num = line.size
    each = _FEWER_JOBS * (line.own_to[-1] + line.teacher_to[-1])
    best = [0.0]
    come_from = [0]
    relays = _Window(prices.relay_first, cap_s)
    reads = _Window(prices.cache_first, cap_s)
    for end in range(1, num + 1):
        last = end - 1
        total, first = float("inf"), last
        if prices.relay:
            relays.push(last, best[last])
            total, first = relays.best(prices.relay_end[end], line.memory_first[end])
        if prices.cached_first[end] < end:
            reads.push(last, best[last])
            lowest = max(line.memory_first[end], prices.cached_first[end])
            read_total, read_first = reads.best(prices.cache_end[end], lowest)
            if read_total < total:
                total, first = read_total, read_first
        else:
            reads.clear()
        best.append(total + each)
        come_from.append(first)
    groups = []
    end = num
    while end:
        groups.append(prices.group(come_from[end], end))
        end = come_from[end]
    return groups[::-1]


def sized_ends(prices: Prices, sizes_s: Sequence[float]) -> list[int] | None:
    """Ends of jobs in the line's order, the k-th as long as it may be with at most ``sizes_s[k]``.

    None where trainees are left over. As a later beginning never costs more, taking as much as
    fits is the best way to get through with these sizes.
    """
    num = prices.line.size
    memory_first, cached_first = prices.line.memory_first, prices.cached_first
    relay_end, relay_first = prices.relay_end, prices.relay_first
    cache_end, cache_first = prices.cache_end, prices.cache_first
    ends: list[int] = []
    first = 0
    for size in sizes_s:
        end = bisect_right(relay_end, size - relay_first[first]) - 1 if prices.relay else 0
        if cached_first[first + 1] <= first:
            read_end = bisect_right(cache_end, size - cache_first[first]) - 1
            if read_end > end:
                end = max(end, min(read_end, bisect_right(cached_first, first) - 1))
        if end > first:
            if memory_first[end] > first:
                end = bisect_right(memory_first, first) - 1
            ends.append(end)
            if end == num:
                return ends
            first = end
    return None


def groups_of(prices: Prices, ends: Sequence[int]) -> list[Group]:
    """The jobs of a cut."""
    return [prices.group(first, end) for first, end in pairwise([0, *ends])]


class _Window:
    """Beginnings of a job that may still be the best, the cheapest first."""

    def __init__(self, terms: Sequence[float], cap_s: float) -> None:
        self.terms = terms
        self.cap_s = cap_s
        self.queue: deque[tuple[int, float, float]] = deque()  # beginning, its term, its key

    def clear(self) -> None:
        self.queue.clear()

    def push(self, first: int, before: float) -> None:
        """Add a beginning; ``before`` is the cost of all jobs before it."""
        term = self.terms[first]
        key = before + term
        queue = self.queue
        while queue and queue[-1][2] > key:
            queue.pop()
        queue.append((first, term, key))

    def best(self, end_term: float, lowest: int) -> tuple[float, int]:
        """Least cost up to an end, and the beginning of its last job."""
        queue = self.queue
        room = self.cap_s - end_term
        first, term, key = queue[0]
        while (first < lowest or term > room) and len(queue) > 1:
            queue.popleft()
            first, term, key = queue[0]
        total = key + end_term
        return (total + _OVER_CAP * (term - room) if term > room else total), first


def _best_starts(line: Line, levels: Levels, may_read: bool) -> tuple[list[float], list[int]]:
    """Per block, what a job that begins there spares by its best start, and that start."""
    gain, start = 0.0, FROM_IMAGES
    gains: list[float] = []
    starts: list[int] = []
    for number, block in enumerate(line.blocks):
        if may_read and holds_cut(line, levels, number):
            spared = block.read_cut_s - line.teacher_to[number]
            if spared < gain:
                gain, start = spared, number
        gains.append(gain)
        starts.append(start)
    return gains, starts
