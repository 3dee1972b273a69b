"""The source `relay`: one teacher pass per batch feeds every block of the job.

The pass begins with the images, or with the cached input of a module in the middle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing

from pbkd.activations.capture import Activation, Capture
from pbkd.activations.reader import CacheSource
from pbkd.activations.resume import Resume
from pbkd.data.batches import Stream


class RelaySource:
    """Runs the teacher on each batch of the stream."""

    def __init__(self, capture: Capture, train: Stream, val: Stream, batch_size: int) -> None:
        self.capture = capture
        self.train_stream = train
        self.val_stream = val
        self.batch_size = batch_size

    def epoch(
        self, epoch: int, paths: Iterable[str], skip: int = 0
    ) -> Iterator[dict[str, Activation]]:
        """Training batches of one epoch, without the first ``skip``."""
        wanted = tuple(paths)
        for batch in self.train_stream.epoch(epoch, self.batch_size, skip):
            yield self.capture(batch.images_nchw, wanted)

    def val(self, paths: Iterable[str]) -> Iterator[dict[str, Activation]]:
        """The validation split, in order."""
        wanted = tuple(paths)
        for batch in self.val_stream.in_order(self.batch_size):
            yield self.capture(batch.images_nchw, wanted, fill_to=self.batch_size)


class ResumedSource:
    """Runs the teacher from a module in the middle on.

    Args:
        cache: holds the side "cut" of the block ``path``.
        resume: the teacher from that cut on.
    """

    def __init__(self, resume: Resume, cache: CacheSource, path: str) -> None:
        self.resume = resume
        self.cache = cache
        self.path = path

    def epoch(
        self, epoch: int, paths: Iterable[str], skip: int = 0
    ) -> Iterator[dict[str, Activation]]:
        """Training batches of one epoch, without the first ``skip``."""
        wanted = tuple(paths)
        with closing(self.cache.cut(epoch, self.path, skip)) as batches:
            for x in batches:
                yield self.resume(x, wanted)

    def val(self, paths: Iterable[str]) -> Iterator[dict[str, Activation]]:
        """The validation split, in order."""
        wanted = tuple(paths)
        with closing(self.cache.val_cut(self.path)) as batches:
            for x in batches:
                yield self.resume(x, wanted, fill_to=self.cache.batch_size)
