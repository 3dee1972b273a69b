"""Damage against a teacher into which the candidate was put by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pbkd.blocks import build_candidate
from pbkd.config import AugmentConfig, SeparableConfig
from pbkd.data import Stream, load_prepared
from pbkd.distill import Damage, damage_kl, score
from pbkd.models import load_teacher, predict

BLOCK = "features.7"


@pytest.fixture
def teacher(finished):
    return load_teacher(finished.artifacts("teacher"))[0]


@pytest.fixture
def val(finished) -> Stream:
    split = load_prepared(finished.prepared).split("val")
    return Stream(split, seed=0, augment=AugmentConfig())


@pytest.fixture
def candidate(teacher) -> nn.Module:
    torch.manual_seed(3)
    return build_candidate(SeparableConfig(), teacher.net.get_submodule(BLOCK)).eval()


def score_of(teacher, candidate, val, limit=None) -> Damage:
    predictions = predict(teacher, val, batch_size=64, limit=limit)
    return score(teacher, BLOCK, candidate, predictions, val, 64)


@pytest.mark.parametrize("limit", [None, 30])
def test_the_score_is_that_of_a_model_swapped_by_hand(teacher, candidate, val, limit):
    by_hand = copy.deepcopy(teacher)
    by_hand.net.set_submodule(BLOCK, candidate)
    rows = torch.arange(limit or len(val))
    labels = torch.from_numpy(load_labels(val))[rows]
    with torch.no_grad():
        logits, teacher_logits = (model(val.plain(rows)) for model in (by_hand, teacher))

    def accuracy(x: torch.Tensor) -> float:
        return float((x.argmax(1) == labels).float().mean())

    damage = score_of(teacher, candidate, val, limit)
    assert damage.num_images == len(rows)
    assert damage.kl == pytest.approx(float(damage_kl(teacher_logits, logits)), rel=1e-4)
    assert damage.accuracy_drop == pytest.approx(accuracy(teacher_logits) - accuracy(logits))
    assert damage.accuracy_drop > 0.1  # random weights do harm


def load_labels(val: Stream):
    return torch.cat([batch.labels_n for batch in val.in_order(64)]).numpy()


def test_the_teacher_is_as_before_also_after_a_failure(teacher, candidate, val):
    block = teacher.net.get_submodule(BLOCK)
    before = predict(teacher, val, batch_size=64).logits_nk
    score_of(teacher, candidate, val)
    with pytest.raises(RuntimeError):
        score_of(teacher, nn.Conv2d(1, 1, 1), val)
    assert teacher.net.get_submodule(BLOCK) is block
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(predict(teacher, val, batch_size=64).logits_nk, before)


def test_a_candidate_equal_to_the_block_does_no_damage_at_all(teacher, val):
    same = copy.deepcopy(teacher.net.get_submodule(BLOCK))
    assert score_of(teacher, same, val) == Damage(kl=0.0, accuracy_drop=0.0, num_images=len(val))


def test_a_damage_that_is_not_finite_is_null(teacher, candidate, val):
    with torch.no_grad():
        candidate.get_parameter("pointwise0.weight").fill_(torch.nan)
    assert score_of(teacher, candidate, val).kl is None
