"""The source `relay`: one teacher pass per batch feeds every block of the job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pbkd.activations.capture import Activation, Capture
from pbkd.data.batches import Stream


class RelaySource:
    """Runs the teacher on each batch of the stream."""

    def __init__(self, capture: Capture, train: Stream, val: Stream, batch_size: int) -> None:
        self.capture = capture
        self.train_stream = train
        self.val_stream = val
        self.batch_size = batch_size

    def epoch(self, epoch: int, paths: Iterable[str]) -> Iterator[dict[str, Activation]]:
        """Training batches of one epoch."""
        wanted = tuple(paths)
        for batch in self.train_stream.epoch(epoch, self.batch_size):
            yield self.capture(batch.images_nchw, wanted)

    def val(self, paths: Iterable[str]) -> Iterator[dict[str, Activation]]:
        """The validation split, in order."""
        wanted = tuple(paths)
        for batch in self.val_stream.in_order(self.batch_size):
            yield self.capture(batch.images_nchw, wanted, fill_to=self.batch_size)
