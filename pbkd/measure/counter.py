"""What a device that counts energy looks like, and the arithmetic that makes its count monotone.

The devices (``nvml``, ``rapl``) stand on this file; the monitor (``energy``) reads them through it.
"""

from __future__ import annotations

from typing import Protocol


class CounterError(OSError):
    """A device's reading failed or means nothing; the meter turns it into an absent figure."""


class EnergyCounter(Protocol):
    """A device that counts the joules it has used, idle time included.

    Attributes:
        name: of the device, like ``gpu-0`` or ``cpu-package-0``; unique within a meter.
        source: how the figure is made, for the report.
        poll_interval_s: the count is right only if it is read at least this often, seconds; None
            where two readings are enough.
    """

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def poll_interval_s(self) -> float | None: ...

    def read_j(self) -> float:
        """Joules since an arbitrary start, never falling.

        Raises:
            OSError: no reading now, or the count since the last one is lost (``CounterError``).
        """
        ...


class Unwrapped:
    """A counter that wraps or is reset, made monotone.

    Args:
        range_j: the value, in joules, at which the counter begins again at 0; None where it never
            wraps. Two updates must not be further apart than one wrap.
    """

    def __init__(self, range_j: float | None) -> None:
        self._range_j = range_j
        self._last_j: float | None = None
        self._total_j = 0.0

    def update(self, raw_j: float) -> float:
        """Take the counter's value; returns joules since the first one.

        Raises:
            CounterError: the value fell and there is no known range, so the counter was reset and
                what it had counted is lost. The next update goes on from the new value.
        """
        last_j, self._last_j = self._last_j, raw_j
        if last_j is None:
            return self._total_j
        used_j = raw_j - last_j
        if used_j < 0:
            if self._range_j is None:
                raise CounterError(
                    f"energy counter fell from {last_j} J to {raw_j} J: it was reset"
                )
            used_j += self._range_j
            if used_j < 0:
                raise CounterError(f"energy counter gave {last_j} J, above its range")
        self._total_j += used_j
        return self._total_j


class PowerIntegral:
    """Energy from power samples, by trapezoids.

    Args:
        max_gap_s: samples further apart than this say nothing of the time between them, seconds.
    """

    def __init__(self, max_gap_s: float) -> None:
        self._max_gap_s = max_gap_s
        self._last: tuple[float, float] | None = None
        self._total_j = 0.0

    def update(self, time_s: float, power_w: float) -> float:
        """Take a sample (a monotone clock in seconds, watts); returns joules since the first one.

        Raises:
            CounterError: the gap since the last sample is too long. The next update goes on from
                this sample.
        """
        last, self._last = self._last, (time_s, power_w)
        if last is None:
            return self._total_j
        gap_s = time_s - last[0]
        if gap_s > self._max_gap_s:
            raise CounterError(
                f"no power sample for {gap_s:.1f} s, at most {self._max_gap_s:.1f} s are integrated"
            )
        self._total_j += gap_s * (power_w + last[1]) / 2
        return self._total_j
