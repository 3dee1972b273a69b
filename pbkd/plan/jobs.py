"""The plan of the block phase: which trainees share a job, what feeds it, where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pbkd.errors import ConfigError
from pbkd.plan.bottleneck import bottleneck
from pbkd.plan.bounds import placement_bound
from pbkd.plan.cost import BlockCost, Limits, TraineeCost
from pbkd.plan.exhaustive import all_placed, is_short
from pbkd.plan.grouping import FROM_IMAGES, Group
from pbkd.plan.line import (
    CUT,
    SIDES,
    Levels,
    Line,
    cheapest_source_s,
    empty_cache,
    fill_area_s,
    full_cache,
    make_line,
    new_bytes,
    smallest_number_of_jobs,
)
from pbkd.plan.placement import dispatch_order, place_jobs, rearranged
from pbkd.plan.planned import CachedItem, Plan, PlannedJob, Work
from pbkd.plan.search import Allowed, Candidate, Placed, Search, preferred

_HOPELESS = 1.25
"""A pure source whose quick wall time is longer than the mixture's by this is not placed."""


def plan_block_phase(
    blocks: Sequence[BlockCost],
    trainees: Sequence[TraineeCost],
    speeds: Sequence[float],
    limits: Limits = Limits(),  # noqa: B008 - frozen
    source: Allowed = "auto",
) -> Plan:
    """The plan with the shortest wall time that the search finds.

    Of wall times within 0.1 % the plan with fewer jobs is taken, then the one with less on disk.
    A trainee above the limit of memory gets a job of its own and is named in ``too_large``.

    Args:
        blocks: in the teacher's order; paths are unique.
        trainees: names are unique, every block is in ``blocks``.
        speeds: of the workers, at least one, positive.
        source: "relay": every job runs the teacher from the images; "cache": every job reads, both
            sides of every block with trainees are cached; "auto": what is shortest, both and
            relays that go on from a cached cut included.

    Raises:
        ConfigError: the source is "cache" and the cache does not fit the disk.
    """
    line = make_line(blocks, trainees, limits)
    full_bytes = new_bytes(line, full_cache(line))
    if source == "cache" and full_bytes > limits.disk_bytes:
        raise ConfigError(
            f"a cache of all blocks takes {full_bytes / 1e9:.3g} GB, "
            f"{limits.disk_bytes / 1e9:.3g} GB are free for it; "
            "set `activations.source: auto` or `relay`, or free disk space"
        )
    if not trainees:
        nothing = Candidate(line, empty_cache(line), (), 0.0, 0.0)
        return _plan(line, speeds, Placed(nothing, place_jobs([], speeds)))
    return _plan(line, speeds, _best(line, speeds, source))


def on_more_workers(plan: Plan, speeds: Sequence[float]) -> Plan:
    """The same jobs and cache on other workers, in the same order of dispatch.

    The search is a heuristic for long lines: on more workers the jobs of a plan for fewer may be
    done earlier than those that it finds.
    """
    placement = place_jobs(plan.placement.costs, speeds)
    fill_s = plan.work.fill_s / sum(speeds)
    return replace(
        plan,
        fill_s=fill_s,
        placement=placement,
        wall_s=fill_s + placement.makespan_s,
        bound_s=fill_s + placement.bound_s,
        bottleneck=bottleneck(plan.jobs, placement, speeds, fill_s, plan.work),
    )


