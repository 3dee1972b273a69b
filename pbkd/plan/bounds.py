"""What no placement of given jobs on workers of given speeds can beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MAX_ENTRIES = 2_000_000
"""Entries that the pigeonhole bound may sort: it matters where there are few jobs per worker."""


def placement_bound(costs: Floats, speeds: Floats) -> float:
    """The largest of three lower bounds on the makespan of jobs on uniform workers, in seconds.

    Area: all jobs over all speeds. Fewest workers: the k longest jobs fill at most the k fastest
    workers. Pigeonhole: within T a worker of speed s takes at most as many of the q longest jobs
    as there are shortest ones among them that fit into ``T * s``; over all workers these counts
    must reach q. For equal speeds and q = m + 1 it is the well-known sum of the m-th and the
    (m + 1)-th longest job.

    Args:
        costs: (n,), seconds at speed 1.
        speeds: (m,), positive.
    """
    if not costs.size or not costs.any():
        return 0.0
    longest = -np.sort(-costs)
    fastest = -np.sort(-speeds)
    area = float(longest.sum() / fastest.sum())
    count = min(longest.size, fastest.size)
    few = float((np.cumsum(longest[:count]) / np.cumsum(fastest[:count])).max())
    return max(area, few, _pigeonhole(longest, fastest))


def _pigeonhole(longest: Floats, fastest: Floats) -> float:
    """The third bound, for as many q as the limit of entries allows."""
    bound = 0.0
    entries = 0
    for num_longest in range(2, longest.size + 1):
        per_worker = _per_worker(num_longest, fastest)
        entries += per_worker * fastest.size
        if entries > _MAX_ENTRIES:
            break
        shortest_sums = np.cumsum(longest[:num_longest][::-1])[:per_worker]
        times = np.divide.outer(shortest_sums, fastest).ravel()
        # The q-th smallest time is the first at which q jobs fit on all workers together.
        bound = max(bound, float(np.partition(times, num_longest - 1)[num_longest - 1]))
    return bound


def _per_worker(num_longest: int, fastest: Floats) -> int:
    """Jobs that a worker can be asked to take: all of them where speeds differ."""
    if fastest[0] == fastest[-1]:
        return -(-num_longest // fastest.size)
    return num_longest
