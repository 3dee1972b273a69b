"""The report's pictures: figures of the run as SVG text."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from pbkd.report.results import BlockPhase, JobFigures, TraineeFigures
from pbkd.report.svg import (
    INK,
    SeriesStyle,
    literal,
    new_figure,
    series_style,
    set_log_scale,
    svg_of,
    tell,
)

GANTT_WIDTH = 7.5  # inches
_FEW = 4  # trainees that a job's bar names
_CHARACTER = 0.6  # width of a digit over the height of its font


def damages(
    trainees: Sequence[TraineeFigures], chosen: Collection[tuple[str, str]], max_damage: float
) -> str:
    """Damage of every trainee, a row per block; what a student took is filled.

    Args:
        chosen: (block, candidate).
        max_damage: limit above which a block keeps the teacher's module, nats; 0 and infinity have
            no place on a logarithmic scale and are left out.
    """
    rows = {block: row for row, block in enumerate(dict.fromkeys(t.block for t in trainees))}
    styles = _styles(trainees)
    figure, axes = new_figure(5, 0.22 * len(rows) + 1.1)
    positive = [t.damage.kl for t in trainees if t.damage.kl is not None and t.damage.kl > 0]
    has_limit = 0 < max_damage < math.inf
    marks = [*positive, max_damage] if has_limit else positive
    low, high = min(marks, default=0.1) / 2, max(marks, default=1) * 2
    for trainee in trainees:
        style = styles[trainee.candidate]
        kl, row = trainee.damage.kl, rows[trainee.block]
        is_chosen = (trainee.block, trainee.candidate) in chosen
        (mark,) = axes.plot(
            high if kl is None else max(kl, low),
            row,
            color=style.colour,
            marker="x" if kl is None else style.marker,
            fillstyle="full" if is_chosen else "none",
            clip_on=False,
        )
        damage = "not finite" if kl is None else f"{kl:.3g} nats"
        tell(
            mark,
            f"{trainee.block}, {trainee.candidate}: {damage}{', chosen' if is_chosen else ''}",
        )
        if kl is None:
            axes.annotate(
                "not finite", (high, row), (-7, 0), textcoords="offset points", ha="right",
                va="center", fontsize=8, color=style.colour,
            )  # fmt: skip
    if has_limit:
        axes.axvline(max_damage, color=INK, linewidth=1.5, linestyle="--")
        above = axes.get_xaxis_transform()
        axes.text(max_damage, 1, "max_damage", ha="center", va="bottom", transform=above)
    axes.set_yticks(list(rows.values()), [literal(block) for block in rows])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    set_log_scale(axes, "x", (low, high), "{:g}".format)
    axes.set_xlabel("damage (nats, logarithmic)")
    return svg_of(figure, f"Damage of {len(trainees)} candidates of {len(rows)} blocks")


def loss_curves(trainees: Sequence[TraineeFigures]) -> dict[str, str]:
    """Block to a small picture of its candidates' validation losses by epoch, on equal axes.

    The axes hold each candidate's first and best loss: one that diverges leaves its picture.
    """
    courses = [[loss for _, loss in t.val_losses if loss > 0] for t in trainees]
    ends = [end for course in courses if course for end in (course[0], min(course))]
    low, high = min(ends, default=0.1) / 1.3, max(ends, default=1) * 1.3
    last = max((epoch for t in trainees for epoch, _ in t.val_losses), default=0)
    styles = _styles(trainees)
    pictures = {}
    for block in dict.fromkeys(trainee.block for trainee in trainees):
        figure, axes = new_figure(2.3, 1.6, layout=None)
        figure.subplots_adjust(left=0.25, right=0.97, bottom=0.16, top=0.95)
        own = [trainee for trainee in trainees if trainee.block == block]
        for trainee in own:
            style = styles[trainee.candidate]
            x = [epoch + 1 for epoch, _ in trainee.val_losses]
            y = [loss for _, loss in trainee.val_losses]
            for line in axes.plot(x, y, color=style.colour, linestyle=style.dashes, linewidth=1.8):
                tell(line, _from_to([trainee]))
        axes.set_xlim(-0.03 * (last + 1), 1.03 * (last + 1))
        axes.set_xticks([0, last + 1])
        set_log_scale(axes, "y", (low, high), "{:g}".format)
        pictures[block] = svg_of(figure, f"Validation loss of {block}: {_from_to(own)}")
    return pictures


def candidate_keys(trainees: Sequence[TraineeFigures]) -> dict[str, str]:
    """Candidate to its line and marker, for a legend in the page's own text."""
    pictures = {}
    for candidate, style in _styles(trainees).items():
        figure, axes = new_figure(0.6, 0.2, layout=None)
        figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
        axes.set_axis_off()
        axes.plot([0, 1, 2], [0, 0, 0], color=style.colour, linestyle=style.dashes, linewidth=1.8)
        axes.plot(1, 0, color=style.colour, marker=style.marker)
        pictures[candidate] = svg_of(figure, f"Line and marker of {candidate}")
    return pictures


