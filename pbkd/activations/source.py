"""What a trainee sees of its source: pairs of a block's input and output, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from pbkd.activations.capture import Activation
from pbkd.config import ActivationsConfig
from pbkd.data import Split, Stream
from pbkd.models import ModelCard


def activation_stream(
    split: Split,
    card: ModelCard,
    config: ActivationsConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> Stream:
    """The one stream as every source shows it: a teacher's augmentation, in views and chunks."""
    return Stream(
        split,
        seed=seed,
        augment=card.augment,
        views=config.views,
        chunk=config.chunk,
        device=device,
    )


class Source(Protocol):
    """Activations for the blocks of one job, in the order of the one stream."""

    def epoch(
        self, epoch: int, paths: Iterable[str], skip: int = 0
    ) -> Iterator[dict[str, Activation]]:
        """Training batches of one epoch: block path to its activation, for the given blocks.

        Args:
            skip: so many batches, of which nothing is computed or read, are left out.
        """
        ...

    def val(self, paths: Iterable[str]) -> Iterator[dict[str, Activation]]:
        """The validation split, in order and without augmentation."""
        ...
