"""Costs of the block phase, measured by all workers of a pool at the same time."""

from __future__ import annotations

import shutil

from flows.pool import WorkerPool, run_all
from flows.slots import Slot
from pbkd.distill import Profile, ProfileJob, merge_profiles, run_profile
from pbkd.stages import StageContext
from pbkd.stages.planning import Subject, profile_job, profiled


def profile_workers(context: StageContext, subject: Subject, pool: WorkerPool) -> Profile:
    """What this machine keeps, or what the workers measure now."""
    job = profile_job(context.workspace, subject, [_described(slot) for slot in pool.slots])
    return profiled(context.workspace, job, lambda job: profile_on(job, pool))


def profile_on(job: ProfileJob, pool: WorkerPool) -> Profile:
    """One measurement per worker, side by side; they wait for each other before they begin."""
    shutil.rmtree(job.meeting, ignore_errors=True)
    try:
        indices = range(len(pool.slots))
        calls = [lambda pool, index=index: pool.run(run_profile, job, index) for index in indices]
        return merge_profiles(run_all(pool, calls))
    finally:
        shutil.rmtree(job.meeting, ignore_errors=True)


def _described(slot: Slot) -> str:
    """A worker as the key of a profile names it: what may change its speed."""
    which = slot.locks if slot.device == "cuda" else ()  # a core is like any other
    return " ".join([slot.device, str(slot.threads), *which, slot.machines]).rstrip()
