"""Which version fits: a pure comparison of what the registry knows with what is wanted.

The rule: of the students of the present data and teacher that are within all limits, the one with
the highest validation accuracy; of equal ones the smaller file, then the older version. Where a
least accuracy is all that is asked for: the smallest file, of equal ones the more accurate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pbkd.config import Figure, Limit
from pbkd.errors import ConfigError
from pbkd.tracking.versions import PYTORCH, TEACHER, ModelVersion, Setting

_FIGURES: Mapping[Figure, str] = {
    "parameters": "num_parameters",
    "macs": "macs",
    "bytes": "file_bytes",
}


@dataclass(frozen=True)
class Wanted:
    """What a version must keep.

    Attributes:
        limits: upper limits; a share is one of the teacher's figure.
        min_accuracy: on the validation split, 0 to 1.
        batch_size: images per batch of the latency; None: the smallest that was measured.
        threads: CPU threads of the latency; None: the GPU where it was measured there, else the
            fewest threads that were measured.
        runtime: of the latency.
    """

    limits: Mapping[Figure, Limit] = field(default_factory=dict)
    min_accuracy: float | None = None
    batch_size: int | None = None
    threads: int | None = None
    runtime: str = PYTORCH


@dataclass(frozen=True)
class Miss:
    """A limit that a version does not keep; ``value`` is None where the figure is not known."""

    figure: Figure | Literal["accuracy"]
    value: float | None
    limit: float | None

    @property
    def excess(self) -> float:
        """By how much, as a share of the limit; infinite where a figure is not known."""
        if self.value is None or self.limit is None:
            return math.inf
        return abs(self.value / self.limit - 1)


@dataclass(frozen=True)
class Entry:
    """A version, its latency here (None: not measured on this machine), and what it misses."""

    version: ModelVersion
    latency_ms: float | None
    misses: tuple[Miss, ...]


@dataclass(frozen=True)
class Comparison:
    """All students that compare, and the one that was chosen.

    Attributes:
        setting: under which the latencies were measured; None where nothing was, here.
        limits: the wanted limits as figures.
        rule: what decided among those within all limits.
        left_out: number of versions of other data or of another teacher.
    """

    students: tuple[Entry, ...]
    teacher: Entry | None
    setting: Setting | None
    limits: Mapping[Figure, float]
    chosen: Entry | None
    rule: Literal["accuracy", "bytes"]
    left_out: int

    @property
    def nearest(self) -> list[Entry]:
        """Those that miss something, nearest first: by the sum of what they miss."""
        missing = [entry for entry in self.students if entry.misses]
        return sorted(missing, key=lambda e: (sum(m.excess for m in e.misses), e.version.number))


def compare(
    versions: Sequence[ModelVersion], origin: tuple[str, str], wanted: Wanted, machine_id: str
) -> Comparison:
    """Judge every student of an origin, and choose one.

    Args:
        versions: all versions of a model, oldest first.
        origin: digests of the data and the teacher of the versions that compare.
        machine_id: the machine whose latencies count.

    Raises:
        ConfigError: a limit is a share, and the teacher's figure is not on record.
    """
    present = [version for version in versions if version.origin == origin]
    # of a teacher registered twice, the later version
    teacher = next((v for v in reversed(present) if v.student == TEACHER), None)
    here = _Here(machine_id, _setting(present, wanted, machine_id))
    limits = {
        figure: limit.of(_share_base(figure, limit, teacher, here))
        for figure, limit in wanted.limits.items()
    }
    by_size = wanted.min_accuracy is not None and not limits

    def judged(version: ModelVersion) -> Entry:
        misses = _misses(version, limits, wanted.min_accuracy, here)
        if by_size and version.figure("file_bytes") is None:
            misses.append(Miss("bytes", None, None))
        return Entry(version, here.value(version, "latency"), tuple(misses))

    students = tuple(judged(version) for version in present if version.student != TEACHER)
    fitting = [entry for entry in students if not entry.misses]
    return Comparison(
        students=students,
        teacher=judged(teacher) if teacher is not None else None,
        setting=here.setting,
        limits=limits,
        chosen=min(fitting, key=_by_size if by_size else _by_accuracy, default=None),
        rule="bytes" if by_size else "accuracy",
        left_out=len(versions) - len(present),
    )


@dataclass(frozen=True)
class _Here:
    """The machine and the setting whose latencies count."""

    machine_id: str
    setting: Setting | None

    def value(self, version: ModelVersion, figure: Figure) -> float | None:
        """What a limit is compared with; None where it is not on record, or not finite."""
        if figure != "latency":
            return version.figure(_FIGURES[figure])
        if self.setting is None or self.machine_id not in version.latency:
            return None
        value = version.latency[self.machine_id].at(self.setting)
        return value if value is not None and math.isfinite(value) else None


def _by_accuracy(entry: Entry) -> tuple[float, float, int]:
    size, accuracy, number = _by_size(entry)
    return accuracy, size, number


def _by_size(entry: Entry) -> tuple[float, float, int]:
    version = entry.version
    size, accuracy = version.figure("file_bytes"), version.figure("val_accuracy")
    assert accuracy is not None  # one without misses it
    return math.inf if size is None else size, -accuracy, version.number


def _setting(versions: Sequence[ModelVersion], wanted: Wanted, machine_id: str) -> Setting | None:
    """Of those wanted: the smallest batch; under which most students were measured here; on a GPU;
    few threads."""
    found = [
        entry.setting
        for version in versions
        if machine_id in version.latency and version.student != TEACHER
        for entry in version.latency[machine_id].entries
    ]
    allowed = [
        s
        for s in found
        if wanted.batch_size in (None, s.batch_size)
        and (wanted.threads is None or (s.device == "cpu" and s.threads == wanted.threads))
        and s.runtime == wanted.runtime
    ]
    smallest = min((s.batch_size for s in allowed), default=0)
    known = {s for s in allowed if s.batch_size == smallest}
    return min(known, key=lambda s: (-found.count(s), s.device == "cpu", s), default=None)


def _share_base(figure: Figure, limit: Limit, teacher: ModelVersion | None, here: _Here) -> float:
    """The teacher's figure; any number where the limit is no share of it."""
    if not limit.is_share:
        return math.nan
    own = here.value(teacher, figure) if teacher is not None else None
    if own is None:
        where = " on this machine" if figure == "latency" else ""
        raise ConfigError(
            f"the limit of {figure} is {limit.value:.0%} of the teacher's, which is not on "
            f"record{where}; give it as a figure, or run: pbkd evaluate, pbkd register"
        )
    return own


def _misses(
    version: ModelVersion, limits: Mapping[Figure, float], min_accuracy: float | None, here: _Here
) -> list[Miss]:
    misses = []
    accuracy = version.figure("val_accuracy")
    if accuracy is None or (min_accuracy is not None and accuracy < min_accuracy):
        misses.append(Miss("accuracy", accuracy, min_accuracy))
    for figure, limit in limits.items():
        value = here.value(version, figure)
        if value is None or value > limit:
            misses.append(Miss(figure, value, limit))
    return misses
