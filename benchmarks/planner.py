"""Plans of the block phase against brute force, lower bounds and simpler rules.

Four questions. Are few jobs placed as well as by brute force? Are 10,000 jobs on 1,024 unequal
workers placed near the bound? Does every table of costs, as it is planned, end near the bound of
its jobs? Does planning take seconds? Round robin and first come, first served (an idle worker
takes the next job in the network's order) place the same jobs, for comparison.

All times but the planning time are of the tables, made from multiply-accumulates or at random:
nothing is trained. The planning time is the processor's, on one core. The bound is the one that
`Placement.bound_s` describes: area, fewest workers, pigeonhole; and the makespan itself where an
exact search came to its end.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import harness
import numpy as np

from pbkd.plan import (
    BlockCost,
    Limits,
    Placement,
    TraineeCost,
    dispatch_order,
    list_schedule,
    place_jobs,
    plan_block_phase,
    plan_bound,
)

_IMAGES_TIMES_EPOCHS = 50_000 * 30
_MACS_PER_S = 2e12
_BYTES_PER_S = 2e9
_SAMPLE_BYTES = 2 * 50_000
"""Of one value per image: float16."""

_LIMITS = Limits(job_s=10.0)


@dataclass(frozen=True)
class Table:
    """A network's costs and where it is to train."""

    name: str
    blocks: tuple[BlockCost, ...]
    trainees: tuple[TraineeCost, ...]
    speeds: tuple[float, ...]
    limits: Limits = _LIMITS


def main() -> None:
    """Run all four parts and write the result."""
    quick = harness.parser(__doc__).parse_args().quick
    brute, brute_worst = _against_brute_force(40 if quick else 200)
    large, large_worst, large_s = _large(3 if quick else 5)
    planned, planned_worst, planned_s = _planned(quick)
    harness.finish(
        "planner",
        {"quick": quick},
        {"brute_force": brute, "plan_s": [*large_s, *planned_s]},
        [*large, *planned],
        [
            harness.Target("worst over brute force", brute_worst, "at most", 1.01, "x"),
            harness.Target(
                "10,000 jobs on 1,024 unequal workers over bound", large_worst, "at most", 1.01, "x"
            ),
            harness.Target("every table over its bound", planned_worst, "at most", 1.025, "x"),
            harness.Target("planning time", max([*large_s, *planned_s]), "at most", 5.0, "s"),
        ],
    )


# ---------------------------------------------------------------- placement


def _against_brute_force(num_cases: int) -> tuple[list[float], float]:
    """Ratios to the best of all assignments: 2 to 9 jobs, 1 to 4 workers of unequal speed."""
    ratios = []
    for seed in range(num_cases):
        generator = np.random.default_rng(seed)
        num_workers = int(generator.integers(1, 5))
        num_jobs = int(generator.integers(2, 10 if num_workers < 4 else 9))
        costs = _log_uniform(generator, 100, num_jobs)
        speeds = _log_uniform(generator, 4, num_workers)
        choices = np.array(list(itertools.product(range(num_workers), repeat=num_jobs)))
        ends = [(choices == w) @ np.array(costs) / speed for w, speed in enumerate(speeds)]
        shortest = float(np.max(ends, axis=0).min())
        ratios.append(place_jobs(costs, speeds).makespan_s / shortest)
    return ratios, max(ratios)


def _large(num_seeds: int) -> tuple[list[dict[str, str]], float, list[float]]:
    """10,000 jobs of log-uniform cost; rows, the worst ratio on 1,024 unequal workers, times."""
    rows, worst, times = [], 0.0, []
    kinds = [("1,024 unequal", 1024, 4.0), ("64", 64, 1.0), ("8", 8, 1.0)]
    for (name, num_workers, factor), seed in itertools.product(kinds, range(num_seeds)):
        generator = np.random.default_rng(seed)
        costs = _log_uniform(generator, 100, 10_000)
        speeds = _log_uniform(generator, factor, num_workers)
        begin = time.process_time()
        placement = place_jobs(costs, speeds)
        times.append(time.process_time() - begin)
        ratio = placement.makespan_s / placement.bound_s
        worst = max(worst, ratio) if num_workers == 1024 else worst
        label = f"10,000 jobs, seed {seed}"
        rows.append(_row(label, name, placement, range(10_000), speeds, times[-1]))
    return rows, worst, times


# ---------------------------------------------------------------- plans


def _planned(quick: bool) -> tuple[list[dict[str, str]], float, list[float]]:
    """Every table planned; rows, the worst ratio to a bound, times."""
    rows, worst, times = [], 0.0, []
    for table in _tables(quick):
        begin = time.process_time()
        plan = plan_block_phase(table.blocks, table.trainees, table.speeds, table.limits)
        times.append(time.process_time() - begin)
        worst = max(worst, plan.placement.makespan_s / plan.placement.bound_s)
        position = {trainee.name: place for place, trainee in enumerate(table.trainees)}
        order = sorted(range(len(plan.jobs)), key=lambda job: position[plan.jobs[job].trainees[0]])
        equal = len(set(table.speeds)) == 1
        workers = f"{len(table.speeds)}{'' if equal else ' unequal'}"
        row = _row(table.name, workers, plan.placement, order, table.speeds, times[-1])
        lower = plan_bound(table.blocks, table.trainees, table.speeds, table.limits)
        pure = plan_block_phase(
            table.blocks, table.trainees, table.speeds, table.limits, source="relay"
        )
        row["wall/any plan's bound"] = f"{plan.wall_s / lower:.3f}"
        row["relay/auto"] = f"{pure.wall_s / plan.wall_s:.2f}"
        rows.append(row)
    return rows, worst, times


