"""The best placement of few jobs, by branch and bound."""

from __future__ import annotations

import numpy as np

from pbkd.plan.bounds import Floats
from pbkd.plan.exchange import Assignment

_MAX_NODES = 30_000
"""Partial placements that are looked at, some tenths of a second."""

_MAX_WORKERS = 64
"""With more workers each node is dear and the search seldom ends."""

_GAIN = 1e-9
"""Least relative gain: less is rounding."""


def shortest_assignment(
    assignment: Assignment, cost: Floats, speed: Floats, bound_s: float
) -> tuple[Assignment, bool]:
    """An assignment at least as good as the given one, and whether none is better.

    Depth first: the longest job that is left goes to each worker in turn, the earliest end first;
    of workers alike in speed and load only one is tried. A branch is cut where a worker ends too
    late, or where what is left does not fit into what all workers have left.

    Args:
        assignment: (n,), the best one known.
        cost: (n,), seconds at speed 1.
        speed: (m,).
        bound_s: a makespan that no assignment beats.
    """
    if speed.size > _MAX_WORKERS:
        return assignment, False
    search = _Search(assignment, cost, speed, bound_s)
    proven = search.run()
    return search.best, proven


class _Search:
    """State of one search; jobs are numbered from the longest to the shortest."""

    def __init__(self, assignment: Assignment, cost: Floats, speed: Floats, bound_s: float) -> None:
        self.order = np.argsort(-cost, kind="stable")
        self.costs: list[float] = cost[self.order].tolist()
        self.speeds: list[float] = speed.tolist()
        # left[k]: cost of jobs k, k + 1, ...
        self.left: list[float] = [*np.cumsum(cost[self.order][::-1])[::-1].tolist(), 0.0]
        self.best = assignment
        loads = np.bincount(assignment, weights=cost, minlength=speed.size)
        self.limit = float((loads / speed).max()) * (1 - _GAIN)
        self.enough = bound_s
        self.nodes = 0
        self.loads = [0.0] * len(self.speeds)
        self.chosen = [0] * len(self.costs)

    def run(self) -> bool:
        """Search; whether the search came to its end."""
        num_jobs = len(self.costs)
        if not num_jobs:
            return True
        # One iterator of workers per job on the path; recursion would limit the number of jobs.
        path = [iter(self._workers(0))]
        while path:
            depth = len(path) - 1
            worker = next(path[-1], None)
            if worker is None:
                path.pop()
                if path:
                    self.loads[self.chosen[depth - 1]] -= self.costs[depth - 1]
                continue
            load = self.loads[worker] + self.costs[depth]
            if load > self.limit * self.speeds[worker]:
                continue
            self.nodes += 1
            if self.nodes > _MAX_NODES:
                return False
            self.chosen[depth] = worker
            if depth + 1 == num_jobs:
                self._keep()
                if self.limit <= self.enough:
                    return True
                continue
            self.loads[worker] = load
            if self._fits(depth + 1):
                path.append(iter(self._workers(depth + 1)))
            else:
                self.loads[worker] = load - self.costs[depth]
        return True

    def _workers(self, depth: int) -> list[int]:
        """Workers that can take a job in time, without doubles, the earliest end first."""
        cost = self.costs[depth]
        seen: set[tuple[float, float]] = set()
        ends: list[tuple[float, int]] = []
        for worker, (load, speed) in enumerate(zip(self.loads, self.speeds, strict=True)):
            end = (load + cost) / speed
            if end <= self.limit and (load, speed) not in seen:
                seen.add((load, speed))
                ends.append((end, worker))
        return [worker for _, worker in sorted(ends)]

    def _fits(self, depth: int) -> bool:
        """Whether what is left fits into the workers' room; room below the shortest is lost."""
        shortest = self.costs[-1]
        room = 0.0
        for load, speed in zip(self.loads, self.speeds, strict=True):
            free = self.limit * speed - load
            if free >= shortest:
                room += free
        return room >= self.left[depth]

    def _keep(self) -> None:
        """Take the present choices as the best so far."""
        best = np.empty(len(self.costs), dtype=np.int64)
        best[self.order] = self.chosen
        self.best = best
        loads = np.bincount(self.chosen, weights=self.costs, minlength=len(self.speeds))
        self.limit = float((loads / np.asarray(self.speeds)).max()) * (1 - _GAIN)