def jobs(phase: BlockPhase) -> str:
    """Gantt chart: a row per worker, a bar per job, with the job's number where there is room.

    Below a job's bar there is a thin dashed one as long as the job was predicted to take.
    """
    workers = sorted({job.worker for job in phase.jobs}, key=lambda name: (len(name), name))
    rows = {name: row for row, name in enumerate(workers)}
    figure, axes = new_gantt(len(rows))
    style, other = series_style(0), series_style(1)
    is_predicted = any(job.predicted_s is not None for job in phase.jobs)
    last_s = max([phase.wall_s, *(j.started_s + (j.predicted_s or 0) for j in phase.jobs)])
    height = 0.56 if is_predicted else 0.8
    for number, job in enumerate(phase.in_order, start=1):
        top = rows[job.worker] - 0.4
        span = (job.started_s, job.duration_s)
        add_bar(axes, span, (top, height), style, str(number), last_s, _told_of(job, number))
        if job.predicted_s is not None:
            span = (job.started_s, job.predicted_s)
            axes.broken_barh(
                [span], (top + 0.62, 0.18), facecolor="none", edgecolor=other.colour, linestyle="--"
            )
    axes.set_yticks(list(rows.values()), [literal(name) for name in rows])
    axes.set_xlim(0, last_s)
    axes.set_xlabel("seconds since the first job began")
    text = f"{len(phase.jobs)} jobs on {len(rows)} workers over time"
    if is_predicted:
        text += "; below each job the time that was predicted for it"
    return svg_of(figure, text)


def new_gantt(num_rows: int) -> tuple[Any, Any]:
    """A figure and its axes for a Gantt chart with rows 0, 1, ... from the top."""
    figure, axes = new_figure(GANTT_WIDTH, min(0.34 * num_rows, 14) + 0.8)
    axes.set_ylim(num_rows - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    return figure, axes


def add_bar(
    axes: Any,
    span: tuple[float, float],
    row: tuple[float, float],
    style: SeriesStyle,
    label: str,
    last: float,
    told: str = "",
) -> None:
    """Draw a job's bar, with the label where there is room for it.

    Args:
        span: start and duration.
        row: top and height, in rows.
        last: where the chart ends, in the unit of ``span``.
        told: what the bar means; empty: nothing is told.
    """
    bar = axes.broken_barh([span], row, facecolor=style.colour, alpha=0.3)
    if told:
        tell(bar, told)
    axes.broken_barh([span], row, facecolor="none", edgecolor=style.colour)
    room = 60 * GANTT_WIDTH * span[1] / last  # points; the axes take most of the width
    if room > 8 * _CHARACTER * len(label) + 2:
        axes.text(
            span[0] + span[1] / 2, row[0] + row[1] / 2, literal(label), fontsize=8,
            ha="center", va="center_baseline", color=INK,
        )  # fmt: skip


def _told_of(job: JobFigures, number: int) -> str:
    planned = "" if job.predicted_s is None else f", predicted {job.predicted_s:.3g} s"
    few = ", ".join(job.trained[:_FEW]) or "nothing"
    more = f" and {len(job.trained) - _FEW} more" if len(job.trained) > _FEW else ""
    took = f"{job.duration_s:.3g} s from {job.started_s:.1f} s on{planned}"
    return f"Job {number} on {job.worker}: {took}; trained {few}{more}"


def _styles(trainees: Sequence[TraineeFigures]) -> dict[str, SeriesStyle]:
    candidates = dict.fromkeys(trainee.candidate for trainee in trainees)
    return {candidate: series_style(index) for index, candidate in enumerate(candidates)}


def _from_to(trainees: Sequence[TraineeFigures]) -> str:
    texts = []
    for trainee in trainees:
        losses = [loss for _, loss in trainee.val_losses]
        course = f"from {losses[0]:.3g} to {min(losses):.3g}" if losses else "no finite loss"
        texts.append(f"{trainee.candidate} {course}")
    return ", ".join(texts)
