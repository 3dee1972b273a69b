"""CPU packages: the energy counters that Linux shows under powercap (Intel and AMD).

Source: https://docs.kernel.org/power/powercap/powercap.html. On most machines root alone may read
``energy_uj``; a package that cannot be read is absent.
"""

from __future__ import annotations

from pathlib import Path

from pbkd.measure.counter import CounterError, EnergyCounter, Unwrapped

# The smallest range in use, 65 kJ, lasts two minutes at 500 W.
_POLL_INTERVAL_S = 10.0
_J_PER_UJ = 1e-6


class RaplCounter:
    """One package: cores, caches and what else is on it, whoever uses it.

    Args:
        domain: folder with ``name``, ``energy_uj`` and ``max_energy_range_uj``.

    Raises:
        OSError: a file is missing or must not be read.
    """

    source = "RAPL package counter"
    poll_interval_s = _POLL_INTERVAL_S

    def __init__(self, domain: Path) -> None:
        self.name = f"cpu-{(domain / 'name').read_text().strip()}"
        self._energy = domain / "energy_uj"
        self._unwrapped = Unwrapped(range_j=_read_j(domain / "max_energy_range_uj"))
        self.read_j()

    def read_j(self) -> float:
        """Joules since the counter was opened; OSError where it cannot be read."""
        return self._unwrapped.update(_read_j(self._energy))


def rapl_counters(root: Path = Path("/sys/class/powercap")) -> list[EnergyCounter]:
    """A counter ``cpu-package-<n>`` per package that can be read; empty where there is none.

    Only packages: their sub-domains are counted in them, ``psys`` counts the packages again, and so
    does ``intel-rapl-mmio``.
    """
    counters: list[EnergyCounter] = []
    for domain in sorted(root.glob("intel-rapl:*")):
        try:
            counter = RaplCounter(domain)
        except OSError:
            continue
        if counter.name.startswith("cpu-package"):
            counters.append(counter)
    return counters


def _read_j(path: Path) -> float:
    text = path.read_text().strip()
    try:
        return int(text) * _J_PER_UJ
    except ValueError:
        raise CounterError(f"{path}: got {text!r}, expected microjoules") from None
