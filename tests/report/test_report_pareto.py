"""The Pareto front and its pictures: who is on it, and that every label can be read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbkd.report import Metrics
from pbkd.report.labels import Box, Label, place
from pbkd.report.pareto import (
    MANY,
    Axis,
    Point,
    front_of,
    keys,
    pareto_front,
    picture,
    pictures,
    points_of,
)
from tests.report.html_page import Page
from tests.report.made_up import family

AXIS = Axis("size", "size", "{:g} B".format)


def text_boxes(svg: str) -> dict[str, Box]:
    """Label to its box in an SVG, by an estimate of its text's width; y grows downwards."""
    boxes = {}
    pattern = r'<text style="([^"]*)" x="([-\d.]+)" y="([-\d.]+)"[^>]*>([^<]*)<'
    for style, x, y, text in re.findall(pattern, svg):
        size = re.search(r"([\d.]+)px", style)
        assert size is not None
        height = float(size[1])
        width = 0.5 * height * len(text)
        anchor = "middle" if "middle" in style else "end" if "end" in style else "start"
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes[text] = Box(left, float(y) - 0.75 * height, left + width, float(y) + 0.1 * height)
    return boxes


# ---------------------------------------------------------------- the front

FIGURE = st.integers(0, 6)


@given(st.lists(st.tuples(FIGURE, FIGURE), max_size=12))
def test_the_front_is_what_no_other_point_beats(points):
    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    expected = {
        index
        for index, point in enumerate(points)
        if not any(beats(other, point) for other in points)
    }
    front = pareto_front(points)
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


def test_the_front_is_found_by_validation_accuracy_and_without_baselines():
    points = [
        Point("teacher", "teacher", 100, 0.90, 0.95),
        Point("lucky", "student", 50, 0.99, 0.80),
        Point("good", "student", 40, 0.85, 0.90),
        Point("good, from scratch", "scratch", 40, 0.99, 0.99, "good"),
    ]
    assert [point.name for point in front_of(points)] == ["good", "teacher"]


# ---------------------------------------------------------------- labels

COORDINATE = st.floats(0, 300)


@given(st.lists(st.tuples(COORDINATE, COORDINATE, st.floats(10, 80)), max_size=20))
def test_labels_overlap_neither_each_other_nor_a_mark_and_stay_inside(drawn):
    labels = [Label((x + 100, y + 100), width, 10) for x, y, width in drawn]
    marks = [Box(x - 4, y - 4, x + 4, y + 4) for (x, y), _, _ in labels]
    area = Box(0, 0, 500, 500)
    boxes = place(labels, area, marks)
    assert boxes is not None
    for index, box in enumerate(boxes):
        assert area.holds(box)
        assert box.x1 - box.x0 == pytest.approx(labels[index].width)
        assert not any(box.overlaps(mark) for mark in marks)
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_a_label_without_room_is_told():
    labels = [Label((10, 10), 30, 10), Label((10, 10), 30, 10)]
    assert place(labels, Box(0, 0, 40, 20), []) is None


@pytest.mark.parametrize(
    ("line", "crosses"),
    [
        (((0, 5), (20, 5)), True),
        (((5, 5), (6, 6)), True),
        (((0, 20), (20, 20)), False),
        (((0, 15), (4, 11)), False),
        (((12, 0), (12, 20)), False),
        (((0, 0), (20, 20)), True),
    ],
)
def test_lines_that_meet_a_box_are_seen(line, crosses):
    assert Box(1, 1, 10, 10).crosses(line) is crosses


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("num_students", "baselines"),
    [(1, ()), (1, ("scratch", "distill")), (3, ("scratch", "distill")), (12, ()), (20, ())],
)
def test_every_point_has_a_label_and_none_overlap(num_students, baselines):
    metrics, measured = family(num_students, baselines)
    drawn = pictures(metrics, measured, "vgg16_bn")
    assert list(drawn) == [
        "Accuracy against file size",
        "Accuracy against MACs",
        "Accuracy against latency at batch 1",
        "Accuracy against latency at batch 256",
    ]
    names = [point.name for point in points_of(metrics, "vgg16_bn", lambda _, m: m.macs)]
    assert len(names) == 1 + num_students * (1 + len(baselines)) <= MANY
    for svg in drawn.values():
        boxes = text_boxes(svg)
        labels = [boxes[name] for name in names]
        for index, box in enumerate(labels):
            assert not any(box.overlaps(other) for other in labels[:index]), names[index]


def test_of_very_many_points_the_baselines_alone_have_no_label():
    metrics, measured = family(20, ("scratch", "distill"))
    for svg in pictures(metrics, measured, "net").values():
        shown = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
        assert all(shown.count(name) == 1 for name in metrics.students)
        assert not any("from scratch" in text for text in shown)


def test_points_at_one_place_have_a_label_each():
    points = [Point(f"student-{index}", "student", 100, 0.9, 0.9) for index in range(12)]
    boxes = text_boxes(picture(points, AXIS))
    labels = [boxes[point.name] for point in points]
    assert not any(one.overlaps(two) for one in labels for two in labels if one is not two)


def test_the_alternative_text_tells_every_point():
    metrics, measured = family(2, ("scratch",))
    size, macs, first, second = pictures(metrics, measured, "net").values()
    assert "net (teacher) 15.2 MB, 93.3%" in size
    assert "sweep-2, from scratch 7.61 MB, 90.5%" in size
    assert "net (teacher) 80M, 93.3%" in macs
    assert "net (teacher) 4.1 ms" in first
    assert "sweep-2 264 ms, 92.6%" in second
    assert "sweep-2, from scratch 264 ms" in second  # a baseline is as fast as its student


def test_without_latency_there_are_pictures_of_size_and_macs_alone():
    metrics, measured = family(2)
    nothing = measured.model_copy(update={"latency": dict.fromkeys(measured.latency, ())})
    assert len(pictures(metrics, nothing, "net")) == 2


def test_names_are_no_formulas_and_no_markup():
    text = picture([Point("<b>$x_{$ & y", "student", 1, 0.9, 0.9)], AXIS)
    assert "<b>" not in text
    assert Page(text).text.count("<b>$x_{$ & y") == 1


@pytest.mark.parametrize(
    ("baselines", "expected"),
    [((), 3), (("scratch",), 4), (("scratch", "distill"), 5)],
)
def test_the_legend_has_the_marks_that_there_are(baselines, expected):
    metrics: Metrics = family(2, baselines)[0]
    assert len(keys(metrics)) == expected
    assert ("baseline distilled whole" in keys(metrics)) == ("distill" in baselines)
