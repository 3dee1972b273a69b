"""End-to-end distillation of a student."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from pbkd.config import AugmentConfig, FinetuneConfig
from pbkd.data import Stream, load_prepared
from pbkd.errors import TrainingError
from pbkd.models import load_teacher, predict
from pbkd.students import finetune, load_model


@pytest.fixture
def teacher(finished):
    return load_teacher(finished.artifacts("teacher"))[0]


@pytest.fixture
def streams(finished) -> tuple[Stream, Stream]:
    prepared = load_prepared(finished.prepared)
    train, val = (
        Stream(prepared.split(name), seed=0, augment=AugmentConfig(pad=1))
        for name in ("train", "val")
    )
    return train, val


def accuracy(model, val: Stream) -> float:
    return predict(model, val, batch_size=256).accuracy


def test_a_stitched_student_gets_better_and_ends_with_its_best_weights(
    finished, teacher, streams, tmp_path
):
    student, _ = load_model(finished.artifacts("stitch") / "default")
    before = accuracy(student, streams[1])
    history = tmp_path / "history.jsonl"
    got = finetune(student, teacher, *streams, FinetuneConfig(epochs=2), history)
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert got == max(line["val_accuracy"] for line in lines) > before
    assert accuracy(student, streams[1]) == got


def test_it_never_ends_worse_than_it_began(teacher, streams, tmp_path):
    student = copy.deepcopy(teacher).requires_grad_(True)
    before, state = accuracy(student, streams[1]), copy.deepcopy(student.state_dict())
    config = FinetuneConfig(epochs=1, lr=3.0)
    got = finetune(student, teacher, *streams, config, tmp_path / "history.jsonl")
    line = json.loads((tmp_path / "history.jsonl").read_text())
    assert line["val_accuracy"] < before  # the step did harm
    assert got == before
    assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())


def test_no_epochs_change_nothing(teacher, streams, tmp_path):
    student = copy.deepcopy(teacher).requires_grad_(True)
    config = FinetuneConfig(epochs=0)
    got = finetune(student, teacher, *streams, config, tmp_path / "history.jsonl")
    assert got == accuracy(teacher, streams[1])
    assert torch.equal(student.net.classifier.weight, teacher.net.classifier.weight)


def test_the_teacher_is_left_as_it_was(teacher, streams, tmp_path):
    student = copy.deepcopy(teacher).requires_grad_(True)
    before = copy.deepcopy(teacher.state_dict())
    finetune(student, teacher, *streams, FinetuneConfig(epochs=1), tmp_path / "history.jsonl")
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_student_equal_to_its_teacher_has_a_loss_of_0_without_labels(teacher, streams, tmp_path):
    student = copy.deepcopy(teacher).requires_grad_(True)
    for module in student.modules():
        module.train = lambda mode=True, module=module: module  # batch norm as the teacher's
    config = FinetuneConfig(epochs=1, lr=1e-9, label_weight=0.0)
    finetune(student, teacher, *streams, config, tmp_path / "history.jsonl")
    line = json.loads((tmp_path / "history.jsonl").read_text())
    assert line["train_loss"] == pytest.approx(0, abs=1e-5)


def test_a_loss_that_is_not_finite_names_the_setting(teacher, streams, tmp_path):
    student = copy.deepcopy(teacher).requires_grad_(True)
    config = FinetuneConfig(epochs=1, lr=1e30)
    with pytest.raises(TrainingError, match=r"lower `lr`"):
        finetune(student, teacher, *streams, config, tmp_path / "history.jsonl")
