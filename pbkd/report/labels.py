"""Where a picture's labels go, so that none hides another one or a mark: plain geometry.

Lengths are in points, y grows upwards. Each label takes the free place that is nearest to its own
mark and that crosses the fewest lines (as most label placements do: Christensen, Marks and Shieber,
ACM Transactions on Graphics 14(3), 1995).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Place = tuple[float, float]
Line = tuple[Place, Place]

_GAPS = (4.0, 7.0, 11.0, 16.0, 22.0, 30.0, 40.0, 52.0, 66.0, 84.0, 106.0, 132.0, 164.0, 204.0)
_ANGLES = (90, 270, 0, 180, 45, 315, 135, 225, 67, 293, 113, 247, 22, 338, 158, 202)
"""Degrees, the better place first: above, below, right, left, then between them."""
_CROSSING = 12.0
"""What a crossed line costs, in points of distance."""
_COVERING = 30.0
"""What a leader over another mark costs, in points of distance."""
_NEARER = 8.0
"""What it costs that a label is nearer to another mark than to its own, in points of distance."""
_ANGLE = 0.15
"""What a later angle costs, in points of distance."""


class Box(NamedTuple):
    """A rectangle along the axes."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlaps(self, other: Box) -> bool:
        """Whether they share an area."""
        return (
            self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1
        )

    def holds(self, other: Box) -> bool:
        """Whether the other one is inside."""
        return (
            self.x0 <= other.x0
            and self.y0 <= other.y0
            and other.x1 <= self.x1
            and other.y1 <= self.y1
        )

    def distance(self, place: Place) -> float:
        """From a point to the nearest of the rectangle; 0 inside."""
        x, y = place
        return math.hypot(max(self.x0 - x, 0, x - self.x1), max(self.y0 - y, 0, y - self.y1))

    @property
    def centre(self) -> Place:
        """Its middle."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def crosses(self, line: Line) -> bool:
        """Whether a straight line meets the rectangle (Liang and Barsky's clipping)."""
        (ax, ay), (bx, by) = line
        dx, dy = bx - ax, by - ay
        enter, leave = 0.0, 1.0
        sides = (
            (-dx, ax - self.x0),
            (dx, self.x1 - ax),
            (-dy, ay - self.y0),
            (dy, self.y1 - ay),
        )
        for p, q in sides:
            if p == 0:
                if q < 0:
                    return False
            elif p < 0:
                enter = max(enter, q / p)
            else:
                leave = min(leave, q / p)
        return enter < leave


class Label(NamedTuple):
    """A text of some size that belongs to a point."""

    point: Place
    width: float
    height: float

    def boxes(self) -> Iterator[tuple[float, Box]]:
        """Places around the point, nearest first, each with its cost."""
        x, y = self.point
        for gap in _GAPS:
            for rank, degrees in enumerate(_ANGLES):
                angle = math.radians(degrees)
                cx = x + math.cos(angle) * (self.width / 2 + gap)
                cy = y + math.sin(angle) * (self.height / 2 + gap)
                box = Box(
                    cx - self.width / 2,
                    cy - self.height / 2,
                    cx + self.width / 2,
                    cy + self.height / 2,
                )
                yield gap + _ANGLE * rank, box

    def leader(self, box: Box) -> Line:
        """The shortest line from the point to its text."""
        x, y = self.point
        return self.point, (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))


def place(
    labels: Sequence[Label], area: Box, marks: Sequence[Box], lines: Sequence[Line] = ()
) -> list[Box] | None:
    """A box per label: in the area, off all marks, off all other labels.

    Args:
        lines: crossed where nothing better is near.

    Returns:
        None where some label finds no place.
    """
    boxes: dict[int, Box] = {}
    crossed = list(lines)
    for index in _most_crowded_first(labels):
        label = labels[index]
        others = [mark for mark in marks if mark.distance(label.point) > 0]
        taken = [*marks, *boxes.values()]
        best: tuple[float, Box] | None = None
        for near, box in label.boxes():
            if best is not None and near >= best[0]:
                continue
            if not area.holds(box) or any(box.overlaps(other) for other in taken):
                continue
            leader, reach = label.leader(box), box.distance(label.point)
            cost = near
            cost += _CROSSING * sum(box.crosses(line) for line in crossed)
            cost += _CROSSING * sum(other.crosses(leader) for other in boxes.values())
            cost += _COVERING * sum(mark.crosses(leader) for mark in others)
            cost += _NEARER * any(box.distance(mark.centre) < reach for mark in others)
            if best is None or cost < best[0]:
                best = cost, box
        if best is None:
            return None
        boxes[index] = best[1]
        crossed.append(label.leader(best[1]))
    return [boxes[index] for index in range(len(labels))]


def _most_crowded_first(labels: Sequence[Label]) -> list[int]:
    """Labels with many others near them choose first; equal ones by their order."""

    def neighbours(label: Label) -> int:
        x, y = label.point
        return sum(
            abs(x - other.point[0]) < label.width and abs(y - other.point[1]) < 3 * label.height
            for other in labels
        )

    return sorted(range(len(labels)), key=lambda index: -neighbours(labels[index]))
