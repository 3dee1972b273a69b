"""The Pareto front, and its pictures: test accuracy against bytes, MACs and latency.

The front is found by validation accuracy, like every choice in pbkd, and drawn at the test accuracy
of its members: a line through the best test accuracies would itself choose by the test images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

from pbkd.report.labels import Box, Label, place
from pbkd.report.numbers import count_text, ms_text, size_text
from pbkd.report.results import BASELINES, Measured, Metrics, ModelFigures
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

Kind = Literal["teacher", "student", "scratch", "distill"]

FEW = 8
"""Up to so many points, a picture is small."""

MANY = 21
"""More points than these, and baselines are not labelled: their lines lead to their students."""

_STYLES: dict[Kind, SeriesStyle] = {
    "teacher": SeriesStyle(series_style(0).colour, "solid", "D"),
    "student": SeriesStyle(series_style(1).colour, "solid", "o"),
    "scratch": SeriesStyle(series_style(2).colour, "solid", "^"),
    "distill": SeriesStyle(series_style(3).colour, "solid", "s"),
}
_FONT = 8.5  # points
_MARKER = 7.0  # points


class Point(NamedTuple):
    """A model in a picture: its cost on the x-axis, and accuracies from 0 to 1."""

    name: str
    kind: Kind
    cost: float
    test_accuracy: float
    val_accuracy: float
    student: str | None = None
    """Of a baseline: whose architecture it has."""


@dataclass(frozen=True)
class Axis:
    """What a picture sets accuracy against."""

    title: str
    label: str
    text: Callable[[float], str]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats, by cost.

    Args:
        points: (cost, accuracy). One beats another if it is no worse in both and better in one; of
            equal points none beats the other.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for index in order:
        cost, accuracy = points[index]
        last = points[front[-1]] if front else None
        if last is None or accuracy > last[1] or (cost, accuracy) == last:
            front.append(index)
    return front


def pictures(metrics: Metrics, measured: Measured, network: str) -> dict[str, str]:
    """Title to SVG: against file bytes, MACs, and latency by batch size where it was measured."""
    entries: list[tuple[Axis, Callable[[str, ModelFigures], float]]] = [
        (Axis("file size", "file size", size_text), lambda _, model: model.file_bytes),
        (Axis("MACs", "MACs per image", count_text), lambda _, model: model.macs),
    ]
    latency = measured.headline
    for index, entry in enumerate(latency["teacher"]):
        title = f"latency at batch {entry.batch_size}"
        axis = Axis(title, f"{title} ({entry.device})", ms_text)

        def latency_ms(name: str, _: ModelFigures, index: int = index) -> float:
            return latency[name][index].median_ms

        entries.append((axis, latency_ms))
    return {
        f"Accuracy against {axis.title}": picture(points_of(metrics, network, cost), axis)
        for axis, cost in entries
    }


def points_of(
    metrics: Metrics, network: str, cost: Callable[[str, ModelFigures], float]
) -> list[Point]:
    """Teacher, students and baselines; ``cost`` gets the name of a baseline's student."""

    def point(shown: str, kind: Kind, name: str, model: ModelFigures, of: str | None) -> Point:
        return Point(shown, kind, cost(name, model), model.test_accuracy, model.val_accuracy, of)

    points = [point(f"{network} (teacher)", "teacher", "teacher", metrics.teacher, None)]
    students = metrics.by_size
    points += [point(name, "student", name, model, None) for name, model in students.items()]
    for name in students:
        for kind, model in metrics.baselines.get(name, {}).items():
            assert kind in BASELINES, kind
            shown = f"{name}, {BASELINES[kind]}"
            points.append(point(shown, cast(Kind, kind), name, model, name))
    return points


def picture(points: Sequence[Point], axis: Axis) -> str:
    """One picture; labels never overlap, for which it becomes as high as it must."""
    is_small = len(points) <= FEW
    labelled = [p for p in points if len(points) <= MANY or p.student is None]
    width, height = (4.6, 3.4) if is_small else (7.2, 4.8)
    for _ in range(6):
        figure, axes = _drawn(points, axis, width, height)
        if _label(figure, axes, labelled, points):
            break
        height *= 1.4
    told = ", ".join(f"{p.name} {axis.text(p.cost)}, {p.test_accuracy:.1%}" for p in points)
    return svg_of(figure, f"Test accuracy against {axis.title}: {told}")


