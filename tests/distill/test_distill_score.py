"""Damage against a teacher into which the candidate was put by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pbkd.blocks import build_candidate, swapped
from pbkd.blocks.candidates import replaceable_convs
from pbkd.config import AugmentConfig, DistillConfig, SeparableConfig
from pbkd.data import Stream, load_prepared
from pbkd.distill import Damage, damage_kl, score
from pbkd.distill.score import with_score_images
from pbkd.models import Classifier, NetworkSpec, build_network, load_teacher, predict
from pbkd.testing import OverwritingNet, random_split

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
    (damage,) = score(teacher, [(BLOCK, candidate)], predictions, val, 64)
    return damage


def whole_pass(teacher, path, candidate, val) -> Damage:
    """By the whole teacher with the candidate in it."""
    predictions = predict(teacher, val, batch_size=32, limit=40)
    with swapped(teacher.net, {path: candidate}):
        found = predict(teacher, val, batch_size=32, limit=40)
    return Damage(
        kl=float(damage_kl(predictions.logits_nk, found.logits_nk)),
        accuracy_drop=predictions.accuracy - found.accuracy,
        num_images=len(found.labels_n),
    )


@pytest.mark.parametrize("name", ["cifar_vgg11", "resnet18", "densenet121", "overwriting"])
def test_many_scores_at_once_are_those_of_whole_passes_bit_for_bit(name):
    torch.manual_seed(0)
    if name == "overwriting":
        net, size, channels = OverwritingNet(), 8, 1
    else:
        net, size, channels = (
            build_network(NetworkSpec(name=name, in_channels=3, num_classes=3)),
            32,
            3,
        )
    teacher = Classifier(net, (0.5,) * channels, (0.25,) * channels).eval().requires_grad_(False)
    split = random_split(50, size=size, channels=channels)
    stream = Stream(split, seed=0, augment=AugmentConfig())
    paths = replaceable_convs(net)
    candidates = []
    for path in paths[:: max(1, len(paths) // 4)]:
        block = net.get_submodule(path)
        candidates.append((path, build_candidate(SeparableConfig(), block).eval()))
        candidates.append((path, build_candidate(SeparableConfig(depth=2), block).eval()))
    predictions = predict(teacher, stream, batch_size=32, limit=40)
    found = score(teacher, candidates[::-1], predictions, stream, 32)[::-1]
    assert found == [whole_pass(teacher, path, module, stream) for path, module in candidates]


def test_a_score_runs_the_suffix_alone(teacher, candidate, val):
    sizes: list[int] = []
    first = teacher.net.get_submodule("features.0")
    predictions = predict(teacher, val, batch_size=64)
    first.register_forward_hook(lambda *args: sizes.append(len(args[-1])))
    score(teacher, [(BLOCK, candidate)] * 5, predictions, val, 64)
    num_batches = -(-len(val) // 64)
    assert sum(size > 2 for size in sizes) == num_batches, "once for all five"


@pytest.mark.parametrize(
    ("epochs", "num_train", "num_val", "images"),
    [
        (1, 45_000, 5000, 1800),
        (2, 45_000, 5000, 2000),
        (1, 5000, 5000, 250),
        (1, 5000, 200, 2000),
        (8, 1222, 216, 2000),
    ],
)
def test_short_trainings_are_scored_on_fewer_images(epochs, num_train, num_val, images):
    config = DistillConfig(epochs=epochs)
    found = with_score_images(config, num_train, num_val)
    assert found == config.model_copy(update={"score_images": images})
    fewer = DistillConfig(epochs=epochs, score_images=30)
    assert with_score_images(fewer, num_train, num_val) == fewer


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
