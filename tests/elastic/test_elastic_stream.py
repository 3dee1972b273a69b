"""A student that reads labels as they come, by a board without Ray."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from pbkd.artifacts import Store, Workspace, load_tensors
from pbkd.data import Stream
from pbkd.elastic import chunks, stream
from pbkd.elastic.board import Board, Chunk
from pbkd.elastic.chunks import keep_view, label_chunk
from pbkd.elastic.label_plan import LABELS, LabelPlan
from pbkd.elastic.stream import LabelStream
from pbkd.errors import TrainingError
from pbkd.models import Classifier, ModelCard
from pbkd.stages.teacher import read_teacher

BATCH, CHUNK = 50, 64


class Desk:
    """A board with one teacher that labels what is wanted, a chunk per question."""

    def __init__(self, plan: LabelPlan, teacher: Classifier, train: Stream) -> None:
        self.plan, self.teacher, self.train = plan, teacher, train
        self.board = Board(plan.is_done, 10.0)
        self.is_open = True
        self.asked: list[int] = []
        self.labelled: list[Chunk] = []

    def want(
        self, student: str, chunks: Sequence[Chunk], *, wait: bool = False
    ) -> tuple[list[Chunk], int]:
        self.asked.append(len(chunks))
        self.board.want(student, chunks, 0.0)
        if self.is_open and (chunk := self.board.take("t", 0.0)) is not None:
            label_chunk(self.plan, self.teacher, self.train, self.train.order(chunk[0]), chunk)
            self.board.finish("t", chunk, 0.0)
            self.labelled.append(chunk)
        return self.board.want(student, chunks, 0.0), 1

    def leave_student(self, student: str) -> None:
        self.board.leave_student(student)

    def close(self) -> None:
        self.is_open = False


class Case:
    """A plan of two views in a finished workspace, and students of it."""

    def __init__(self, workspace: Workspace, top: int | None = None) -> None:
        self.teacher, self.card, prepared = read_teacher(workspace)
        self.teacher.eval()
        self.split = prepared.split("train")
        self.plan = LabelPlan(
            keys=("view0", "view1"),
            teacher=workspace.artifacts("teacher"),
            prepared=workspace.prepared,
            seed=0,
            top=top,
            temperature=4.0,
            store=workspace.store.root,
            folder=workspace.state / "labels",
            num_images=len(self.split),
            chunk=CHUNK,
        )
        self.desk = Desk(self.plan, self.teacher, self.stream(self.card))

    def stream(self, card: ModelCard, views: int = 2) -> Stream:
        return Stream(self.split, seed=0, augment=card.augment, views=views)

    def student(
        self, name: str = "s", *, deadline_s: float = 0.2, may_lack: bool = False
    ) -> LabelStream:
        train = self.stream(self.card)
        labels = LabelStream(self.plan, self.desk, name, train, 10, deadline_s, may_lack=may_lack)
        train.views = labels.view_of
        return labels

    def read(self, labels: LabelStream, epoch: int) -> None:
        for batch in labels.train.epoch(epoch, BATCH):
            found = labels(batch)
            assert found is not None
            with torch.no_grad():
                expected = self.teacher(batch.images_nchw)
            if self.plan.top is None:
                torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
            else:
                top = expected.topk(self.plan.top).indices
                torch.testing.assert_close(
                    found.gather(1, top), expected.gather(1, top), rtol=2e-3, atol=2e-3
                )


@pytest.fixture
def case(finished: Workspace) -> Case:
    return Case(finished)


@pytest.mark.parametrize("top", [None, 3])
def test_every_image_has_its_label_in_every_epoch(finished: Workspace, top: int | None) -> None:
    case = Case(finished, top)
    labels = case.student()
    for epoch in range(5):
        case.read(labels, epoch)
    assert len(case.desk.labelled) == len(set(case.desk.labelled)) == 2 * case.plan.num_chunks


def test_a_finished_view_is_an_item_of_the_store_and_its_chunks_are_gone(case: Case) -> None:
    case.read(case.student(), 0)
    assert Store(case.plan.store).has(LABELS, "view0")
    assert not (case.plan.folder / "view0").exists()
    assert not case.plan.is_kept(1)
    assert keep_view(case.plan, 0)
    assert not keep_view(case.plan, 1)


def test_students_that_end_a_view_at_the_same_time_keep_it_once(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = case.desk.train.order(0)
    for number in range(case.plan.num_chunks):
        label_chunk(case.plan, case.teacher, case.desk.train, order, (0, number))
    written: list[int] = []
    assembling = chunks._assembling

    def counted(*args: Any) -> Any:
        written.append(1)
        time.sleep(0.2)
        return assembling(*args)

    monkeypatch.setattr(chunks, "_assembling", counted)
    plans = [replace(case.plan) for _ in range(6)]  # each knows nothing of the others
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(lambda plan: keep_view(plan, 0), plans)) == [True] * 6
    assert written == [1]


def test_a_student_asks_for_a_bounded_number_of_chunks(case: Case) -> None:
    case.read(case.student(), 0)
    assert max(case.desk.asked) <= 16 + 2  # a window, and what a batch lies in


def test_a_second_student_reads_what_the_first_had_labelled(case: Case) -> None:
    one, other = case.student("one"), case.student("other")
    batches = list(one.train.epoch(0, BATCH))
    for batch in batches[: len(batches) // 2]:
        assert one(batch) is not None
    case.read(other, 0)  # it keeps the view while the first one is in the middle of it
    for batch in batches[len(batches) // 2 :]:
        assert one(batch) is not None
    assert len(case.desk.labelled) == case.plan.num_chunks


def test_a_student_that_comes_back_in_the_middle_reads_on(case: Case) -> None:
    first = case.student("one")
    batches = list(first.train.epoch(0, BATCH))
    for batch in batches[:5]:
        assert first(batch) is not None
    again = case.student("one")
    for batch in batches[3:]:
        assert again(batch) is not None
    assert len(case.desk.labelled) == case.plan.num_chunks


def test_a_damaged_chunk_is_labelled_again(case: Case) -> None:
    labels = case.student(deadline_s=5.0)
    path = case.plan.path((0, 0))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    case.read(labels, 0)
    assert (0, 0) in case.desk.labelled


def test_a_view_that_has_no_room_in_the_store_is_read_as_it_came(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def full(_: LabelPlan, view: int) -> bool:
        tried.append(view)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream, "keep_view", full)
    labels = case.student()
    for epoch in range(4):
        case.read(labels, epoch)
    assert tried == [0, 1, 0, 1], "once each time that a view is begun"
    assert len(case.desk.labelled) == 2 * case.plan.num_chunks


def test_a_view_that_only_another_student_could_keep_is_read_from_the_store(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream, "keep_view", full)
    labels = case.student(deadline_s=2.0)
    first, *rest = labels.train.epoch(0, BATCH)
    assert labels(first) is not None
    order = case.desk.train.order(0)
    for number in range(case.plan.num_chunks):
        label_chunk(case.plan, case.teacher, case.desk.train, order, (0, number))
    assert keep_view(case.plan, 0)
    assert all(labels(batch) is not None for batch in rest)


def test_an_error_after_the_deadline_where_labels_are_needed(case: Case) -> None:
    case.desk.is_open = False
    labels = case.student()
    with pytest.raises(TrainingError, match="look at `pbkd teachers`"):
        labels(next(labels.train.epoch(0, BATCH)))


def test_true_labels_alone_until_teachers_come_again(case: Case) -> None:
    labels = case.student(may_lack=True)
    case.read(labels, 0)
    case.desk.is_open = False
    assert labels.view_of(1) == 1, "it does not know yet"
    batches = list(labels.train.epoch(1, BATCH))
    assert [labels(batch) for batch in batches] == [None] * len(batches)
    assert labels.num_lacking == BATCH * len(batches)
    assert labels.view_of(1) == 0, "a view that is labelled instead of one that is not"
    case.read(labels, 3)  # so that this epoch has labels
    case.desk.is_open = True
    assert labels(batches[0]) is not None
    assert labels.view_of(3) == 1


def test_a_chunk_file_says_which_images_it_is_of(case: Case) -> None:
    case.desk.want("s", [(1, 2)])
    tensors = load_tensors(case.plan.path((1, 2)))
    order = case.stream(case.card).order(1)
    assert torch.equal(tensors["rows"], order[2 * CHUNK : 3 * CHUNK])
    assert tensors["logits"].dtype == torch.float16
