"""The plan of the block phase: its figures recomputed, its limits, its length."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pbkd.errors import ConfigError
from pbkd.plan import (
    BlockCost,
    Limits,
    Plan,
    PlannedJob,
    TraineeCost,
    on_more_workers,
    plan_block_phase,
    plan_bound,
)

Network = tuple[list[BlockCost], list[TraineeCost]]
SECONDS = st.integers(1, 40).map(float)
FEW_SECONDS = st.integers(0, 15).map(float)
BYTES = st.integers(0, 9)
SPEEDS = st.lists(st.sampled_from([0.5, 1.0, 1.5, 4.0]), min_size=1, max_size=6)
LIMITS = st.builds(
    Limits,
    disk_bytes=st.sampled_from([0, 6, 20, math.inf]),
    memory_bytes=st.sampled_from([4, 9, math.inf]),
    job_s=FEW_SECONDS,
)


@st.composite
def networks(draw: st.DrawFn, max_blocks: int = 10, max_trainees: int = 24) -> Network:
    blocks = [
        BlockCost(
            path=f"b{number}",
            teacher_s=draw(SECONDS),
            fill_teacher_s=draw(FEW_SECONDS),
            read_input_s=draw(FEW_SECONDS),
            read_output_s=draw(FEW_SECONDS),
            read_cut_s=draw(FEW_SECONDS),
            write_input_s=draw(FEW_SECONDS),
            write_output_s=draw(FEW_SECONDS),
            write_cut_s=draw(FEW_SECONDS),
            input_bytes=draw(BYTES),
            output_bytes=draw(BYTES),
            cut_bytes=draw(BYTES),
            is_cut=draw(st.booleans()),
            has_input=draw(st.integers(0, 3)) == 0,
            has_output=draw(st.integers(0, 3)) == 0,
            has_cut=draw(st.integers(0, 3)) == 0,
            before_score_s=number * draw(FEW_SECONDS),
        )
        for number in range(draw(st.integers(1, max_blocks)))
    ]
    trainees = [
        TraineeCost(f"t{number}", block, draw(SECONDS), draw(st.integers(0, 6)))
        for number, block in enumerate(
            draw(
                st.lists(
                    st.sampled_from([b.path for b in blocks]), min_size=1, max_size=max_trainees
                )
            )
        )
    ]
    return blocks, trainees


# ---------------------------------------------------------------- an independent account


def _job_cost(job: PlannedJob, network: Network, limits: Limits) -> float:
    """The cost of a job by its definition."""
    blocks, trainees = network
    paths = [block.path for block in blocks]
    members = [trainee for trainee in trainees if trainee.name in job.trainees]
    numbers = sorted({paths.index(trainee.block) for trainee in members})
    cost = limits.job_s + sum(trainee.own_s for trainee in members)
    cost += max(block.before_score_s for block in blocks[: numbers[-1] + 1])
    if job.source == "cache":
        return cost + sum(blocks[n].read_input_s + blocks[n].read_output_s for n in numbers)
    start = 0 if job.start is None else paths.index(job.start)
    if job.start is not None:
        assert blocks[start].is_cut
        assert start <= numbers[0]
        cost += blocks[start].read_cut_s
    return cost + sum(block.teacher_s for block in blocks[start : numbers[-1] + 1])


def _new_items(plan: Plan, network: Network) -> Iterator[tuple[int, float, int]]:
    """(block, seconds to write, bytes) of what is to be cached and is not there."""
    paths = [block.path for block in network[0]]
    for path, item in plan.cached:
        block = network[0][paths.index(path)]
        if not getattr(block, f"has_{item}"):
            seconds, size = getattr(block, f"write_{item}_s"), getattr(block, f"{item}_bytes")
            yield paths.index(path), seconds, size


def _fill_area(plan: Plan, network: Network) -> float:
    new = list(_new_items(plan, network))
    last = max((number for number, _, _ in new), default=-1)
    teacher = sum(block.fill_teacher_s for block in network[0][: last + 1])
    return teacher + sum(seconds for _, seconds, _ in new)


def _check(plan: Plan, network: Network, speeds: list[float], limits: Limits) -> None:
    blocks, trainees = network
    paths = [block.path for block in blocks]
    position = {
        trainee.name: place
        for place, trainee in enumerate(sorted(trainees, key=lambda t: paths.index(t.block)))
    }
    memory = {trainee.name: trainee.memory_bytes for trainee in trainees}
    named = [name for job in plan.jobs for name in job.trainees]
    assert sorted(named) == sorted(position)
    assert plan.too_large == tuple(name for name in position if memory[name] > limits.memory_bytes)
    for number, job in enumerate(plan.jobs):
        assert job.job_id == f"job-{number:03d}"
        places = [position[name] for name in job.trainees]
        assert places == list(range(places[0], places[0] + len(places)))
        assert job.cost_s == pytest.approx(_job_cost(job, network, limits))
        assert job.memory_bytes == sum(memory[name] for name in job.trainees)
        assert job.memory_bytes <= limits.memory_bytes or len(job.trainees) == 1
        if job.start is not None:
            assert (job.start, "cut") in plan.cached
        if job.source == "cache":
            assert {(path, side) for path in job.blocks for side in ("input", "output")} <= set(
                plan.cached
            )
    assert [path for path, _ in plan.cached] == sorted(
        (path for path, _ in plan.cached), key=paths.index
    )
    assert len(set(plan.cached)) == len(plan.cached)
    assert plan.disk_bytes == sum(size for _, _, size in _new_items(plan, network))
    assert plan.disk_bytes <= limits.disk_bytes
    assert plan.memory_bytes == max(job.memory_bytes for job in plan.jobs)

    fill = _fill_area(plan, network)
    assert plan.fill_s == pytest.approx(fill / sum(speeds))
    assert plan.placement.costs == tuple(job.cost_s for job in plan.jobs)
    makespan = max(
        sum(plan.jobs[job].cost_s for job in own) / speed
        for own, speed in zip(plan.placement.workers, speeds, strict=True)
    )
    assert plan.wall_s == pytest.approx(plan.fill_s + makespan)
    assert plan.work_s == pytest.approx(fill + sum(job.cost_s for job in plan.jobs))
    parts = plan.work
    assert plan.work_s == pytest.approx(
        parts.own_s + parts.teacher_s + parts.read_s + parts.fill_s + parts.jobs_s
    )
    assert plan.bound_s <= plan.wall_s * (1 + 1e-9)
    assert plan_bound(blocks, trainees, speeds, limits) <= plan.wall_s * (1 + 1e-9)
    starts = [plan.placement.starts_s[number] for number in range(len(plan.jobs))]
    assert starts == sorted(starts)
    assert plan.bottleneck


# ---------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(
    network=networks(),
    speeds=SPEEDS,
    limits=LIMITS,
    source=st.sampled_from(["auto", "cache", "relay"]),
)
def test_a_plan_is_what_it_says(
    network: Network, speeds: list[float], limits: Limits, source: str
) -> None:
    try:
        plan = plan_block_phase(*network, speeds, limits, source)
    except ConfigError:
        assert source == "cache"
        return
    _check(plan, network, speeds, limits)
    if source == "relay":
        assert not plan.cached
        assert {(job.source, job.start) for job in plan.jobs} == {("relay", None)}
    if source == "cache":
        assert {job.source for job in plan.jobs} == {"cache"}
    assert plan_block_phase(*network, list(speeds), limits, source) == plan


@settings(max_examples=60, deadline=None)
@given(network=networks(), speeds=SPEEDS, limits=LIMITS)
def test_auto_is_never_longer_than_a_pure_source(
    network: Network, speeds: list[float], limits: Limits
) -> None:
    auto = plan_block_phase(*network, speeds, limits).wall_s
    assert auto <= plan_block_phase(*network, speeds, limits, "relay").wall_s * 1.0011
    try:
        cache = plan_block_phase(*network, speeds, limits, "cache")
    except ConfigError:
        return
    assert auto <= cache.wall_s * 1.0011


@settings(max_examples=60, deadline=None)
@given(network=networks(), speeds=SPEEDS, more=SPEEDS, limits=LIMITS)
def test_more_workers_never_make_it_longer(
    network: Network, speeds: list[float], more: list[float], limits: Limits
) -> None:
    few = plan_block_phase(*network, speeds, limits).wall_s
    assert plan_block_phase(*network, speeds + more, limits).wall_s <= 1.01 * few


# ---------------------------------------------------------------- brute force


def _all_walls(network: Network, speeds: list[float], limits: Limits) -> Iterator[float]:
    """Wall times of all contiguous partitions with all sources, placed in the best way."""
    blocks, trainees = network
    paths = [block.path for block in blocks]
    ordered = sorted(trainees, key=lambda trainee: paths.index(trainee.block))
    num = len(ordered)
    for mask in range(2 ** (num - 1)):
        ends = [end for end in range(1, num) if mask >> (end - 1) & 1]
        groups = [ordered[a:b] for a, b in itertools.pairwise([0, *ends, num])]
        if any(
            len(group) > 1 and sum(t.memory_bytes for t in group) > limits.memory_bytes
            for group in groups
        ):
            continue
        yield from _walls_of(groups, blocks, speeds, limits)


def _walls_of(
    groups: list[list[TraineeCost]],
    blocks: list[BlockCost],
    speeds: list[float],
    limits: Limits,
) -> Iterator[float]:
    paths = [block.path for block in blocks]
    options: list[list[tuple[float, frozenset[tuple[int, str]]]]] = []
    for group in groups:
        numbers = sorted({paths.index(trainee.block) for trainee in group})
        base = limits.job_s + sum(trainee.own_s for trainee in group)
        until = numbers[-1] + 1
        base += max(block.before_score_s for block in blocks[:until])
        reads = sum(blocks[n].read_input_s + blocks[n].read_output_s for n in numbers)
        sides = frozenset((n, side) for n in numbers for side in ("input", "output"))
        whole = sum(block.teacher_s for block in blocks[:until])
        choices = [(base + whole, frozenset()), (base + reads, sides)]
        for start in range(numbers[0] + 1):
            if blocks[start].is_cut:
                teacher = sum(block.teacher_s for block in blocks[start:until])
                read = blocks[start].read_cut_s
                choices.append((base + read + teacher, frozenset({(start, "cut")})))
        options.append(choices)
    for choice in itertools.product(*options):
        items = frozenset().union(*(own for _, own in choice))
        new = [(n, item) for n, item in items if not getattr(blocks[n], f"has_{item}")]
        if sum(getattr(blocks[n], f"{item}_bytes") for n, item in new) > limits.disk_bytes:
            continue
        last = max((n for n, _ in new), default=-1)
        fill = sum(block.fill_teacher_s for block in blocks[: last + 1])
        fill += sum(getattr(blocks[n], f"write_{item}_s") for n, item in new)
        yield fill / sum(speeds) + _makespan([cost for cost, _ in choice], speeds)


def _makespan(costs: list[float], speeds: list[float]) -> float:
    if len(speeds) == 1:
        return sum(costs) / speeds[0]
    one, two = speeds
    total = sum(costs)
    sums = {0.0}
    for cost in costs:
        sums |= {cost + other for other in sums}
    return min(max(part / one, (total - part) / two) for part in sums)


@settings(max_examples=60, deadline=None)
@given(
    network=networks(max_blocks=4, max_trainees=4),
    speeds=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=2),
    limits=LIMITS,
)
def test_tiny_networks_are_within_one_percent_of_brute_force(
    network: Network, speeds: list[float], limits: Limits
) -> None:
    plan = plan_block_phase(*network, speeds, limits)
    shortest = min(_all_walls(network, speeds, limits))
    assert plan.wall_s <= 1.01 * shortest
    assert plan.wall_s >= shortest * (1 - 1e-9)
    assert plan_bound(*network, speeds, limits) <= shortest * (1 + 1e-9)


def _random_network(generator: np.random.Generator, num_blocks: int, num: int) -> Network:
    def seconds(high: float) -> float:
        return float(generator.uniform(0, high))

    blocks = [
        BlockCost(
            path=f"b{number}",
            teacher_s=seconds(20),
            fill_teacher_s=seconds(1),
            read_input_s=seconds(10),
            read_output_s=seconds(10),
            read_cut_s=seconds(10),
            write_input_s=seconds(2),
            write_output_s=seconds(2),
            write_cut_s=seconds(2),
            input_bytes=10,
            output_bytes=10,
            cut_bytes=20,
            is_cut=bool(generator.random() < 0.6),
        )
        for number in range(num_blocks)
    ]
    names = [f"b{number}" for number in generator.integers(0, num_blocks, num)]
    return blocks, [TraineeCost(f"t{n}", path, seconds(30)) for n, path in enumerate(names)]


def test_the_search_alone_is_near_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pbkd.plan.jobs.is_short", lambda _: False)
    ratios = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        network = _random_network(generator, 4, 5)
        speeds = [[1.0, 1.0], [1.0, 3.0]][seed % 2]
        shortest = min(_all_walls(network, speeds, Limits(job_s=1)))
        ratios.append(plan_block_phase(*network, speeds, Limits(job_s=1)).wall_s / shortest)
    assert np.median(ratios) <= 1.01
    assert max(ratios) <= 1.15


@pytest.mark.parametrize("seed", range(8))
def test_longer_lines_keep_to_all_of_it(seed: int) -> None:
    generator = np.random.default_rng(seed)
    network = _random_network(generator, 12, 30)
    network[1][:] = [dataclasses.replace(trainee, memory_bytes=1) for trainee in network[1]]
    speeds = [[1.0] * 3, [1.0, 2.0, 3.0, 4.0]][seed % 2]
    limits = Limits(disk_bytes=70, memory_bytes=7, job_s=1)
    auto = plan_block_phase(*network, speeds, limits)
    relay = plan_block_phase(*network, speeds, limits, "relay")
    _check(auto, network, speeds, limits)
    _check(relay, network, speeds, limits)
    assert auto.wall_s <= relay.wall_s * 0.95
    roomy = plan_block_phase(*network, speeds, Limits(job_s=1))
    assert roomy.wall_s <= auto.wall_s * 1.01
    more = plan_block_phase(*network, [*speeds, 0.5], limits)
    assert more.wall_s <= auto.wall_s * 1.01


# ---------------------------------------------------------------- by hand


def test_a_block_too_large_for_one_worker_is_split() -> None:
    blocks = [BlockCost("a", teacher_s=1), BlockCost("b", teacher_s=1)]
    trainees = [TraineeCost("a0", "a", 1)] + [TraineeCost(f"b{n}", "b", 10) for n in range(4)]
    plan = plan_block_phase(blocks, trainees, [1.0] * 4, source="relay")
    assert plan.wall_s == 13
    assert [job.blocks for job in plan.jobs].count(("b",)) == 3
    assert plan.jobs[0].trainees == ("a0", "b0")


def test_a_relay_goes_on_from_a_cut_where_the_disk_holds_no_more() -> None:
    blocks = [
        BlockCost("stem", teacher_s=100, fill_teacher_s=2, input_bytes=90, output_bytes=90),
        *(BlockCost(f"b{n}", 1, 1, 5, 5, 3, 1, 1, 1, 9, 9, 10, is_cut=n == 0) for n in range(4)),
    ]
    trainees = [TraineeCost(f"t{n}", f"b{n}", 10) for n in range(4)]
    plan = plan_block_phase(blocks, trainees, [1.0, 1.0], Limits(disk_bytes=10))
    assert plan.cached == (("b0", "cut"),)
    assert {(job.source, job.start) for job in plan.jobs} == {("relay", "b0")}
    assert plan.disk_bytes == 10
    assert plan.fill_s == (2 + 1 + 1) / 2
    # Two trainees each: 3 of reading, 20 of own, and the teacher up to b1 or b3.
    assert plan.wall_s == 2 + 3 + 20 + 4


def test_fewer_jobs_at_equal_wall_time() -> None:
    blocks = [BlockCost(f"b{n}", 0, has_input=True, has_output=True) for n in range(6)]
    trainees = [TraineeCost(f"t{n}", f"b{n}", 5) for n in range(6)]
    plan = plan_block_phase(blocks, trainees, [1.0, 1.0])
    assert len(plan.jobs) == 2
    assert plan.wall_s == plan.bound_s == 15


def test_a_trainee_above_the_memory_is_alone_and_named() -> None:
    trainees = [TraineeCost(f"t{n}", "a", 5, memory) for n, memory in enumerate([3, 50, 3, 3])]
    plan = plan_block_phase([BlockCost("a", 1)], trainees, [1.0], Limits(memory_bytes=9))
    assert plan.too_large == ("t1",)
    assert {job.trainees for job in plan.jobs} == {("t0",), ("t1",), ("t2", "t3")}
    assert plan.memory_bytes == 50


def test_a_cache_that_does_not_fit_is_refused() -> None:
    blocks = [BlockCost("a", 1, input_bytes=8, output_bytes=8)]
    trainees = [TraineeCost("t", "a", 5)]
    with pytest.raises(ConfigError, match=r"takes 1\.6e-08 GB, 1e-08 GB are free"):
        plan_block_phase(blocks, trainees, [1.0], Limits(disk_bytes=10), "cache")
    assert plan_block_phase(blocks, trainees, [1.0], Limits(disk_bytes=10)).disk_bytes == 0


def test_nothing_to_train() -> None:
    plan = plan_block_phase([BlockCost("a", 1)], [], [1.0, 2.0])
    assert plan.jobs == plan.cached == ()
    assert plan.wall_s == plan.work_s == plan.bound_s == plan_bound([], [], [1.0]) == 0
    assert plan.bottleneck == "there is nothing to train"


@pytest.mark.parametrize(
    ("teacher_s", "own_s", "speeds", "job_s", "sentence"),
    [
        (1, [9, 9], [1.0], 0, "all workers are busy 100 % of the time: more workers help"),
        (20, [9, 9], [1.0], 0, "the teacher's passes take 53 % of all work"),
        (0, [9, 9], [1.0], 30, "starting jobs takes 62 % of all work"),
        (
            0,
            [9, 1],
            [1.0, 1.0],
            0,
            "the longest job, job-000 (a), takes 100 % of the wall time: "
            "more workers of this speed do not help",
        ),
    ],
)
def test_the_bottleneck_is_named(
    teacher_s: float, own_s: list[float], speeds: list[float], job_s: float, sentence: str
) -> None:
    trainees = [TraineeCost(f"t{n}", "a", own) for n, own in enumerate(own_s)]
    limits = Limits(job_s=job_s)
    plan = plan_block_phase([BlockCost("a", teacher_s)], trainees, speeds, limits, "relay")
    assert plan.bottleneck == sentence


def test_ten_thousand_trainees_are_planned_in_seconds() -> None:
    generator = np.random.default_rng(0)
    blocks, trainees = _random_network(generator, 300, 10_000)
    speeds = np.exp(generator.uniform(0, np.log(4), 1_024)).tolist()
    begin = time.process_time()
    plan = plan_block_phase(blocks, trainees, speeds, Limits(job_s=1))
    assert time.process_time() - begin < 5
    assert plan.placement.makespan_s <= 1.01 * plan.placement.bound_s


def test_a_plan_on_more_workers_keeps_its_jobs_and_is_no_longer() -> None:
    blocks = [BlockCost(f"b{i}", 1.0, write_cut_s=1.0) for i in range(6)]
    trainees = [TraineeCost(f"t{i}", f"b{i}", 10.0 + i) for i in range(6)]
    two = plan_block_phase(blocks, trainees, [1.0, 1.0])
    five = on_more_workers(two, [1.0] * 5)
    assert five.jobs == two.jobs
    assert five.cached == two.cached
    assert len(five.placement.workers) == 5
    assert five.wall_s <= two.wall_s
    assert five.wall_s == pytest.approx(five.fill_s + five.placement.makespan_s)
