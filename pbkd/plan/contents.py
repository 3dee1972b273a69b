"""What a cache may hold: contents that a search begins with, and steps from one to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pbkd.plan.grouping import FROM_IMAGES, Group
from pbkd.plan.line import CUT, NOTHING, SIDES, Levels, Line, empty_cache, full_cache, new_bytes

_CUTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
"""Numbers of cached inputs, evenly apart, that the search begins with."""


def fits(line: Line, levels: Levels) -> bool:
    """Whether the disk holds what is new."""
    return new_bytes(line, levels) <= line.limits.disk_bytes


def used_levels(line: Line, levels: Levels, groups: Sequence[Group]) -> Levels:
    """``levels`` without what no group reads."""
    used = [NOTHING] * len(levels)
    for group in groups:
        if group.source == "cache":
            for number in set(line.block_of[group.first : group.end]):
                used[number] |= SIDES
        elif group.start != FROM_IMAGES:
            used[group.start] |= CUT
    return tuple(used)


def first_contents(line: Line) -> Iterator[Levels]:
    """Contents to begin with; those that do not fit the disk are left to the caller."""
    none = empty_cache(line)
    yield none
    yield full_cache(line)
    worth = [number for number in range(len(line.blocks)) if _worth_reading(line, number)]
    by_bytes = sorted(worth, key=lambda number: _bytes(line, number))
    yield from _everything(line)
    yield _with(none, SIDES, worth)
    yield _until_full(line, by_bytes)
    yield _until_full(line, worth[::-1])
    cuts = [number for number, block in enumerate(line.blocks) if block.is_cut]
    yield _with(none, CUT, cuts)
    for count in _CUTS:
        if count < len(cuts):
            yield _with(none, CUT, _evenly(line, cuts, count))
    for share in (1 / 4, 1 / 2, 3 / 4):
        number = round(share * len(worth))
        yield _with(none, SIDES, by_bytes[:number])
        yield _with(none, SIDES, worth[number:])
        yield _with(none, SIDES, worth[:number])


def _everything(line: Line) -> Iterator[Levels]:
    """All that can be cached of the first, or the last, part of the blocks.

    Jobs take what they like best of it; the rest is dropped at once.
    """
    everything = [
        CUT * block.is_cut | SIDES * has
        for block, has in zip(line.blocks, line.has_trainees, strict=True)
    ]
    num = len(everything)
    for share in (1, 3 / 4, 1 / 2, 1 / 4):
        kept = round(share * num)
        yield (*everything[:kept], *[NOTHING] * (num - kept))
        yield (*[NOTHING] * (num - kept), *everything[num - kept :])


def _until_full(line: Line, numbers: Sequence[int]) -> Levels:
    """Both sides of as many blocks, in this order, as the disk holds."""
    levels = empty_cache(line)
    for number in numbers:
        more = _with(levels, SIDES, [number])
        if fits(line, more):
            levels = more
    return levels


def neighbours(line: Line, levels: Levels) -> Iterator[Levels]:
    """Contents that differ in one thing: it is dropped, added, or a cut goes to the next block."""
    for number, block in enumerate(line.blocks):
        if block.is_cut:
            yield _with(levels, levels[number] ^ CUT, [number])
        if line.has_trainees[number]:
            yield _with(levels, levels[number] ^ SIDES, [number])
        if levels[number] & CUT:
            bare = _with(levels, levels[number] ^ CUT, [number])
            for other in (number - 1, number + 1):
                if 0 <= other < len(levels) and line.blocks[other].is_cut:
                    yield _with(bare, levels[other] | CUT, [other])


def _with(levels: Levels, level: int, numbers: Sequence[int]) -> Levels:
    changed = list(levels)
    for number in numbers:
        changed[number] = level
    return tuple(changed)


def _evenly(line: Line, cuts: Sequence[int], count: int) -> list[int]:
    """Cuts that part the teacher's time into about equal stretches."""
    whole = line.teacher_to[-1]
    wanted = [whole * (part + 1) / (count + 1) for part in range(count)]
    return sorted({min(cuts, key=lambda c: abs(line.teacher_to[c] - time)) for time in wanted})


def _worth_reading(line: Line, number: int) -> bool:
    """Whether a block with trainees costs less from a cache than by the teacher from images."""
    block = line.blocks[number]
    reads = block.read_input_s + block.read_output_s
    return line.has_trainees[number] and reads < line.teacher_to[number + 1]


def _bytes(line: Line, number: int) -> int:
    block = line.blocks[number]
    return block.input_bytes + block.output_bytes