def plan_bound(
    blocks: Sequence[BlockCost],
    trainees: Sequence[TraineeCost],
    speeds: Sequence[float],
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> float:
    """Seconds that no plan of any source beats: the largest of three.

    All that must be done over all speeds, where each block is fed once by the cheaper of its own
    part of the teacher and of reading, with the writing of what is new; the bound of the trainees'
    own work as jobs that cannot be split; the dearest trainee with its cheapest source on the
    fastest worker.
    """
    if not trainees:
        return 0.0
    line = make_line(blocks, trainees, limits)
    own = [trainee.own_s for trainee in line.trainees]
    feeds = sum(
        min(block.teacher_s, _reading_s(block))
        for block, has in zip(line.blocks, line.has_trainees, strict=True)
        if has
    )
    area = sum(own) + feeds + limits.job_s * smallest_number_of_jobs(line)
    source_s = [cheapest_source_s(line, number) for number in range(len(line.blocks))]
    longest = max(own_s + source_s[block] for own_s, block in zip(own, line.block_of, strict=True))
    return max(
        area / sum(speeds),
        placement_bound(np.asarray(own), np.asarray(speeds)),
        (limits.job_s + longest) / max(speeds),
    )


def _best(line: Line, speeds: Sequence[float], source: Allowed) -> Placed:
    """The preferred one of all candidates; "auto" looks at those of the pure sources too."""
    search = Search(line, speeds, source)
    if is_short(line):
        return preferred(all_placed(search))
    search.run()
    placed = [search.choose()]
    for pure in _pure_sources(line) if source == "auto" else ():
        other = Search(line, speeds, pure)
        other.run()
        if other.shortest_s <= placed[0].score_s * _HOPELESS:
            placed.append(other.choose())
    return preferred(placed)


def _pure_sources(line: Line) -> tuple[Allowed, ...]:
    fits = new_bytes(line, full_cache(line)) <= line.limits.disk_bytes
    return ("relay", "cache") if fits else ("relay",)


def _plan(line: Line, speeds: Sequence[float], placed: Placed) -> Plan:
    """The records of a candidate, its jobs in the order of dispatch."""
    candidate = placed.candidate
    order = dispatch_order(placed.placement)
    groups = [candidate.groups[number] for number in order]
    # The search knows the workers from the fastest to the slowest.
    ranks = sorted(range(len(speeds)), key=lambda worker: -speeds[worker])
    workers = sorted(range(len(speeds)), key=lambda rank: ranks[rank])
    placement = rearranged(placed.placement, order, workers)
    jobs = tuple(_job(line, group, number) for number, group in enumerate(groups))
    work = _work(line, candidate.levels, groups)
    fill_s = work.fill_s / sum(speeds)
    limit = line.limits.memory_bytes
    return Plan(
        jobs=jobs,
        cached=_cached(line, candidate.levels),
        disk_bytes=candidate.disk_bytes,
        memory_bytes=max((job.memory_bytes for job in jobs), default=0),
        fill_s=fill_s,
        placement=placement,
        wall_s=fill_s + placement.makespan_s,
        work_s=sum(placement.costs) + work.fill_s,
        bound_s=fill_s + placement.bound_s,
        work=work,
        bottleneck=bottleneck(jobs, placement, speeds, fill_s, work),
        too_large=tuple(t.name for t in line.trainees if t.memory_bytes > limit),
    )


def _job(line: Line, group: Group, number: int) -> PlannedJob:
    members = line.trainees[group.first : group.end]
    return PlannedJob(
        job_id=f"job-{number:03d}",
        trainees=tuple(trainee.name for trainee in members),
        blocks=tuple(dict.fromkeys(trainee.block for trainee in members)),
        source=group.source,
        start=None if group.start == FROM_IMAGES else line.blocks[group.start].path,
        cost_s=group.cost_s,
        memory_bytes=sum(trainee.memory_bytes for trainee in members),
    )


def _cached(line: Line, levels: Levels) -> tuple[CachedItem, ...]:
    items: list[CachedItem] = []
    for block, level in zip(line.blocks, levels, strict=True):
        if level & CUT:
            items.append((block.path, "cut"))
        if level & SIDES:
            items += [(block.path, "input"), (block.path, "output")]
    return tuple(items)


def _work(line: Line, levels: Levels, groups: Sequence[Group]) -> Work:
    """Where the seconds go."""
    own_s = teacher_s = read_s = 0.0
    for group in groups:
        own_s += line.own_to[group.end] - line.own_to[group.first]
        numbers = sorted(set(line.block_of[group.first : group.end]))
        teacher_s += line.score_to[numbers[-1]]
        if group.source == "cache":
            blocks = [line.blocks[number] for number in numbers]
            read_s += sum(block.read_input_s + block.read_output_s for block in blocks)
        else:
            start = max(group.start, 0)
            teacher_s += line.teacher_to[numbers[-1] + 1] - line.teacher_to[start]
            read_s += line.blocks[start].read_cut_s if group.start != FROM_IMAGES else 0.0
    return Work(
        own_s=own_s,
        teacher_s=teacher_s,
        read_s=read_s,
        fill_s=fill_area_s(line, levels),
        jobs_s=line.limits.job_s * len(groups),
    )


def _reading_s(block: BlockCost) -> float:
    """Reading both sides once, after writing what is not there."""
    reads = block.read_input_s + block.read_output_s
    new = block.write_input_s * (not block.has_input)
    return reads + new + block.write_output_s * (not block.has_output)
