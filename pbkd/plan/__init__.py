"""Which trainees share a job, what each job costs, and where it runs. Pure functions, no clock."""

from pbkd.plan.cost import trainee_cost
from pbkd.plan.placement import Job, Placement, group_trainees, place

__all__ = ["Job", "Placement", "group_trainees", "place", "trainee_cost"]
