"""The pictures of a plan: what more workers gain, and the planned jobs over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pbkd.plan import Plan, PlannedJob
from pbkd.report.plots import add_bar, new_gantt
from pbkd.report.svg import INK, SeriesStyle, new_figure, series_style, svg_of

_PLAN, _BOUND = series_style(0), series_style(1)
_IDEAL = SeriesStyle(INK, (0, (1.5, 2)), "")
_FILLING = series_style(3)
_FEEDS = {
    "relay": series_style(0),
    "relay from a cached input": series_style(2),
    "cache": series_style(1),
}
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
_MIN_UNITS = 3
"""A time axis has the largest unit of which it holds this many."""

_MIN_RATIO = 1.35
"""Between two numbers of workers that are both written below the axis."""


def speedups(gains: Mapping[int, float], bounds: Mapping[int, float], here: int) -> str:
    """Speed-up against the number of workers, both logarithmic, under the ideal and the bound.

    Args:
        gains: number of workers to the plan's speed-up over one worker.
        bounds: to the speed-up that no placement of the plan's jobs exceeds; drawn if not empty.
        here: number of workers of this machine; drawn filled.
    """
    figure, axes = new_figure(5, 3.2)
    numbers = list(gains)
    top = 1.6 * max(*gains.values(), *bounds.values(), 2)
    axes.plot(numbers, numbers, **_line(_IDEAL))
    if bounds:
        axes.plot(list(bounds), list(bounds.values()), **_line(_BOUND))
    axes.plot(numbers, list(gains.values()), **_line(_PLAN))
    last = 0.0
    for number, gain in gains.items():
        fill = "full" if number == here else "none"
        axes.plot(number, gain, color=_PLAN.colour, marker=_PLAN.marker, fillstyle=fill)
        if number >= last * _MIN_RATIO or number == here:
            last = number
            axes.annotate(
                f"{gain:.3g}", (number, gain), (4, -5), textcoords="offset points",
                ha="left", va="top", fontsize=8, color=_PLAN.colour,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log")
    axes.set_xlim(min(numbers) / 1.3, max(*numbers, 2) * 1.6)
    axes.set_ylim(0.7, top)
    for axis, ticks in ((axes.xaxis, _apart(numbers)), (axes.yaxis, _powers(top))):
        axis.set_ticks([], minor=True)
        axis.set_ticks(ticks, list(map(str, ticks)))
    axes.set_xlabel("workers (logarithmic)")
    axes.set_ylabel("times as fast as one worker")
    told = ", ".join(f"{gain:.3g} with {number}" for number, gain in gains.items())
    return svg_of(figure, f"Predicted speed-up by number of workers: {told}")


def line_keys(has_bounds: bool) -> dict[str, str]:
    """What the lines of ``speedups`` mean."""
    names = {"the plan; filled: this machine": _PLAN}
    if has_bounds:
        names["bound: no placement of the same jobs is faster"] = _BOUND
    names["ideal: as many times as fast as there are workers"] = _IDEAL
    pictures = {}
    for name, style in names.items():
        figure, axes = _swatch()
        axes.plot([0, 1, 2], [0, 0, 0], **_line(style))
        if style is _PLAN:
            axes.plot(1, 0, color=style.colour, marker=style.marker)
        pictures[name] = svg_of(figure, f"Line: {name}")
    return pictures


def planned_jobs(plan: Plan, speeds: Sequence[float]) -> str:
    """Gantt chart: a row per worker; it fills its part of the cache, then it trains its jobs.

    Args:
        speeds: of the plan's workers.
    """
    figure, axes = new_gantt(len(speeds))
    last_s = plan.wall_s or 1.0
    unit, unit_s = next(u for u in _UNITS if last_s >= _MIN_UNITS * u[1] or u[1] == 1)
    last = last_s / unit_s
    durations = durations_s(plan, speeds)
    for worker, indices in enumerate(plan.placement.workers):
        row = (worker - 0.4, 0.8)
        if plan.fill_s:
            add_bar(axes, (0.0, plan.fill_s / unit_s), row, _FILLING, "fill", last)
        for index in indices:
            job = plan.jobs[index]
            start_s = plan.fill_s + plan.placement.starts_s[index]
            span = (start_s / unit_s, durations[index] / unit_s)
            number = str(int(job.job_id.removeprefix("job-")))
            took = f"{span[1]:.3g} {unit} from {span[0]:.3g} on"
            told = f"Job {number} on worker {worker + 1}: {took}, {_feed(job)}"
            add_bar(axes, span, row, _FEEDS[_feed(job)], number, last, told)
    step = 1 + len(speeds) // 40
    rows = range(0, len(speeds), step)
    axes.set_yticks(list(rows), [str(row + 1) for row in rows])
    axes.set_ylabel("worker")
    axes.set_xlim(0, last)
    axes.set_xlabel(f"{unit}, predicted")
    feeds = ", ".join(bar_keys(plan))
    return svg_of(
        figure, f"{len(plan.jobs)} planned jobs on {len(speeds)} workers over time: {feeds}"
    )


def bar_keys(plan: Plan) -> dict[str, str]:
    """What the bars of ``planned_jobs`` mean, of those that it has."""
    used = {_feed(job) for job in plan.jobs}
    styles = {"filling the cache": _FILLING} if plan.fill_s else {}
    styles |= {feed: style for feed, style in _FEEDS.items() if feed in used}
    pictures = {}
    for name, style in styles.items():
        figure, axes = _swatch()
        add_bar(axes, (0.1, 1.8), (-0.6, 1.2), style, "", 2.0)
        axes.set(xlim=(0, 2), ylim=(-0.8, 0.8))
        pictures[name] = svg_of(figure, f"Bar: {name}")
    return pictures


def durations_s(plan: Plan, speeds: Sequence[float]) -> list[float]:
    """Seconds that each job takes on the worker that the plan gives it to."""
    durations = [0.0] * len(plan.jobs)
    for indices, speed in zip(plan.placement.workers, speeds, strict=True):
        for index in indices:
            durations[index] = plan.placement.costs[index] / speed
    return durations


def _feed(job: PlannedJob) -> str:
    return job.source if job.start is None else "relay from a cached input"


def _line(style: SeriesStyle) -> dict[str, Any]:
    return {"color": style.colour, "linestyle": style.dashes, "linewidth": 1.8}


def _swatch() -> tuple[Any, Any]:
    figure, axes = new_figure(0.6, 0.2, layout=None)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    axes.set_axis_off()
    return figure, axes


def _apart(numbers: Sequence[int]) -> list[int]:
    """Those that leave room for each other on a logarithmic axis, with the last one."""
    kept: list[int] = []
    for number in numbers:
        if not kept or number >= kept[-1] * _MIN_RATIO:
            kept.append(number)
    return [*(number for number in kept[:-1] if number * _MIN_RATIO <= numbers[-1]), numbers[-1]]


def _powers(top: float) -> list[int]:
    """1, 2, 4, ... up to a limit, or 1, 10, 100, ... where that would be many."""
    base = 2 if top < 40 else 10
    ticks = [1]
    while ticks[-1] * base <= top:
        ticks.append(ticks[-1] * base)
    return ticks
