"""A student's side of elastic teachers: it reads labels as they come, and goes on without them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pbkd.artifacts import Store
from pbkd.data.batches import Batch, Stream
from pbkd.elastic.board import Chunk
from pbkd.elastic.chunks import keep_view, read_chunk
from pbkd.elastic.label_plan import LABELS, LabelPlan
from pbkd.elastic.soft_labels import SoftLabels, logits_of
from pbkd.errors import ArtifactError, TrainingError

_log = logging.getLogger(__name__)

WINDOW = 4
"""Chunks per teacher that a student asks for ahead: a slow one holds up the first of them."""
_MIN_WINDOW, _MAX_WINDOW = 16, 128


class LabelBoard(Protocol):
    """What a student needs of the board, wherever it is."""

    def want(self, student: str, chunks: Sequence[Chunk], *, wait: bool) -> tuple[list[Chunk], int]:
        """Of the chunks to read next those that are done, and the number of teachers.

        Args:
            wait: for the first one, for a moment.
        """
        ...

    def leave_student(self, student: str) -> None:
        """The student reads no more."""
        ...

    def close(self) -> None:
        """Nobody asks by this way any more."""
        ...


class LabelStream:
    """The teacher's logits for batches of a stream, from teachers that come and go.

    Args:
        student: a name of its own.
        train: the stream whose batches are asked for, with as many views as the plan.
        deadline_s: how long no label may come before the student goes on without; of a view that
            is shown next it takes a kept one instead, of the rest of an epoch see ``may_lack``.
        may_lack: go on with true labels alone; else it is an error.
    """

    def __init__(
        self,
        plan: LabelPlan,
        board: LabelBoard,
        student: str,
        train: Stream,
        num_classes: int,
        deadline_s: float,
        *,
        may_lack: bool,
    ) -> None:
        self.plan, self.board, self.student, self.train = plan, board, student, train
        self.num_classes, self.deadline_s, self.may_lack = num_classes, deadline_s, may_lack
        self.num_lacking = 0
        """Images that were trained on without a label of the teacher."""
        self._soft = SoftLabels(
            [Store(plan.store).path(LABELS, key) for key in plan.keys],
            num_classes,
            plan.temperature,
            train.device,
        )
        self._view: int | None = None
        self._is_kept = False
        self._can_keep = True
        self._place = torch.empty(0, dtype=torch.long)  # of an image in the order of its view
        self._asked = -1  # the last chunk at which the next ones were asked for
        self._window = _MIN_WINDOW
        self._last_label_s = time.monotonic()
        self._is_alone = False

    def view_of(self, epoch: int) -> int:
        """The view that an epoch shows: a kept one if no label came for the deadline."""
        view = epoch % len(self.plan.keys)
        if not self._is_alone or self.plan.is_kept(view):
            return view
        kept = [other for other in range(len(self.plan.keys)) if self.plan.is_kept(other)]
        if not kept:
            return view
        shown = kept[epoch % len(kept)]
        _log.warning("no teacher: epoch %d shows view %d, which is labelled", epoch, shown)
        return shown

    def __call__(self, batch: Batch) -> Tensor | None:
        """(B, K) float32 logits on the device; None: no teacher is there, and none is needed.

        Raises:
            TrainingError: no label came for the deadline.
        """
        assert batch.view is not None, "images without augmentation have no labels"
        if batch.view != self._view:
            self._begin(batch.view)
        if self._reads_store():
            return self._soft(batch)
        needed = sorted(set((self._place[batch.rows] // self.plan.chunk).tolist()))
        while missing := [number for number in needed if number not in self._known]:
            if self._ask(missing):
                continue
            if time.monotonic() - self._last_label_s > self.deadline_s:
                self._lack(batch)
                return None
        if needed[-1] > self._asked:
            self._asked = needed[-1]
            self._ask([])
        if self._reads_store():  # another student has kept the view meanwhile
            return self._soft(batch)
        kept = {name: values[batch.rows] for name, values in self._table.items()}
        if len(self._known) == self.plan.num_chunks:
            self._is_kept = self._keep(batch.view)
        on_device = {name: values.to(self.train.device) for name, values in kept.items()}
        return logits_of(on_device, self.num_classes, self.plan.temperature)

    def rest(self) -> None:
        """Tell the board that nothing is read for now."""
        self.board.leave_student(self.student)

    def close(self) -> None:
        """Tell the board that nothing is read any more, and leave it."""
        self._end()
        self.rest()
        self.board.close()

    def _reads_store(self) -> bool:
        """Whether the view is an item of the store by now; asking for chunks may find that out."""
        return self._is_kept

    def _begin(self, view: int) -> None:
        self._end()
        self._view = view
        self._can_keep = True
        self._is_kept = self._keep(view)
        self._asked = -1
        self._known: set[int] = set()
        self._table: dict[str, Tensor] = {}
        order = self.train.order(view)  # that of the first epoch that shows the view
        self._place = torch.empty_like(order)
        self._place[order] = torch.arange(len(order))
        if not self._is_alone:
            self._last_label_s = time.monotonic()

    def _end(self) -> None:
        """Leave a view; its last chunk may have come after its last whole batch."""
        if self._view is not None and not self._is_kept:
            self._keep(self._view)

    def _keep(self, view: int) -> bool:
        """Put a whole view into the store; one that has no room there is read as it came."""
        if self._can_keep:
            try:
                return keep_view(self.plan, view)
            except OSError as error:
                self._can_keep = False
                _log.warning("the labels of view %d are not kept: %s", view, error)
        return self.plan.is_kept(view)  # another student may have found room

    def _ask(self, missing: list[int]) -> bool:
        """Say what is needed now and next, and read what is there; returns whether any was."""
        assert self._view is not None
        begin = missing[-1] + 1 if missing else max(self._known, default=-1) + 1
        ahead = range(begin, min(begin + self._window, self.plan.num_chunks))
        wanted = [
            (self._view, number)
            for number in [*missing, *(n for n in ahead if n not in self._known)]
        ]
        if not wanted:
            return False
        wait = bool(missing) and not self._is_alone
        done, num_teachers = self.board.want(self.student, wanted, wait=wait)
        self._window = min(max(_MIN_WINDOW, WINDOW * num_teachers), _MAX_WINDOW)
        read = [chunk for chunk in done if self._read(chunk)]
        if read:
            self._last_label_s, self._is_alone = time.monotonic(), False
        return bool(read)

    def _read(self, chunk: Chunk) -> bool:
        try:
            rows, tensors = read_chunk(self.plan, chunk)
        except ArtifactError as error:
            if self._keep(chunk[0]):  # another student has kept the view meanwhile
                self._is_kept = True
                self._known = set(range(self.plan.num_chunks))
                self._table = {}
                return True
            _log.warning("labels of chunk %s are made again: %s", chunk, error)
            self.plan.path(chunk).unlink(missing_ok=True)
            return False
        for name, values in tensors.items():
            if name not in self._table:
                shape = (self.plan.num_images, *values.shape[1:])
                self._table[name] = torch.zeros(shape, dtype=values.dtype)
            self._table[name][rows] = values
        self._known.add(chunk[1])
        return True

    def _lack(self, batch: Batch) -> None:
        if not self.may_lack:
            raise TrainingError(
                f"no label of the teacher came for {self.deadline_s:g} s; look at `pbkd teachers`, "
                "and run again: finished labels are kept"
            )
        if not self._is_alone:
            _log.warning("no label came for %g s: true labels alone", self.deadline_s)
        self._is_alone = True
        self.num_lacking += len(batch.rows)
