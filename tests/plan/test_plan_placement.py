"""Placement on workers of unequal speed: against brute force, against the bound, at full size."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pbkd.plan import Placement, dispatch_order, list_schedule, place_jobs
from pbkd.plan.bounds import placement_bound

COSTS = st.lists(st.floats(0.01, 100), max_size=7)
SPEEDS = st.lists(st.floats(0.25, 4), min_size=1, max_size=3)
MANY = st.lists(st.floats(0.01, 100), max_size=60)
MANY_SPEEDS = st.lists(st.floats(0.25, 4), min_size=1, max_size=20)


def _shortest(costs: list[float], speeds: list[float]) -> float:
    """Makespan of the best of all assignments."""
    choices = np.array(list(itertools.product(range(len(speeds)), repeat=len(costs))))
    ends = [((choices == w) * np.array(costs)).sum(axis=1) / s for w, s in enumerate(speeds)]
    return float(np.max(ends, axis=0).min()) if costs else 0.0


def _check(placement: Placement, costs: list[float], speeds: list[float]) -> None:
    assert sorted(itertools.chain(*placement.workers)) == list(range(len(costs)))
    ends = []
    for jobs, load, speed in zip(placement.workers, placement.loads, speeds, strict=True):
        own = [costs[job] for job in jobs]
        assert own == sorted(own, reverse=True)
        assert load == pytest.approx(sum(own))
        begins = np.cumsum([0.0, *own])[:-1] / speed
        assert [placement.starts_s[job] for job in jobs] == pytest.approx(begins.tolist())
        ends.append(sum(own) / speed)
    assert placement.makespan_s == pytest.approx(max(ends))
    assert placement.bound_s <= placement.makespan_s


@settings(max_examples=150, deadline=None)
@given(costs=COSTS, speeds=SPEEDS)
def test_within_one_percent_of_brute_force(costs: list[float], speeds: list[float]) -> None:
    placement = place_jobs(costs, speeds)
    _check(placement, costs, speeds)
    shortest = _shortest(costs, speeds)
    assert placement.makespan_s <= 1.01 * shortest + 1e-12
    assert placement.bound_s <= shortest * (1 + 1e-9)
    assert placement_bound(np.array(costs), np.array(speeds)) <= shortest * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(costs=MANY, speeds=MANY_SPEEDS)
def test_every_job_runs_once_and_the_sums_are_right(
    costs: list[float], speeds: list[float]
) -> None:
    placement = place_jobs(costs, speeds)
    _check(placement, costs, speeds)
    assert place_jobs(list(costs), list(speeds)) == placement


@settings(max_examples=100, deadline=None)
@given(costs=MANY, num_workers=st.integers(1, 20))
def test_equal_workers_with_one_queue_reproduce_the_plan(
    costs: list[float], num_workers: int
) -> None:
    speeds = [1.0] * num_workers
    placement = place_jobs(costs, speeds)
    order = dispatch_order(placement)
    assert sorted(order) == list(range(len(costs)))
    assert list_schedule(costs, speeds, order) <= placement.makespan_s * (1 + 1e-9)


def test_a_plan_at_its_bound_is_reproduced_exactly() -> None:
    costs = [3.0, 3, 2, 2, 2]
    placement = place_jobs(costs, [1, 1])
    assert placement.makespan_s == placement.bound_s == 6
    assert list_schedule(costs, [1, 1], dispatch_order(placement)) == 6


def test_dispatch_goes_by_start_then_by_cost() -> None:
    costs = [1.0, 5, 3, 4, 2]
    placement = place_jobs(costs, [1, 1])
    order = dispatch_order(placement)
    keys = [(placement.starts_s[job], -costs[job]) for job in order]
    assert keys == sorted(keys)
    assert order[0] == 1


def test_idle_workers_take_the_next_job_the_fastest_first() -> None:
    assert list_schedule([4, 4, 1], [1, 2], [0, 1, 2]) == 4
    assert list_schedule([4, 4, 1], [1, 2], [2, 0, 1]) == 4
    assert list_schedule([1, 1, 1, 9], [1, 1], [0, 1, 2, 3]) == 10
    assert list_schedule([], [1, 1], []) == 0


@pytest.mark.parametrize(
    ("costs", "speeds", "makespan"),
    [
        ([], [1, 2], 0),
        ([0, 0, 0], [1, 1], 0),
        ([3, 4], [2], 3.5),
        ([6], [1, 3, 2], 2),
        ([2] * 6, [1, 1, 1], 4),
        ([2] * 5, [1, 1], 6),
        ([10, 1, 1], [1, 1, 1], 10),
        ([1e-12, 1e-12], [1, 1], 1e-12),
        ([1e12, 1e12, 1e-12], [1, 1], 1e12),
        ([5, 3, 3], [2, 1], 4),
    ],
)
def test_by_hand(costs: list[float], speeds: list[float], makespan: float) -> None:
    placement = place_jobs(costs, speeds)
    _check(placement, costs, speeds)
    assert placement.makespan_s == pytest.approx(makespan)


def test_the_pigeonhole_bound_knows_that_jobs_cannot_be_split() -> None:
    assert place_jobs([2] * 5, [1, 1]).bound_s == 6
    # Seven jobs above 4 on two workers of speed 1 and 2: five on the fast one take 10.
    assert place_jobs([4] * 7, [1, 2]).bound_s == 10


@pytest.mark.parametrize("seed", range(5))
def test_ten_thousand_jobs_on_a_thousand_unequal_workers(seed: int) -> None:
    generator = np.random.default_rng(seed)
    costs = np.exp(generator.uniform(0, np.log(100), 10_000)).tolist()
    speeds = np.exp(generator.uniform(0, np.log(4), 1_024)).tolist()
    begin = time.process_time()
    placement = place_jobs(costs, speeds)
    assert time.process_time() - begin < 5
    _check(placement, costs, speeds)
    assert placement.makespan_s <= 1.01 * placement.bound_s
