"""What a trainee sees of its source: pairs of a block's input and output, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from pbkd.activations.capture import Activation


class Source(Protocol):
    """Activations for the blocks of one job, in the order of the one stream."""

    def epoch(self, epoch: int, paths: Iterable[str]) -> Iterator[dict[str, Activation]]:
        """Training batches of one epoch: block path to its activation, for the given blocks."""
        ...

    def val(self, paths: Iterable[str]) -> Iterator[dict[str, Activation]]:
        """The validation split, in order and without augmentation."""
        ...
