"""Which trainees share a job, what each job costs, and where it runs. Pure functions, no clock."""

from pbkd.plan.cost import BlockCost, Limits, TraineeCost
from pbkd.plan.jobs import on_more_workers, plan_block_phase, plan_bound
from pbkd.plan.placement import Placement, dispatch_order, list_schedule, place_jobs
from pbkd.plan.planned import Plan, PlannedJob

__all__ = [
    "BlockCost",
    "Limits",
    "Placement",
    "Plan",
    "PlannedJob",
    "TraineeCost",
    "dispatch_order",
    "list_schedule",
    "on_more_workers",
    "place_jobs",
    "plan_block_phase",
    "plan_bound",
]
