"""Numbers as text, with the unit that reads best."""

from __future__ import annotations


def size_text(num_bytes: float) -> str:
    """Bytes with the decimal unit that reads best, to three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{_three(num_bytes / size)} {unit}"
    return f"{num_bytes:.3g} B"


def count_text(number: float) -> str:
    """A count as 39.1M, to three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{_three(number / size)}{unit}"
    return f"{number:.3g}"


def ms_text(duration_ms: float) -> str:
    """Milliseconds to three digits."""
    return f"{_three(duration_ms)} ms"


def share_text(share: float) -> str:
    """A share in percent, to two digits where it is small."""
    return f"{100 * share:.2g}%" if 0 < share < 0.095 else f"{share:.0%}"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"
