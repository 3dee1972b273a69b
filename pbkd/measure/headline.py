"""Which of several latencies of a model stands for all: one per batch size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Timed(Protocol):
    """How a latency was measured."""

    @property
    def batch_size(self) -> int: ...
    @property
    def median_ms(self) -> float: ...
    @property
    def device(self) -> str: ...
    @property
    def runtime(self) -> str: ...


T = TypeVar("T", bound=Timed)


def headline(entries: Iterable[T]) -> tuple[T, ...]:
    """PyTorch's latency by batch size: on the GPU where it was measured there, else with the number
    of threads that was fastest. Batch sizes are in the order in which they come."""
    chosen: dict[int, T] = {}
    for entry in entries:
        if entry.runtime != "pytorch":
            continue
        before = chosen.get(entry.batch_size)
        if before is None or _rank(entry) > _rank(before):
            chosen[entry.batch_size] = entry
    return tuple(chosen.values())


def _rank(entry: Timed) -> tuple[bool, float]:
    return entry.device != "cpu", -entry.median_ms
