"""End-to-end distillation of a student."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from pbkd.config import AugmentConfig, FinetuneConfig
from pbkd.data import Stream, load_prepared
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
    student, _ = load_model(next(finished.artifacts("stitch").iterdir()))
    before = accuracy(student, streams[1])
    history = tmp_path / "history.jsonl"
    got = finetune(student, teacher, *streams, FinetuneConfig(epochs=2), history)
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert got.val_accuracy == max(line["val_accuracy"] for line in lines) > before
    assert accuracy(student, streams[1]) == got.val_accuracy
    assert (got.epochs, got.stopped, got.restarts) == (2, "epochs", 0)


def test_it_never_ends_worse_than_it_began(teacher, streams, tmp_path):
    student = copy.deepcopy(teacher).requires_grad_(True)
    before, state = accuracy(student, streams[1]), copy.deepcopy(student.state_dict())
    config = FinetuneConfig(epochs=1, lr=3.0)
    got = finetune(student, teacher, *streams, config, tmp_path / "history.jsonl")
    line = json.loads((tmp_path / "history.jsonl").read_text())
    assert line["val_accuracy"] < before  # the step did harm
    assert got.val_accuracy == before
    assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())


def test_no_epochs_change_nothing(teacher, streams, tmp_path):
    student = copy.deepcopy(teacher).requires_grad_(True)
    config = FinetuneConfig(epochs=0)
    got = finetune(student, teacher, *streams, config, tmp_path / "history.jsonl")
    assert got.val_accuracy == accuracy(teacher, streams[1])
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


@pytest.mark.parametrize("lr", [1e3, 1e8, 1e30])
def test_an_absurd_rate_ends_well(teacher, streams, tmp_path, caplog, lr):
    student = copy.deepcopy(teacher).requires_grad_(True)
    before, state = accuracy(student, streams[1]), copy.deepcopy(student.state_dict())
    config = FinetuneConfig(epochs=2, lr=lr, restarts=1)
    got = finetune(student, teacher, *streams, config, tmp_path / "history.jsonl")
    assert (got.stopped, got.restarts, got.val_accuracy) == ("diverged", 1, before)
    assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())
    assert f"beginning again at lr {lr / 4:g}" in caplog.text
    assert "no restart is left" in caplog.text


def test_a_restart_at_a_sensible_rate_learns(finished, teacher, streams, tmp_path):
    """What diverges at the first rate trains, from the stitched weights, as at the second."""
    folder = next((finished.artifacts("stitch")).iterdir())
    results = []
    for lr, restarts in ((200.0, 6), (200.0 / 4**6, 0)):
        student, _ = load_model(folder)
        config = FinetuneConfig(epochs=1, lr=lr, restarts=restarts)
        got = finetune(student, teacher, *streams, config, tmp_path / "history.jsonl")
        results.append((got, student.state_dict()))
    (first, state), (second, expected) = results
    assert first.restarts > 0 == second.restarts
    assert first.stopped == second.stopped == "epochs"
    if first.restarts == 6:
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_patience_ends_it(teacher, streams, tmp_path):
    student = copy.deepcopy(teacher).requires_grad_(True)
    config = FinetuneConfig(epochs=20, lr=1e-9, patience=2)
    got = finetune(student, teacher, *streams, config, tmp_path / "history.jsonl")
    assert got.stopped == "plateau"
    # the rise ends with epoch 4; epoch 5 is the first to count
    assert got.epochs == len((tmp_path / "history.jsonl").read_text().splitlines()) == 8
    assert got.duration_s > 0
