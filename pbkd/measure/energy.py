"""The monitor: energy of the machine's devices over a window of time. No policy.

A window's energy is the difference of two readings, so what the device draws while idle is in it,
and so is what other processes draw on it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pbkd.measure.counter import EnergyCounter
from pbkd.measure.nvml import nvml_counters
from pbkd.measure.rapl import rapl_counters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnergyReading:
    """What one window saw.

    Attributes:
        name: of the window.
        duration_s: seconds between its two readings.
        energy_j: joules per device; None where the device was not measured over the whole window.
        source: per device, how its figure is made.
    """

    name: str
    duration_s: float
    energy_j: dict[str, float | None]
    source: dict[str, str]

    @property
    def counted(self) -> tuple[str, ...]:
        """The devices that ``total_j`` counts."""
        return tuple(device for device, energy in self.energy_j.items() if energy is not None)

    @property
    def total_j(self) -> float | None:
        """Joules of the ``counted`` devices together; None where there is none."""
        measured = [energy for energy in self.energy_j.values() if energy is not None]
        return sum(measured) if measured else None


def job_energy_j(reading: EnergyReading, device: str, *, exclusive: bool) -> float | None:
    """One job's energy on its device, in joules, idle draw included.

    None unless the job had the device alone for the whole window (``exclusive``): a shared device's
    energy cannot be told apart. None also where the device was not measured.
    """
    return reading.energy_j.get(device) if exclusive else None


class EnergyWindow:
    """A window of a meter; ``result`` is there when its block has ended."""

    def __init__(self) -> None:
        self._result: EnergyReading | None = None

    @property
    def result(self) -> EnergyReading:
        """The reading of the ended window."""
        assert self._result is not None, "the window is still open; read its result after the block"
        return self._result


@dataclass(frozen=True)
class _Edge:
    """All devices at one moment; ``failures`` counts each one's failed readings so far."""

    time_s: float
    readings_j: dict[str, float | None]
    failures: dict[str, int]


class EnergyMeter:
    """Reads a set of counters at the edges of windows, and in between where a counter needs it.

    Windows may nest, and overlap between threads. While one is open, a daemon thread polls the
    counters that ask for it. A failed reading costs every window open at that time its device.

    Args:
        counters: with unique names; the meter alone reads them from now on.
    """

    def __init__(self, counters: Sequence[EnergyCounter]) -> None:
        names = [counter.name for counter in counters]
        assert len(set(names)) == len(names), f"two counters have one name: {names}"
        self._counters = tuple(counters)
        self._polled = tuple(c for c in counters if c.poll_interval_s is not None)
        self._failures = dict.fromkeys(names, 0)
        self._num_open = 0
        self._stop_polling = threading.Event()
        self._lock = threading.Lock()

    @classmethod
    def of_this_machine(cls) -> EnergyMeter:
        """A meter of every GPU and CPU package that can be read here; possibly of none."""
        return cls([*nvml_counters(), *rapl_counters()])

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices read; empty where nothing can be measured."""
        return tuple(counter.name for counter in self._counters)

    @contextmanager
    def window(self, name: str) -> Iterator[EnergyWindow]:
        """Measure the block; ``window.result`` afterwards, also where the block raised.

        A device whose count did not move gives None: the window was too short for its counter.
        """
        window = EnergyWindow()
        start = self._open()
        try:
            yield window
        finally:
            window._result = self._reading(name, start, self._close())

    def _open(self) -> _Edge:
        with self._lock:
            if self._num_open == 0:
                self._start_polling()
            self._num_open += 1
            return self._edge()

    def _close(self) -> _Edge:
        with self._lock:
            self._num_open -= 1
            if self._num_open == 0:
                self._stop_polling.set()
            return self._edge()

    def _start_polling(self) -> None:
        intervals_s = [c.poll_interval_s for c in self._polled if c.poll_interval_s is not None]
        if not intervals_s:
            return
        for counter in self._polled:
            # Not polled since the last window, it may report that time as lost; none of ours is.
            with suppress(OSError):
                counter.read_j()
        self._stop_polling = threading.Event()
        threading.Thread(
            target=self._poll,
            args=(self._stop_polling, min(intervals_s)),
            name="energy-poll",
            daemon=True,
        ).start()

    def _poll(self, stop: threading.Event, interval_s: float) -> None:
        while not stop.wait(interval_s):
            with self._lock:
                for counter in self._polled:
                    self._read_j(counter)

    def _edge(self) -> _Edge:
        time_s = time.perf_counter()
        readings_j = {counter.name: self._read_j(counter) for counter in self._counters}
        return _Edge(time_s, readings_j, dict(self._failures))

    def _read_j(self, counter: EnergyCounter) -> float | None:
        try:
            return counter.read_j()
        except OSError as error:
            if self._failures[counter.name] == 0:
                logger.warning("%s: energy not measured: %s", counter.name, error)
            self._failures[counter.name] += 1
            return None

    def _reading(self, name: str, start: _Edge, end: _Edge) -> EnergyReading:
        return EnergyReading(
            name=name,
            duration_s=end.time_s - start.time_s,
            energy_j={device: _used_j(device, start, end) for device in self.devices},
            source={counter.name: counter.source for counter in self._counters},
        )


def _used_j(device: str, start: _Edge, end: _Edge) -> float | None:
    start_j, end_j = start.readings_j[device], end.readings_j[device]
    if start_j is None or end_j is None or start.failures[device] != end.failures[device]:
        return None
    return end_j - start_j if end_j > start_j else None
