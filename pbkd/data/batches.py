"""The one stream: batch order and augmentation as functions of (seed, epoch, sample) alone.

Every stage that trains, and both activation sources, read images through it, so a result depends on
neither source, grouping nor number of workers.

Shapes: B images per batch, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from pbkd.config import AugmentConfig
from pbkd.data.prepare import Split
from pbkd.devices import in_channels_last
from pbkd.seeding import make_generator

_SHARE_OF_GPU = 0.25
_GRAY = 128
_PASS_PIXELS = 256 * 128 * 128
"""In a pass without gradients; with a network's first layers they take some hundred MB."""


@dataclass(frozen=True)
class _Draws:
    """What augmentation does to each of N images; None: not at all.

    Attributes:
        shifts: (N, 2) int64, rows and columns from 0 to 2 * pad.
        flips: (N,) bool.
        holes: (N, 2) int64, row and column of the erased square's centre.
    """

    shifts: Tensor | None = None
    flips: Tensor | None = None
    holes: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Images of one step.

    Attributes:
        rows: (B,) int64, positions in the split, on the CPU.
        images_nchw: (B, C, H, W) float32 in [0, 1], in channels-last strides.
        labels_n: (B,) int64.
        view: of the images; None: without augmentation.
    """

    rows: Tensor
    images_nchw: Tensor
    labels_n: Tensor
    view: int | None = None


class Stream:
    """Batches of one split on one device.

    Args:
        split: the images; they move to a GPU once if they take a small part of its free memory,
            else batch by batch. On the CPU they stay where they are: memory-mapped.
        seed: of order and augmentation.
        augment: applied to ``epoch``; never to ``in_order``.
        views: epoch e shows view ``e mod views``; None: a new view every epoch; or a function of e.
        chunk: images that stay together when the order is shuffled (a shard of the cache);
            None: all.
        device: where the batches are made.
    """

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        augment: AugmentConfig,
        views: int | Callable[[int], int] | None = None,
        chunk: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed = seed
        self.augment = augment
        self.views = views
        self.chunk = chunk or len(split)
        self.device = torch.device(device)
        self._split = split
        self._on_device = _fits(split, self.device)
        if self._on_device:
            self._images = torch.from_numpy(np.array(split.images)).to(self.device)
        self._labels = torch.from_numpy(split.labels).to(self.device)
        self._drawn: tuple[int, _Draws] | None = None

    def __len__(self) -> int:
        """Images in the split."""
        return len(self._labels)

    def pass_size(self, at_most: int) -> int:
        """Images for a pass without gradients: fewer where they are large."""
        *_, height, width = self._split.images.shape
        pixels: int = height * width
        return min(at_most, max(2, _PASS_PIXELS // pixels))

    def view_of(self, epoch: int) -> int:
        """The view that an epoch shows."""
        if callable(self.views):
            return self.views(epoch)
        return epoch if self.views is None else epoch % self.views

    def order(self, epoch: int) -> Tensor:
        """(N,) int64: a permutation of the chunks, and one within each of them."""
        generator = make_generator(self.seed, "order", epoch)
        num_chunks = -(-len(self) // self.chunk)
        parts = []
        for index in torch.randperm(num_chunks, generator=generator).tolist():
            start = index * self.chunk
            size = min(self.chunk, len(self) - start)
            parts.append(start + torch.randperm(size, generator=generator))
        return torch.cat(parts)

    def rows(self, epoch: int, batch_size: int) -> Iterator[Tensor]:
        """(B,) positions of each batch; a last, smaller batch is left out, unless it is alone."""
        order = self.order(epoch)
        batch_size = min(batch_size, len(order))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield order[start : start + batch_size]

    def epoch(self, epoch: int, batch_size: int, skip: int = 0) -> Iterator[Batch]:
        """Shuffled, augmented batches of one epoch, without the first ``skip``."""
        view = self.view_of(epoch)
        draws = self._draw(view)
        for rows in islice(self.rows(epoch, batch_size), skip, None):
            yield self._batch(rows, draws, view)

    def view(self, view: int, rows: Tensor) -> Tensor:
        """(B, C, H, W) float32: the given rows in the given view."""
        if self._drawn is None or self._drawn[0] != view:  # for the whole split at once
            self._drawn = (view, self._draw(view))
        return self._batch(rows, self._drawn[1]).images_nchw

    def plain(self, rows: Tensor) -> Tensor:
        """(B, C, H, W) float32: the given rows without augmentation."""
        return self._batch(rows, _Draws()).images_nchw

    def in_order(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches in the order of the split, without augmentation; the last may be smaller."""
        end = min(len(self), limit or len(self))
        for start in range(0, end, batch_size):
            yield self._batch(torch.arange(start, min(start + batch_size, end)), _Draws())

    def _draw(self, view: int) -> _Draws:
        shifts = flips = holes = None
        if self.augment.pad:
            generator = make_generator(self.seed, "shift", view)
            shifts = torch.randint(2 * self.augment.pad + 1, (len(self), 2), generator=generator)
        if self.augment.flip:
            generator = make_generator(self.seed, "flip", view)
            flips = torch.randint(2, (len(self),), generator=generator).bool()
        if self.augment.erase:
            generator = make_generator(self.seed, "erase", view)
            height, width = self._split.images.shape[-2:]
            centre = torch.rand((len(self), 2), generator=generator)
            holes = (centre * torch.tensor([height, width])).long()
        return _Draws(shifts, flips, holes)

    def _batch(self, rows: Tensor, draws: _Draws, view: int | None = None) -> Batch:
        on_device = rows.to(self.device)
        if self._on_device:
            images = self._images[on_device]
        else:
            images = torch.from_numpy(self._split.images[rows.numpy()]).to(self.device)
        if draws.shifts is not None:
            images = _crop(images, draws.shifts[rows].to(self.device), self.augment.pad)
        if draws.flips is not None:
            mirrored = draws.flips[rows].to(self.device)[:, None, None, None]
            images = torch.where(mirrored, images.flip(-1), images)
        if draws.holes is not None:
            images = _erase(images, draws.holes[rows].to(self.device), self.augment.erase)
        images = in_channels_last(images, torch.float32).div_(255)
        return Batch(rows, images, self._labels[on_device], view)


def _fits(split: Split, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return split.images.nbytes < _SHARE_OF_GPU * free_bytes


def _crop(images: Tensor, shifts: Tensor, pad: int) -> Tensor:
    """(B, C, H, W) cut out of images padded with zeros; ``shifts`` (B, 2) from 0 to 2 * pad."""
    batch, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    rows = torch.arange(height, device=images.device) + shifts[:, :1]
    columns = torch.arange(width, device=images.device) + shifts[:, 1:]
    index = torch.arange(batch, device=images.device)[:, None, None]
    # advanced indices around the channel slice put it last
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _erase(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """(B, C, H, W) with a gray square each, cut off at the border; ``centres`` (B, 2)."""
    height, width = images.shape[-2:]
    first = centres - side // 2
    rows = torch.arange(height, device=images.device) - first[:, :1]
    columns = torch.arange(width, device=images.device) - first[:, 1:]
    within = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[
        :, None
    ]
    return images.masked_fill(within[:, None], _GRAY)
