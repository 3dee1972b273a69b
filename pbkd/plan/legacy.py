"""What plans were made of before: costs in multiply-accumulates, equal workers. To be deleted."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

_BACKWARD_OVER_FORWARD = 2
"""Gradients of inputs and of weights cost a forward pass each."""


def trainee_cost(candidate_macs: int, prefix_macs: int, num_images: int, num_epochs: int) -> float:
    """Multiply-accumulates of one training.

    Args:
        candidate_macs: of one image, forward.
        prefix_macs: of the teacher's pass that feeds the block (relay), of one image; 0 for cache.
        num_images: in the training split.
    """
    per_image = candidate_macs * (1 + _BACKWARD_OVER_FORWARD) + prefix_macs
    return float(per_image) * num_images * num_epochs


@dataclass(frozen=True)
class Job:
    """Trainees that share a source, by name, and their cost in the unit of the cost model."""

    job_id: str
    trainees: tuple[str, ...]
    cost: float


@dataclass(frozen=True)
class Placement:
    """Where each job runs, and what follows.

    Attributes:
        workers: per worker the ids of its jobs, in order.
        makespan: cost of the busiest worker.
        bound: no schedule is shorter: max(total / workers, longest job).
        total: cost of all jobs on one worker.
    """

    workers: tuple[tuple[str, ...], ...]
    makespan: float
    bound: float
    total: float

    @property
    def speedup(self) -> float:
        """Predicted: total over makespan."""
        return self.total / self.makespan if self.makespan else 1.0


def group_trainees(
    costs: Mapping[str, float], blocks: Mapping[str, str], source: str, num_workers: int
) -> list[Job]:
    """Jobs, longest first.

    With a cache nothing is gained by sharing: one job per block. A relay's teacher pass is shared
    by all trainees of its job, so there are as many jobs as workers, balanced by cost.

    Args:
        costs: trainee to cost, in the blocks' order.
        blocks: trainee to block; trainees of one block stay together.
        source: "cache" or "relay".
    """
    by_block: dict[str, list[str]] = {}
    for trainee in costs:
        by_block.setdefault(blocks[trainee], []).append(trainee)
    if source == "relay":
        groups = _balanced(
            {block: sum(costs[t] for t in group) for block, group in by_block.items()}, num_workers
        )
        members = [[t for block in group for t in by_block[block]] for group in groups]
    else:
        members = list(by_block.values())
    members.sort(key=lambda group: -sum(costs[t] for t in group))
    return [
        Job(f"job-{index:03d}", tuple(group), sum(costs[t] for t in group))
        for index, group in enumerate(members)
    ]


def place(jobs: list[Job], num_workers: int) -> Placement:
    """What equal workers do that each take the longest waiting job when idle (Graham's LPT)."""
    assert num_workers >= 1
    loads = [(0.0, worker) for worker in range(num_workers)]
    workers: list[list[str]] = [[] for _ in range(num_workers)]
    for job in sorted(jobs, key=lambda job: -job.cost):
        load, worker = heapq.heappop(loads)
        workers[worker].append(job.job_id)
        heapq.heappush(loads, (load + job.cost, worker))
    total = sum(job.cost for job in jobs)
    longest = max((job.cost for job in jobs), default=0.0)
    return Placement(
        workers=tuple(tuple(ids) for ids in workers),
        makespan=max(load for load, _ in loads),
        bound=max(total / num_workers, longest),
        total=total,
    )


def _balanced(costs: Mapping[str, float], num_groups: int) -> list[list[str]]:
    """Blocks in at most ``num_groups`` groups of like cost; each keeps the blocks' order."""
    jobs = [Job(block, (block,), cost) for block, cost in costs.items()]
    placed = place(jobs, num_groups).workers
    position = {block: index for index, block in enumerate(costs)}
    return [sorted(group, key=position.__getitem__) for group in placed if group]