def _tables(quick: bool) -> list[Table]:
    networks = [
        ("VGG-16", _vgg16()),
        ("ResNet-56", _resnet56()),
        ("ResNet-50", _resnet50()),
        ("random 40", _random_macs(40, 0)),
        ("random 200", _random_macs(200, 1)),
    ]
    unequal = tuple(_log_uniform(np.random.default_rng(0), 4, 8))
    workers = [(1.0,) * 2, (1.0,) * 8, (1.0,) * 64, unequal]
    candidates = (1, 8) if quick else (1, 2, 4, 8)
    tables = [
        Table(f"{name} x {number}", *_costs(layers, number), speeds)
        for (name, layers), number, speeds in itertools.product(networks, candidates, workers)
    ]
    blocks, trainees = _costs(_random_macs(300, 2), 34)
    speeds = tuple(_log_uniform(np.random.default_rng(1), 4, 1024))
    tables.append(Table("random 300 x 34", blocks, trainees[:10_000], speeds))
    return tables


def _costs(
    layers: Sequence[tuple[float, int]], num_candidates: int
) -> tuple[tuple[BlockCost, ...], tuple[TraineeCost, ...]]:
    """Costs of a network of (multiply-accumulates, output values per image) per block.

    Candidates have an eighth to a half of their block's work and train at three times that; the
    teacher runs once per image and epoch; every third block's input is a cut.
    """
    blocks, trainees = [], []
    values_in = layers[0][1]
    for number, (macs, values_out) in enumerate(layers):
        teacher_s = macs * _IMAGES_TIMES_EPOCHS / _MACS_PER_S
        size_in, size_out = values_in * _SAMPLE_BYTES, values_out * _SAMPLE_BYTES
        blocks.append(
            BlockCost(
                path=f"block{number}",
                teacher_s=teacher_s,
                fill_teacher_s=teacher_s / 30,
                read_input_s=30 * size_in / _BYTES_PER_S / 4,
                read_output_s=30 * size_out / _BYTES_PER_S / 4,
                read_cut_s=30 * 2 * size_in / _BYTES_PER_S / 4,
                write_input_s=size_in / _BYTES_PER_S,
                write_output_s=size_out / _BYTES_PER_S,
                write_cut_s=2 * size_in / _BYTES_PER_S,
                input_bytes=size_in,
                output_bytes=size_out,
                cut_bytes=2 * size_in,
                is_cut=number % 3 == 0,
            )
        )
        for candidate in range(num_candidates):
            share = 1 / 8 + 3 / 8 * (candidate / max(1, num_candidates - 1))
            own_s = 3 * share * teacher_s + 5.0
            trainees.append(TraineeCost(f"{number}.{candidate}", f"block{number}", own_s))
        values_in = values_out
    return tuple(blocks), tuple(trainees)


def _vgg16() -> list[tuple[float, int]]:
    """The 13 convolutions at 32 x 32."""
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    inputs = [3, *widths[:-1]]
    return [
        (9.0 * a * b * side * side, b * side * side)
        for a, b, side in zip(inputs, widths, sides, strict=True)
    ]


def _resnet56() -> list[tuple[float, int]]:
    """54 convolutions of 3 x 3 in three stages at 32 x 32."""
    layers = []
    for width, side in ((16, 32), (32, 16), (64, 8)):
        layers += [(9.0 * width * width * side * side, width * side * side)] * 18
    return layers


def _resnet50() -> list[tuple[float, int]]:
    """The 53 convolutions at 224 x 224: stem, 16 bottlenecks of three, 4 shortcuts."""
    layers = [(49.0 * 3 * 64 * 112 * 112, 64 * 56 * 56)]
    inputs = 64
    for width, side, count in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)):
        area = side * side
        for number in range(count):
            layers.append((float(inputs) * width * area, width * area))
            layers.append((9.0 * width * width * area, width * area))
            layers.append((4.0 * width * width * area, 4 * width * area))
            if number == 0:
                layers.append((4.0 * inputs * width * area, 4 * width * area))
            inputs = 4 * width
    return layers


def _random_macs(num: int, seed: int) -> list[tuple[float, int]]:
    generator = np.random.default_rng(seed)
    macs = np.array(_log_uniform(generator, 30, num)) * 2e6
    return [(float(m), int(generator.integers(2_000, 60_000))) for m in macs]


# ---------------------------------------------------------------- comparison


def _row(
    name: str,
    workers: str,
    placement: Placement,
    order: Sequence[int],
    speeds: Sequence[float],
    plan_s: float,
) -> dict[str, str]:
    """Makespans over the bound, by rule; ``order``: the jobs in the network's order."""
    bound_s = placement.bound_s
    costs = placement.costs
    loads = np.zeros(len(speeds))
    for place, job in enumerate(order):
        loads[place % len(speeds)] += costs[job]
    return {
        "table": name,
        "workers": workers,
        "jobs": str(len(costs)),
        "planned": f"{placement.makespan_s / bound_s:.4f}",
        "one queue": f"{list_schedule(costs, speeds, dispatch_order(placement)) / bound_s:.3f}",
        "first come": f"{list_schedule(costs, speeds, order) / bound_s:.3f}",
        "round robin": f"{(loads / np.array(speeds)).max() / bound_s:.3f}",
        "wall/any plan's bound": "",
        "relay/auto": "",
        "plan s": f"{plan_s:.2f}",
    }


def _log_uniform(generator: np.random.Generator, factor: float, num: int) -> list[float]:
    """Numbers between 1 and ``factor``."""
    values: list[float] = np.exp(generator.uniform(0, np.log(factor), num)).tolist()
    return values


if __name__ == "__main__":
    main()
