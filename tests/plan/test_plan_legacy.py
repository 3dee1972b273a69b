"""What plans were made of before: to be deleted with pbkd/plan/legacy.py."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pbkd.plan import Job, group_trainees, place, trainee_cost

COSTS = st.lists(st.integers(1, 100), min_size=1, max_size=6)
WORKERS = st.integers(1, 3)


def _jobs(costs: list[int]) -> list[Job]:
    return [Job(f"j{index}", (f"t{index}",), cost) for index, cost in enumerate(costs)]


def _shortest(costs: list[int], num_workers: int) -> int:
    """Makespan of the best of all assignments."""
    return min(
        max(
            sum(cost for cost, worker in zip(costs, workers, strict=True) if worker == w)
            for w in range(num_workers)
        )
        for workers in itertools.product(range(num_workers), repeat=len(costs))
    )


# ---------------------------------------------------------------- placement


@settings(max_examples=60, deadline=None)
@given(costs=COSTS, num_workers=WORKERS)
def test_the_makespan_is_within_grahams_bound_of_the_shortest(
    costs: list[int], num_workers: int
) -> None:
    shortest = _shortest(costs, num_workers)
    placement = place(_jobs(costs), num_workers)
    assert placement.bound <= shortest <= placement.makespan
    assert placement.makespan <= (4 / 3 - 1 / (3 * num_workers)) * shortest + 1e-9


@settings(max_examples=60, deadline=None)
@given(costs=COSTS, num_workers=WORKERS)
def test_every_job_runs_once_and_the_sums_are_right(costs: list[int], num_workers: int) -> None:
    jobs = _jobs(costs)
    cost_of = {job.job_id: job.cost for job in jobs}
    placement = place(jobs, num_workers)
    assert len(placement.workers) == num_workers
    assert sorted(itertools.chain(*placement.workers)) == sorted(cost_of)
    loads = [sum(cost_of[job_id] for job_id in worker) for worker in placement.workers]
    assert placement.makespan == max(loads)
    assert placement.total == sum(costs)
    assert placement.bound == max(sum(costs) / num_workers, max(costs))
    assert placement.speedup == sum(costs) / max(loads)


def test_the_known_worst_case_of_two_workers_meets_the_bound() -> None:
    placement = place(_jobs([3, 3, 2, 2, 2]), 2)
    assert placement.workers == (("j0", "j2", "j4"), ("j1", "j3"))
    assert placement.makespan == 7 == pytest.approx((4 / 3 - 1 / 6) * 6)
    assert placement.bound == 6


def test_a_job_longer_than_a_fair_share_is_the_bound() -> None:
    placement = place(_jobs([10, 1, 1]), 3)
    assert placement.bound == placement.makespan == 10
    assert placement.speedup == 1.2


def test_each_worker_takes_its_longest_job_first() -> None:
    jobs = _jobs([1, 5, 3, 4, 2])
    cost_of = {job.job_id: job.cost for job in jobs}
    for worker in place(jobs, 2).workers:
        costs = [cost_of[job_id] for job_id in worker]
        assert costs == sorted(costs, reverse=True)


def test_equal_jobs_keep_their_order() -> None:
    assert place(_jobs([2] * 5), 2).workers == (("j0", "j2", "j4"), ("j1", "j3"))


def test_no_jobs_take_no_time() -> None:
    placement = place([], 2)
    assert placement.workers == ((), ())
    assert placement.makespan == placement.bound == placement.total == 0
    assert placement.speedup == 1


# ---------------------------------------------------------------- groups

TRAINEES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50)), min_size=1, max_size=10)


@settings(max_examples=80, deadline=None)
@given(trainees=TRAINEES, source=st.sampled_from(["cache", "relay"]), num_workers=st.integers(1, 4))
def test_a_block_stays_in_one_job_and_a_trainee_too(
    trainees: list[tuple[int, int]], source: str, num_workers: int
) -> None:
    blocks = {f"t{index}": f"b{block}" for index, (block, _) in enumerate(trainees)}
    costs = {f"t{index}": float(cost) for index, (_, cost) in enumerate(trainees)}
    jobs = group_trainees(costs, blocks, source, num_workers)

    assert sorted(t for job in jobs for t in job.trainees) == sorted(costs)
    for block in set(blocks.values()):
        assert sum(block in {blocks[t] for t in job.trainees} for job in jobs) == 1
    assert [job.cost for job in jobs] == sorted((job.cost for job in jobs), reverse=True)
    assert [job.cost for job in jobs] == [sum(costs[t] for t in job.trainees) for job in jobs]
    assert [job.job_id for job in jobs] == [f"job-{index:03d}" for index in range(len(jobs))]
    num_blocks = len(set(blocks.values()))
    assert len(jobs) == num_blocks if source == "cache" else len(jobs) <= num_workers
    assert group_trainees(dict(costs), dict(blocks), source, num_workers) == jobs


COSTS_BY_TRAINEE = {"a1": 1.0, "b1": 5.0, "a2": 1.0, "c1": 3.0, "d1": 4.0}
BLOCKS = {"a1": "a", "a2": "a", "b1": "b", "c1": "c", "d1": "d"}


def test_a_cache_has_a_job_per_block_longest_first() -> None:
    jobs = group_trainees(COSTS_BY_TRAINEE, BLOCKS, "cache", 2)
    assert [job.trainees for job in jobs] == [("b1",), ("d1",), ("c1",), ("a1", "a2")]
    assert [job.cost for job in jobs] == [5, 4, 3, 2]


def test_a_relay_shares_its_pass_in_jobs_of_like_cost() -> None:
    jobs = group_trainees(COSTS_BY_TRAINEE, BLOCKS, "relay", 2)
    assert [job.trainees for job in jobs] == [("a1", "a2", "b1"), ("c1", "d1")]
    assert [job.cost for job in jobs] == [7, 7]


def test_a_relay_has_no_empty_jobs() -> None:
    jobs = group_trainees(COSTS_BY_TRAINEE, BLOCKS, "relay", 9)
    assert len(jobs) == 4


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize(
    ("candidate_macs", "prefix_macs", "num_images", "num_epochs", "macs"),
    [(10, 0, 1, 1, 30), (10, 7, 1, 1, 37), (10, 7, 100, 3, 11_100), (0, 7, 2, 1, 14)],
)
def test_the_cost_by_hand(
    candidate_macs: int, prefix_macs: int, num_images: int, num_epochs: int, macs: float
) -> None:
    assert trainee_cost(candidate_macs, prefix_macs, num_images, num_epochs) == macs
