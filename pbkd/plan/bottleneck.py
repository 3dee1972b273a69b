"""One sentence about what limits a plan."""

from __future__ import annotations

from collections.abc import Sequence

from pbkd.plan.placement import Placement
from pbkd.plan.planned import PlannedJob, Work

_MUCH = 0.4
"""Share of all work above which a part of it is named."""

_BUSY = 0.9
"""Share of the wall time above which workers count as busy, or a job as the limit."""


def bottleneck(
    jobs: Sequence[PlannedJob],
    placement: Placement,
    speeds: Sequence[float],
    fill_s: float,
    work: Work,
) -> str:
    """What takes most of the wall time and whether more workers help; English, no full stop.

    Args:
        jobs: those of the placement.
        fill_s: wall time of filling the cache.
    """
    if not jobs:
        return "there is nothing to train"
    wall_s = fill_s + placement.makespan_s
    if not wall_s:
        return "the jobs cost nothing"
    times = {
        job: placement.costs[job] / speed
        for own, speed in zip(placement.workers, speeds, strict=True)
        for job in own
    }
    longest = max(times, key=lambda job: times[job])
    busy = (fill_s + sum(placement.loads) / sum(speeds)) / wall_s
    if len(speeds) > 1 and busy < _BUSY and times[longest] > _BUSY * placement.makespan_s:
        job = jobs[longest]
        where = job.blocks[0] if len(job.blocks) == 1 else f"{job.blocks[0]} to {job.blocks[-1]}"
        share = times[longest] / wall_s
        return (
            f"the longest job, {job.job_id} ({where}), takes {share:.0%} of the wall time: "
            "more workers of this speed do not help"
        ).replace("%", " %")
    total = work.own_s + work.teacher_s + work.read_s + work.fill_s + work.jobs_s
    parts = {
        "the teacher's passes take": work.teacher_s,
        "reading the cache takes": work.read_s,
        "filling the cache takes": work.fill_s,
        "starting jobs takes": work.jobs_s,
    }
    name = max(parts, key=lambda part: parts[part])
    if parts[name] > _MUCH * total:
        return f"{name} {parts[name] / total:.0%} of all work".replace("%", " %")
    if busy >= _BUSY:
        text = f"all workers are busy {busy:.0%} of the time: more workers help"
    else:
        text = f"the jobs do not part evenly: workers are busy {busy:.0%} of the time"
    return text.replace("%", " %")
