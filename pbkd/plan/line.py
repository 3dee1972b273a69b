"""The block phase as one line: blocks in the teacher's order, trainees in the order of blocks.

Turns the records of cost.py into prefix sums, so that a job, which is a stretch of the line, has
its cost in a few additions; and says what filling a cache takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from pbkd.plan.cost import BlockCost, Limits, TraineeCost

Levels = tuple[int, ...]
"""Per block what a plan may take from a cache: NOTHING, or the bits CUT and SIDES.

CUT: the exact input, with which a relay goes on. SIDES: input and output, which a job reads.
"""

NOTHING, CUT, SIDES = 0, 1, 2


@dataclass(frozen=True)
class Line:
    """B blocks and n trainees.

    Attributes:
        trainees: sorted by block; those of one block as given.
        block_of: (n,), index of each trainee's block.
        own_to: (n + 1,), sum of ``own_s`` of the trainees before.
        memory_to: (n + 1,), the same of memory_bytes.
        memory_first: (n + 1,), the first trainee that a job may begin with that ends before j:
            what fits into memory, or one trainee at least.
        teacher_to: (B + 1,), the teacher's seconds before each block.
        score_to: (B,), of the teacher's pass for the scores of a job that ends with each block.
        has_trainees: (B,).
    """

    blocks: tuple[BlockCost, ...]
    trainees: tuple[TraineeCost, ...]
    limits: Limits
    block_of: tuple[int, ...]
    own_to: tuple[float, ...]
    memory_to: tuple[int, ...]
    memory_first: tuple[int, ...]
    teacher_to: tuple[float, ...]
    score_to: tuple[float, ...]
    has_trainees: tuple[bool, ...]

    @property
    def size(self) -> int:
        """Number of trainees."""
        return len(self.trainees)


def make_line(blocks: Sequence[BlockCost], trainees: Sequence[TraineeCost], limits: Limits) -> Line:
    """The line; every trainee's block must be listed, paths and names must be unique."""
    index = {block.path: number for number, block in enumerate(blocks)}
    assert len(index) == len(blocks), "two blocks of one path"
    assert len({t.name for t in trainees}) == len(trainees), "two trainees of one name"
    ordered = sorted(trainees, key=lambda trainee: index[trainee.block])
    block_of = tuple(index[trainee.block] for trainee in ordered)
    memory_to = tuple(accumulate((t.memory_bytes for t in ordered), initial=0))
    with_trainees = set(block_of)
    return Line(
        blocks=tuple(blocks),
        trainees=tuple(ordered),
        limits=limits,
        block_of=block_of,
        own_to=tuple(accumulate((t.own_s for t in ordered), initial=0.0)),
        memory_to=memory_to,
        memory_first=_memory_first(memory_to, limits.memory_bytes),
        teacher_to=tuple(accumulate((block.teacher_s for block in blocks), initial=0.0)),
        score_to=tuple(accumulate((block.before_score_s for block in blocks), max)),
        has_trainees=tuple(number in with_trainees for number in range(len(blocks))),
    )


def _memory_first(memory_to: Sequence[int], limit: float) -> tuple[int, ...]:
    firsts = [0]
    first = 0
    for end in range(1, len(memory_to)):
        while first < end - 1 and memory_to[end] - memory_to[first] > limit:
            first += 1
        firsts.append(first)
    return tuple(firsts)


# ---------------------------------------------------------------- what a cache holds


def holds_cut(line: Line, levels: Levels, number: int) -> bool:
    """Whether a relay can begin with the block: its exact input is there or will be written."""
    block = line.blocks[number]
    return block.is_cut and (bool(levels[number] & CUT) or block.has_cut)


def holds_sides(line: Line, levels: Levels, number: int) -> bool:
    """Whether input and output of a block can be read."""
    block = line.blocks[number]
    return bool(levels[number] & SIDES) or (block.has_input and block.has_output)


def new_items(block: BlockCost, level: int) -> list[tuple[float, int]]:
    """(seconds to write, bytes) of each item that is not there already."""
    items = [
        (level & CUT and not block.has_cut, block.write_cut_s, block.cut_bytes),
        (level & SIDES and not block.has_input, block.write_input_s, block.input_bytes),
        (level & SIDES and not block.has_output, block.write_output_s, block.output_bytes),
    ]
    return [(seconds, size) for new, seconds, size in items if new]


def new_bytes(line: Line, levels: Levels) -> int:
    """Bytes that must be written."""
    pairs = zip(line.blocks, levels, strict=True)
    return sum(size for block, level in pairs if level for _, size in new_items(block, level))


def fill_area_s(line: Line, levels: Levels) -> float:
    """Seconds at speed 1 of filling: the teacher up to the last new item, and all writes."""
    teacher = passed = writes = 0.0
    for block, level in zip(line.blocks, levels, strict=True):
        passed += block.fill_teacher_s
        items = new_items(block, level) if level else []
        if items:
            teacher = passed
            writes += sum(seconds for seconds, _ in items)
    return teacher + writes


def full_cache(line: Line) -> Levels:
    """Both sides of every block that has trainees."""
    return tuple(SIDES if has else NOTHING for has in line.has_trainees)


def empty_cache(line: Line) -> Levels:
    """Nothing beside what is there already."""
    return (NOTHING,) * len(line.blocks)


def cheapest_source_s(line: Line, block: int) -> float:
    """Least seconds at speed 1 that any job with this block pays for its source."""
    costs = [line.teacher_to[block + 1]]
    own = line.blocks[block]
    costs.append(own.read_input_s + own.read_output_s)
    costs += [
        line.blocks[start].read_cut_s + line.teacher_to[block + 1] - line.teacher_to[start]
        for start in range(block + 1)
        if line.blocks[start].is_cut
    ]
    return min(costs)


def smallest_number_of_jobs(line: Line) -> int:
    """No plan has fewer jobs: memory, where every trainee fits."""
    if not line.size:
        return 0
    fits = sum(t.memory_bytes for t in line.trainees if t.memory_bytes <= line.limits.memory_bytes)
    large = sum(t.memory_bytes > line.limits.memory_bytes for t in line.trainees)
    shared = math.ceil(fits / line.limits.memory_bytes) if fits else 0
    return max(1, large + shared)
