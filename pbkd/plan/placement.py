"""Which worker runs which job, and when: jobs without order on workers of unequal speed.

Longest first, each to the worker that ends it earliest; then moves and swaps that relieve the
busiest worker; then, for few jobs, an exact search. No clock: efforts are counted in steps, so
that the same jobs are placed alike on every machine.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pbkd.plan.bounds import Floats, placement_bound
from pbkd.plan.exact import shortest_assignment
from pbkd.plan.exchange import Assignment, relieve

_CLOSE = 1e-3
"""A placement this near to its bound, relatively, is not improved any more."""


@dataclass(frozen=True)
class Placement:
    """Where each job runs, and what follows.

    Attributes:
        costs: of the jobs, as given.
        workers: per worker the indices of its jobs, in order: the longest first.
        starts_s: per job, when its worker begins it.
        loads: per worker, the sum of its jobs' costs in seconds at speed 1.
        makespan_s: when the last worker is done.
        bound_s: no placement of these jobs ends sooner. Where the exact search came to its end
            this is the makespan itself.
    """

    costs: tuple[float, ...]
    workers: tuple[tuple[int, ...], ...]
    starts_s: tuple[float, ...]
    loads: tuple[float, ...]
    makespan_s: float
    bound_s: float


def place_jobs(costs: Sequence[float], speeds: Sequence[float]) -> Placement:
    """Place all jobs so that the last worker is done early.

    Args:
        costs: seconds at speed 1, finite and not negative.
        speeds: of the workers, at least one, positive.
    """
    return _place(costs, speeds, exact=True)


def place_roughly(costs: Sequence[float], speeds: Sequence[float]) -> Placement:
    """The same without the exact search."""
    return _place(costs, speeds, exact=False)


def _place(costs: Sequence[float], speeds: Sequence[float], exact: bool) -> Placement:
    cost, speed = _arrays(costs, speeds)
    assignment = longest_first(cost, speed)
    bound_s = placement_bound(cost, speed)
    enough_s = bound_s * (1 + _CLOSE)
    if makespan(assignment, cost, speed) > enough_s:
        assignment = relieve(assignment, cost, speed, enough_s)
    if exact and makespan(assignment, cost, speed) > enough_s:
        assignment, proven = shortest_assignment(assignment, cost, speed, bound_s)
        if proven:
            bound_s = max(bound_s, makespan(assignment, cost, speed))
    return _placement(assignment, cost, speed, bound_s)


def quick_makespan(costs: Sequence[float], speeds: Sequence[float]) -> float:
    """Makespan of the longest-first rule alone: what a search may ask for many times."""
    cost, speed = _arrays(costs, speeds)
    return makespan(longest_first(cost, speed), cost, speed)


def list_schedule(costs: Sequence[float], speeds: Sequence[float], order: Sequence[int]) -> float:
    """Makespan of workers that, whenever idle, take the next job of a queue.

    Of several idle workers the fastest is served first.

    Args:
        order: indices of all jobs, as they are queued.
    """
    idle = [(0.0, -speed, worker) for worker, speed in enumerate(speeds)]
    heapq.heapify(idle)
    end = 0.0
    for job in order:
        free, negative, worker = idle[0]
        done = free + costs[job] / -negative
        heapq.heapreplace(idle, (done, negative, worker))
        end = max(end, done)
    return end


def dispatch_order(placement: Placement) -> list[int]:
    """Order in which a pool with one queue should start the jobs: by planned start.

    At equal starts the longer job comes first. On equal workers a queue in this order ends no later
    than the placement; on unequal ones it may.
    """
    starts, costs = placement.starts_s, placement.costs
    return sorted(range(len(costs)), key=lambda job: (starts[job], -costs[job], job))


def rearranged(placement: Placement, jobs: Sequence[int], workers: Sequence[int]) -> Placement:
    """The same placement with new indices.

    Args:
        jobs: the present index of each new job.
        workers: the present index of each new worker; those beyond the present ones are idle.
    """
    new_index = {old: new for new, old in enumerate(jobs)}
    idle = len(workers) - len(placement.workers)
    present, loads = placement.workers + ((),) * idle, placement.loads + (0.0,) * idle
    return Placement(
        costs=tuple(placement.costs[old] for old in jobs),
        workers=tuple(tuple(new_index[job] for job in present[worker]) for worker in workers),
        starts_s=tuple(placement.starts_s[old] for old in jobs),
        loads=tuple(loads[worker] for worker in workers),
        makespan_s=placement.makespan_s,
        bound_s=placement.bound_s,
    )


def longest_first(cost: Floats, speed: Floats) -> Assignment:
    """Each job, the longest first, to the worker that would end it earliest (LPT).

    Of equal ends the faster worker gets it. Shape (n,): the worker of each job.
    """
    assignment = np.zeros(cost.size, dtype=np.int64)
    fastest = np.argsort(-speed, kind="stable")
    seconds = 1 / speed[fastest]
    ends = np.zeros(speed.size)
    for job in np.argsort(-cost, kind="stable"):
        after = ends + cost[job] * seconds
        worker = after.argmin()
        ends[worker] = after[worker]
        assignment[job] = fastest[worker]
    return assignment


def makespan(assignment: Assignment, cost: Floats, speed: Floats) -> float:
    """When the last worker is done."""
    loads = np.bincount(assignment, weights=cost, minlength=speed.size)
    return float((loads / speed).max())


def _arrays(costs: Sequence[float], speeds: Sequence[float]) -> tuple[Floats, Floats]:
    cost = np.asarray(costs, dtype=np.float64)
    speed = np.asarray(speeds, dtype=np.float64)
    assert speed.size
    assert (speed > 0).all()
    assert (cost >= 0).all()
    assert np.isfinite(cost).all()
    return cost, speed


def _placement(assignment: Assignment, cost: Floats, speed: Floats, bound_s: float) -> Placement:
    workers: list[list[int]] = [[] for _ in range(speed.size)]
    ends = [0.0] * int(speed.size)
    starts = [0.0] * int(cost.size)
    for job in np.argsort(-cost, kind="stable").tolist():
        worker = int(assignment[job])
        workers[worker].append(job)
        starts[job] = ends[worker]
        ends[worker] += float(cost[job] / speed[worker])
    loads = np.bincount(assignment, weights=cost, minlength=speed.size)
    makespan_s = max(ends)
    return Placement(
        costs=tuple(cost.tolist()),
        workers=tuple(tuple(jobs) for jobs in workers),
        starts_s=tuple(starts),
        loads=tuple(loads.tolist()),
        makespan_s=makespan_s,
        bound_s=min(bound_s, makespan_s),
    )