def fronts(runs: Sequence[Sequence[Point]], axis: Axis) -> str:
    """The points of several runs, each with its own front, in one picture."""
    points = [point for own in runs for point in own]
    width, height = 7.2, 4.8
    labelled = points if len(points) <= MANY else []
    for _ in range(6):
        figure, axes = _empty(points, axis, width, height)
        for own, style in zip(runs, _run_styles(len(runs)), strict=True):
            look = {"color": style.colour, "marker": style.marker, "markersize": _MARKER}
            for point in own:
                (mark,) = axes.plot(point.cost, 100 * point.test_accuracy, **look, zorder=3)
                tell(mark, told_of(point, axis))
            members = front_of(own)
            axes.plot(
                [p.cost for p in members],
                [100 * p.test_accuracy for p in members],
                **_FRONT | {"color": style.colour, "linestyle": style.dashes},
            )
        if _label(figure, axes, labelled, points):
            break
        height *= 1.4
    told = ", ".join(f"{p.name} {axis.text(p.cost)}, {p.test_accuracy:.1%}" for p in points)
    return svg_of(figure, f"Test accuracy against {axis.title} of {len(runs)} runs: {told}")


def run_keys(names: Sequence[str]) -> dict[str, str]:
    """What each mark of ``fronts`` means, by the names of the runs."""
    marks = {}
    for name, style in zip(names, _run_styles(len(names)), strict=True):
        figure, axes = _key_figure()
        axes.plot([0, 2], [0, 0], **_FRONT | {"color": style.colour, "linestyle": style.dashes})
        axes.plot(1, 0, color=style.colour, marker=style.marker, markersize=_MARKER)
        marks[name] = svg_of(figure, f"Mark and line of run {name}")
    return marks


def _run_styles(num: int) -> list[SeriesStyle]:
    return [series_style(index) for index in range(num)]


def keys(metrics: Metrics) -> dict[str, str]:
    """What each mark means, for a legend in the page's own text."""
    kinds: dict[Kind, str] = {"teacher": "teacher", "student": "student"}
    there = {kind for own in metrics.baselines.values() for kind in own}
    if "scratch" in there:
        kinds["scratch"] = "baseline trained from scratch"
    if "distill" in there:
        kinds["distill"] = "baseline distilled whole"
    marks = {}
    for kind, text in kinds.items():
        figure, axes = _key_figure()
        _mark(axes, kind, (1, 0))
        marks[text] = svg_of(figure, f"Mark of: {text}")
    figure, axes = _key_figure()
    axes.plot([0, 2], [0, 0], **_FRONT)
    return marks | {"Pareto front": svg_of(figure, "Line of the Pareto front")}


_FRONT: dict[str, Any] = {
    "color": _STYLES["student"].colour,
    "linewidth": 1.4,
    "alpha": 0.45,
    "zorder": 1,
}


def _key_figure() -> tuple[Any, Any]:
    figure, axes = new_figure(0.4, 0.15, layout=None)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    axes.set_axis_off()
    axes.set(xlim=(-0.05, 2.05), ylim=(-1, 1))
    return figure, axes


def _mark(axes: Any, kind: Kind, at: tuple[float, float]) -> Any:
    style = _STYLES[kind]
    filled = kind in ("teacher", "student")
    (mark,) = axes.plot(
        *at,
        color=style.colour,
        marker=style.marker,
        markersize=_MARKER if filled else _MARKER - 1,
        fillstyle="full" if filled else "none",
        linestyle="none",
        zorder=3,
    )
    return mark


