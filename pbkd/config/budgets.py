"""Budgets: the limits under which a student is chosen."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pbkd.config.section import Section

Figure = Literal["parameters", "macs", "bytes", "latency"]
"""What a budget can limit; latency is in milliseconds."""

_UNITS: dict[str, float] = {
    "": 1,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "B": 1,
    "kB": 1e3,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "us": 1e-3,
    "ms": 1,
    "s": 1e3,
}
_BYTES, _TIMES, _COUNTS = (
    {"B", "kB", "KB", "MB", "GB", "KiB", "MiB", "GiB"},
    {"us", "ms", "s"},
    {"k", "M", "G"},
)
_ALLOWED: dict[Figure, set[str]] = {
    "parameters": {"", *_COUNTS},
    "macs": {"", *_COUNTS},
    "bytes": {"", *_BYTES, *_COUNTS},
    "latency": _TIMES,
}


@dataclass(frozen=True)
class Limit:
    """A limit as the user wrote it: a share of the teacher's figure, or the figure itself."""

    value: float
    is_share: bool

    def of(self, teacher: float) -> float:
        """The limit as a figure, given the teacher's."""
        return self.value * teacher if self.is_share else self.value


def parse_limit(text: float | str, figure: Figure) -> Limit:
    """Read ``0.25`` or ``25%`` (of the teacher's), ``500k``, ``1.5MB``, ``5ms``.

    Raises:
        ValueError: neither, or of another unit.
    """
    expected = {
        "parameters": "0.25, 25% or 500k",
        "macs": "0.25, 25% or 40M",
        "bytes": "0.25, 25% or 1.5MB",
        "latency": "0.5, 50% or 5ms",
    }[figure]
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(%|[A-Za-z]*)\s*", str(text))
    try:
        value = float(match[1]) if match else 0.0
    except ValueError:
        value = 0.0
    if match is None or not 0 < value < math.inf:
        raise ValueError(f"expected a limit such as {expected}")
    unit = match[2]
    if unit == "%":
        return Limit(value / 100, is_share=True)
    if not unit and value <= 1:
        return Limit(value, is_share=True)
    if unit not in _ALLOWED[figure]:
        raise ValueError(f"expected a limit of {figure}, such as {expected}")
    return Limit(value * _UNITS[unit], is_share=False)


def _checked(figure: Figure) -> BeforeValidator:
    """Before pydantic, which would take a boolean for a number."""

    def check(text: Any) -> Any:
        if text is not None:
            parse_limit(text, figure)
        return text

    return BeforeValidator(check)


MacsLimit = Annotated[float | str | None, _checked("macs")]
LatencyLimit = Annotated[float | str | None, _checked("latency")]


class StudentConfig(Section):
    """A budget: each limit a share of the teacher's figure (0.25, 25%) or absolute (500k, 5ms)."""

    max_parameters: Annotated[float | str | None, _checked("parameters")] = None
    max_macs: MacsLimit = None
    max_bytes: Annotated[float | str | None, _checked("bytes")] = Field(
        None, description="of the weights' file, before `shrink`"
    )
    max_latency: LatencyLimit = Field(
        None, description="of one batch of `stitch.latency_batch_size` images, on this machine"
    )

    @property
    def limits(self) -> dict[Figure, Limit]:
        """The limits that are set."""
        given: dict[Figure, float | str | None] = {
            "parameters": self.max_parameters,
            "macs": self.max_macs,
            "bytes": self.max_bytes,
            "latency": self.max_latency,
        }
        return {
            figure: parse_limit(text, figure) for figure, text in given.items() if text is not None
        }


class SweepConfig(Section):
    """Students along a front: limits of one figure, evenly apart on a logarithmic scale."""

    points: int = Field(5, ge=2, le=50, description="number of students; equal ones are dropped")
    along: Figure = "parameters"
