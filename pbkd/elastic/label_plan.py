"""What elastic teachers label, and where it lies; without torch, which a board has no need of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pbkd.artifacts import Store
from pbkd.elastic.board import Chunk

if TYPE_CHECKING:
    from torch import Tensor

LABELS = "labels"
"""Kind of the store's items with the labels of a view."""


@dataclass(frozen=True)
class LabelPlan:
    """What is to be labelled, as plain values; paths are absolute, on a shared disk.

    Attributes:
        keys: of the store's items with the labels of view 0, 1, ...
        folder: of the chunks that came so far.
        num_images: of the training split.
        chunk: images of a chunk.
    """

    keys: tuple[str, ...]
    teacher: Path
    prepared: Path
    seed: int
    top: int | None
    temperature: float
    store: Path
    folder: Path
    num_images: int
    chunk: int = 256

    @property
    def num_chunks(self) -> int:
        """Chunks of a view."""
        return -(-self.num_images // self.chunk)

    @cached_property
    def _kept(self) -> set[int]:
        return set()

    def path(self, chunk: Chunk) -> Path:
        """Where the labels of a chunk lie until the view is kept."""
        view, number = chunk
        return self.folder / self.keys[view] / f"{number:06d}.safetensors"

    def is_done(self, chunk: Chunk) -> bool:
        """Whether labels of a chunk are there, in a file of its own or in the store."""
        return self.path(chunk).is_file() or self.is_kept(chunk[0])

    def is_kept(self, view: int) -> bool:
        """Whether a whole view is in the store."""
        if view not in self._kept and Store(self.store).has(LABELS, self.keys[view]):
            self._kept.add(view)
        return view in self._kept

    def rows(self, chunk: Chunk, order: Tensor) -> Tensor:
        """(B,) images of a chunk; ``order``: that of the view's first epoch."""
        _, number = chunk
        return order[number * self.chunk : (number + 1) * self.chunk]
