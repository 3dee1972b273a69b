"""Doubles that ship with the library, for its tests and for those of its users."""

from __future__ import annotations

from collections.abc import Iterable

from pbkd.measure import Unwrapped


class ReplayedCounter:
    """An energy counter that replays a list of readings.

    Args:
        name: of the device.
        readings_j: what the device says, in joules, one per reading; an exception is raised in its
            turn (an OSError is what a meter expects of a device).
        range_j: where the device wraps to 0, joules; None: a fall means that it was reset.
        source: as the reading will state it.
        poll_interval_s: as in ``EnergyCounter``; a polled counter is read once more as polling
            begins.
    """

    def __init__(
        self,
        name: str,
        readings_j: Iterable[float | Exception],
        *,
        range_j: float | None = None,
        source: str = "replayed",
        poll_interval_s: float | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self.poll_interval_s = poll_interval_s
        self._readings = iter(readings_j)
        self._unwrapped = Unwrapped(range_j)

    def read_j(self) -> float:
        """The next reading, made monotone; AssertionError where none is left."""
        reading = next(self._readings, None)
        assert reading is not None, f"{self.name}: no reading is left"
        if isinstance(reading, Exception):
            raise reading
        return self._unwrapped.update(reading)
