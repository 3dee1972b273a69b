"""Moves and swaps of jobs that relieve the busiest worker of a placement."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pbkd.plan.bounds import Floats

Assignment = NDArray[np.int64]
"""(n,): the worker of each job."""

_MAX_PAIRS = 200_000_000
"""Pairs of jobs that are compared in all, some two seconds."""

_GAIN = 1e-9
"""Least relative gain of a step: less is rounding."""


def relieve(assignment: Assignment, cost: Floats, speed: Floats, enough_s: float) -> Assignment:
    """Steepest descent: the best move or swap of a job of the worker that ends last.

    A step must leave both workers that it touches ending before the busiest one did. Ends where
    none does, at a makespan of ``enough_s``, or after a fixed number of comparisons.

    Args:
        assignment: (n,), to start from; not changed.
        cost: (n,), seconds at speed 1.
        speed: (m,).
        enough_s: a makespan that needs no further work.
    """
    assignment = assignment.copy()
    loads: Floats = np.bincount(assignment, weights=cost, minlength=speed.size).astype(np.float64)
    pairs = 0
    while pairs < _MAX_PAIRS:
        busiest = int((loads / speed).argmax())
        limit = float(loads[busiest] / speed[busiest]) * (1 - _GAIN)
        if limit <= enough_s:
            break
        own = np.flatnonzero(assignment == busiest)
        pairs += own.size * (cost.size + speed.size)
        step = _best_step(own, busiest, assignment, cost, speed, loads)
        if step is None or step[0] >= limit:
            break
        _, job, worker, back = step
        assignment[job] = worker
        if back is not None:
            assignment[back] = busiest
        for touched in (busiest, worker):
            loads[touched] = cost[assignment == touched].sum()
    return assignment


def _best_step(
    own: Assignment,
    busiest: int,
    assignment: Assignment,
    cost: Floats,
    speed: Floats,
    loads: Floats,
) -> tuple[float, int, int, int | None] | None:
    """(later end of the two, job of the busiest, other worker, job that comes back or None)."""
    left, rate = loads[busiest], speed[busiest]
    moved = (loads[None, :] + cost[own, None]) / speed[None, :]
    moved[:, busiest] = np.inf
    move = np.maximum(moved, ((left - cost[own]) / rate)[:, None])
    row, worker = divmod(int(move.argmin()), speed.size)
    best = (float(move[row, worker]), int(own[row]), worker, None)

    others = np.flatnonzero(assignment != busiest)
    if not others.size:
        return best
    theirs = assignment[others]
    given = cost[own, None] - cost[None, others]
    swap = np.maximum((loads[theirs] + given) / speed[theirs], (left - given) / rate)
    row, column = divmod(int(swap.argmin()), others.size)
    if swap[row, column] < best[0]:
        back = int(others[column])
        return float(swap[row, column]), int(own[row]), int(assignment[back]), back
    return best