def _drawn(points: Sequence[Point], axis: Axis, width: float, height: float) -> tuple[Any, Any]:
    """Figure and axes with marks and front, without labels."""
    figure, axes = _empty(points, axis, width, height)
    for student in dict.fromkeys(p.student for p in points if p.student is not None):
        own = [p for p in points if student in (p.student, p.name)]
        heights = [100 * p.test_accuracy for p in own]
        ends = [min(heights), max(heights)]
        axes.plot([own[0].cost] * 2, ends, color=INK, linewidth=0.7, alpha=0.22, zorder=0)
    for point in points:
        mark = _mark(axes, point.kind, (point.cost, 100 * point.test_accuracy))
        tell(mark, told_of(point, axis))
    members = front_of(points)
    axes.plot([p.cost for p in members], [100 * p.test_accuracy for p in members], **_FRONT)
    return figure, axes


def _empty(points: Sequence[Point], axis: Axis, width: float, height: float) -> tuple[Any, Any]:
    """Figure and axes with room for the points."""
    figure, axes = new_figure(width, height, layout=None)
    figure.subplots_adjust(
        left=0.62 / width, right=1 - 0.12 / width, bottom=0.5 / height, top=1 - 0.1 / height
    )
    costs = [point.cost for point in points]
    room = max(1.35, (max(costs) / min(costs)) ** 0.1)
    limits = (min(costs) / room, max(costs) * room)
    set_log_scale(axes, "x", limits, axis.text, min_gap=0.7 / width)
    heights = [100 * point.test_accuracy for point in points]
    margin = max(0.2 * (max(heights) - min(heights)), 0.25)
    axes.set_ylim(min(heights) - margin, max(heights) + margin)
    axes.yaxis.get_major_formatter().set_useOffset(False)
    axes.tick_params(labelsize=_FONT)
    axes.set_ylabel("test accuracy (%)", fontsize=_FONT + 0.5)
    axes.set_xlabel(f"{axis.label} (logarithmic)", fontsize=_FONT + 0.5)
    return figure, axes


def told_of(point: Point, axis: Axis) -> str:
    """A point in words: cost, and both accuracies."""
    accuracies = f"{point.test_accuracy:.2%} test, {point.val_accuracy:.2%} validation"
    return f"{point.name}: {axis.text(point.cost)}, {accuracies}"


def front_of(points: Sequence[Point]) -> list[Point]:
    """Teacher and students that no other one beats, by validation accuracy; cheapest first."""
    family = [point for point in points if point.student is None]
    chosen = pareto_front([(point.cost, point.val_accuracy) for point in family])
    return [family[index] for index in chosen]


def _label(figure: Any, axes: Any, labelled: Sequence[Point], points: Sequence[Point]) -> bool:
    """Write the names beside their marks; False where there is no room for all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(72)  # a pixel is a point
    canvas: Any = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()

    def at(point: Point) -> tuple[float, float]:
        x, y = axes.transData.transform((point.cost, 100 * point.test_accuracy))
        return float(x), float(y)

    half = _MARKER / 2 + 1
    marks = [Box(x - half, y - half, x + half, y + half) for x, y in map(at, points)]
    front = [at(point) for point in front_of(points)]
    texts = [
        axes.text(p.cost, 100 * p.test_accuracy, literal(p.name), fontsize=_FONT) for p in labelled
    ]
    labels = []
    for point, text in zip(labelled, texts, strict=True):
        extent = text.get_window_extent(renderer)
        labels.append(Label(at(point), extent.width + 2, _FONT * 1.25))
    area = axes.get_window_extent(renderer)
    boxes = place(
        labels,
        Box(area.x0 + 2, area.y0 + 2, figure.bbox.width - 2, figure.bbox.height - 1),
        marks,
        list(pairwise(front)),
    )
    if boxes is None:
        return False
    back = axes.transData.inverted()
    for label, text, box in zip(labels, texts, boxes, strict=True):
        x = label.point[0]
        side = "left" if box.x0 >= x else "right" if box.x1 <= x else "center"
        anchor = {"left": box.x0 + 1, "right": box.x1 - 1, "center": (box.x0 + box.x1) / 2}[side]
        text.set(ha=side, va="center_baseline")
        text.set_position(back.transform((anchor, (box.y0 + box.y1) / 2)))
        start, end = label.leader(box)
        if (end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2 > 9.0**2:
            ends = back.transform([start, end])
            axes.plot(ends[:, 0], ends[:, 1], color=INK, linewidth=0.5, alpha=0.4, zorder=0)
    return True
