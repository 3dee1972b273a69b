"""The plan of the block phase for several numbers of workers: tables, sentences, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pbkd.distill import Profile
from pbkd.plan import Plan, PlannedJob
from pbkd.report import plan_plots
from pbkd.report.numbers import size_text
from pbkd.report.tables import Table, counted, duration_text
from pbkd.report.template import fill

PLAN = "plan.html"

_ENOUGH = 1.02
"""Speed-ups nearer to each other than this are taken for equal."""


@dataclass(frozen=True)
class Plans:
    """All that is shown.

    Attributes:
        network: name of the teacher's network.
        by_workers: number of workers to its plan, ascending; 1 and ``here`` are among them.
        here: number of workers of this machine.
        profile: what the plans rest on.
    """

    network: str
    by_workers: dict[int, Plan]
    here: int
    profile: Profile

    @property
    def own(self) -> Plan:
        """The plan for this machine."""
        return self.by_workers[self.here]

    @property
    def own_speeds(self) -> tuple[float, ...]:
        """Speeds of this machine's workers."""
        measured = self.profile.speeds
        return measured if len(measured) == self.here else (1.0,) * self.here

    @property
    def num_trainees(self) -> int:
        """Candidates to train; equal in all plans."""
        return sum(len(job.trainees) for job in self.own.jobs)

    def speedup(self, num_workers: int) -> float:
        """How much faster than the best plan of one worker."""
        wall_s = self.by_workers[num_workers].wall_s
        return self.by_workers[1].wall_s / wall_s if wall_s else 1.0


def workers_table(plans: Plans) -> Table:
    """What each number of workers is predicted to gain."""
    rows = []
    for number, plan in plans.by_workers.items():
        gain = plans.speedup(number)
        rows.append(
            (
                f"{number} (here)" if number == plans.here else str(number),
                str(len(plan.jobs)),
                source_of(plan),
                duration_text(plan.wall_s),
                f"{gain:.2f}",
                f"{100 * gain / number:.2g}%" if gain < 0.1 * number else f"{gain / number:.0%}",
                duration_text(plan.bound_s),
                size_text(plan.disk_bytes) if plan.disk_bytes else "none",
                size_text(plan.memory_bytes),
            )
        )
    heads = ("workers", "jobs", "source", "wall time", "speed-up", "efficiency", "bound")
    return Table("Predicted", (*heads, "cache on disk", "memory of a job"), tuple(rows))


def planned_jobs_table(plans: Plans, max_rows: int | None = None) -> Table:
    """The jobs for this machine in the order of their dispatch; at most so many, then a row more.

    Times are on the worker that the plan gives the job to.
    """
    plan = plans.own
    shown = plan.jobs[:max_rows]
    durations = plan_plots.durations_s(plan, plans.own_speeds)
    rows = [
        (
            job.job_id,
            feed_of(job),
            duration_text(plan.fill_s + plan.placement.starts_s[index]),
            duration_text(durations[index]),
            _shortened(job.trainees),
        )
        for index, job in enumerate(shown)
    ]
    if left_out := len(plan.jobs) - len(shown):
        rows.append((f"... and {left_out} more", "", "", "", ""))
    title = f"Jobs for the {counted(plans.here, 'worker')} of this machine"
    return Table(title, ("job", "source", "start", "takes", "trains"), tuple(rows))


def source_of(plan: Plan) -> str:
    """What feeds a plan's jobs in one word."""
    feeds = {(job.source, job.start is None) for job in plan.jobs}
    if feeds <= {("relay", True)}:
        return "relay"
    return "cache" if {source for source, _ in feeds} == {"cache"} else "mixed"


def feed_of(job: PlannedJob) -> str:
    """What feeds a job."""
    return job.source if job.start is None else f"relay from {job.start}"


def bottleneck_sentences(plans: Plans) -> list[str]:
    """Per number of workers what limits it; and what does not fit."""
    texts = [
        f"{counted(number, 'worker')}: {plan.bottleneck}."
        for number, plan in plans.by_workers.items()
    ]
    if too_large := plans.own.too_large:
        texts.append(
            f"Memory: {_shortened(too_large)} need more than a worker of this machine has free."
        )
    return texts


def plan_sentence(plans: Plans) -> str:
    """What this machine's workers take, and what the most useful number of workers would."""
    if not plans.num_trainees:
        return "There is nothing to train."
    here = plans.here
    what = counted(plans.num_trainees, "candidate")
    text = f"Predicted: {what} in {duration_text(plans.own.wall_s)} on "
    text += "one worker" if here == 1 else f"the {here} workers of this machine"
    if here > 1:
        text += f", {plans.speedup(here):.3g}x faster than on one"
    most = max(map(plans.speedup, plans.by_workers))
    best = min(n for n in plans.by_workers if plans.speedup(n) * _ENOUGH >= most)
    if best > here and most > _ENOUGH * plans.speedup(here):
        wall = duration_text(plans.by_workers[best].wall_s)
        text += f"; {wall} on {best} workers like these, {plans.speedup(best):.3g}x faster"
        text += " than on one" if here == 1 else ""
    return f"{text}."


def basis_sentences(plans: Plans) -> str:
    """What the predicted times rest on, and what they do not know."""
    profile = plans.profile
    who = counted(profile.num_workers, "worker")
    together = " at the same time" if profile.num_workers > 1 else ""
    threads = counted(profile.threads, "CPU thread") + (" each" if profile.num_workers > 1 else "")
    return (
        f"The times rest on what {who} with {threads} measured{together} on this machine "
        f"({profile.device}) in {duration_text(profile.duration_s)}. All epochs are counted: "
        "candidates that stop early make it shorter. Filling the cache is in the times; nothing "
        "counts as cached or trained before. Other numbers of workers are taken to be as fast as "
        "these: on this machine fewer would disturb each other less, and more would share its "
        "cores and memory."
    )


def render_plan(plans: Plans) -> str:
    """HTML of the page.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    plan = plans.own
    gains = {number: plans.speedup(number) for number in plans.by_workers}
    bounds = {
        number: plans.by_workers[1].wall_s / plan.bound_s
        for number, plan in plans.by_workers.items()
        if plan.bound_s
    }
    is_apart = any(bound > gains[number] * _ENOUGH for number, bound in bounds.items())
    return fill(
        "plan.html",
        network=plans.network,
        summary=plan_sentence(plans),
        fill_time=duration_text(plan.fill_s) if plan.fill_s else None,
        cache=size_text(plan.disk_bytes),
        speedups=plan_plots.speedups(gains, bounds if is_apart else {}, plans.here)
        if plan.jobs
        else None,
        line_keys=plan_plots.line_keys(is_apart),
        workers=workers_table(plans),
        bottlenecks=bottleneck_sentences(plans),
        gantt=plan_plots.planned_jobs(plan, plans.own_speeds) if plan.jobs else None,
        bar_keys=plan_plots.bar_keys(plan),
        jobs=planned_jobs_table(plans),
        basis=basis_sentences(plans),
    )


def _shortened(names: Sequence[str], num_shown: int = 3) -> str:
    if len(names) <= num_shown + 1:
        return ", ".join(names)
    return f"{', '.join(names[:num_shown])} and {len(names) - num_shown} more"
