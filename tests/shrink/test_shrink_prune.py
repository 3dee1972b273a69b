"""Weights that are pruned: how many, which, when, and that they stay 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_students import (
    card_of,
    images_of,
    learner,
    reloaded,
    stitched,
    stream,
    student_of,
    trainer_of,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from pbkd.artifacts import tensors_digest
from pbkd.config import PruneStep, TuneConfig
from pbkd.errors import ShrinkError
from pbkd.models import training
from pbkd.shrink import Shrunk, Trainer, prune
from pbkd.shrink.masks import (
    is_pruned,
    masks_of_all,
    masks_per_layer,
    prunable_weights,
    sparsity,
    zero_,
)
from pbkd.shrink.prune import apply, share_at

NO_TUNE = TuneConfig(epochs=0)
TUNE = TuneConfig(epochs=4, batch_size=16, lr=0.05)  # 3 steps in an epoch


def weights(shrunk: Shrunk) -> list[Tensor]:
    return [weight.detach() for weight in prunable_weights(shrunk.model)]


def num_zeros(tensors: list[Tensor]) -> int:
    return sum(int((tensor == 0).sum()) for tensor in tensors)


def num_weights(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


# ---------------------------------------------------------------- which


def test_lamp_by_hand():
    """Scores: 1/30, 4/29, 9/25, 1; and of the tensor of large weights 100/500, 1."""
    small, large = torch.tensor([[2.0, -1.0], [-4.0, 3.0]]), torch.tensor([[20.0, -10.0]])
    kept = masks_of_all([small, large], 0.5)
    assert kept[0].tolist() == [[False, False], [True, True]]
    assert kept[1].tolist() == [[True, False]]


def test_the_largest_weight_of_every_layer_goes_last():
    torch.manual_seed(0)
    tensors = [torch.randn(20, 20) * scale for scale in (1.0, 1e-3, 100.0)]
    kept = masks_of_all(tensors, 1 - 3 / 1200)
    assert [int(mask.sum()) for mask in kept] == [1, 1, 1]
    for tensor, mask in zip(tensors, kept, strict=True):
        assert mask.flatten()[tensor.abs().argmax()]


def test_each_layer_loses_its_least_weights():
    kept = masks_per_layer([torch.tensor([3.0, -1.0, 2.0, 4.0]), torch.tensor([9.0, -8.0])], 0.5)
    assert kept[0].tolist() == [True, False, False, True]
    assert kept[1].tolist() == [True, False]


def test_of_equal_weights_the_stated_number_goes():
    assert int(masks_of_all([torch.ones(40)], 0.25)[0].sum()) == 30
    assert int(masks_per_layer([torch.ones(40)], 0.25)[0].sum()) == 30


def test_no_zero_is_negative():
    weight = torch.tensor([-1.0, 5.0])
    zero_([weight], masks_per_layer([weight], 0.5))
    assert not torch.signbit(weight).any()


def test_few_zeros_are_chance():
    weight = torch.ones(1000)
    weight[:9] = 0
    assert not is_pruned(weight)
    weight[9] = 0
    assert is_pruned(weight)


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_share_of_zeros_is_exact(scope, share, tmp_path):
    shrunk = stitched()
    found = apply(
        shrunk, PruneStep(sparsity=share, scope=scope, tune=NO_TUNE), trainer_of(tmp_path)
    )
    tensors = weights(found)
    if scope == "global":
        assert num_zeros(tensors) == round(share * num_weights(tensors))
    else:
        assert [num_zeros([t]) for t in tensors] == [round(share * t.numel()) for t in tensors]
    x = images_of(found.card)
    assert torch.equal(reloaded(found, tmp_path)(x), found.model(x))
    assert found.card.edits == ()
    assert num_zeros(weights(shrunk)) == 0  # it is left as it was
    plain = {"weight", "bias"}
    for name, module in found.model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            own = shrunk.model.get_submodule(name).state_dict()
            assert all(torch.equal(module.state_dict()[part], own[part]) for part in plain)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("ramp", [0.0, 0.3, 0.5, 1.0])
def test_the_share_of_zeros_is_exact_after_training(scope, ramp, tmp_path):
    step = PruneStep(sparsity=0.8, scope=scope, ramp=ramp, tune=TUNE)
    found = apply(learner(), step, trainer_of(tmp_path))
    tensors = weights(found)
    if scope == "global":
        assert num_zeros(tensors) == round(0.8 * num_weights(tensors))
    else:
        assert [num_zeros([t]) for t in tensors] == [round(0.8 * t.numel()) for t in tensors]
    assert not any(weight._backward_hooks for weight in prunable_weights(found.model))
    assert not any(module.training for module in found.model.modules())
    assert not torch.equal(tensors[0], weights(learner())[0])


def test_epochs_of_ramp_and_rest_are_those_of_the_step(tmp_path):
    for ramp, expected in ((0.0, (0, 4)), (0.3, (2, 2)), (0.5, (2, 2)), (1.0, (4, 0))):
        folder = tmp_path / str(ramp)
        apply(learner(), PruneStep(sparsity=0.5, ramp=ramp, tune=TUNE), trainer_of(folder))
        lines = [folder / "ramp.jsonl", folder / "tune.jsonl"]
        done = tuple(len(p.read_text().splitlines()) if p.exists() else 0 for p in lines)
        assert done == expected


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (1, 0.2168), (5, 0.7), (8, 0.7936), (10, 0.8), (99, 0.8)]
)
def test_the_cubic_schedule_by_hand(step, expected):
    assert share_at(step, 10, 0.0, 0.8) == pytest.approx(expected)


def test_the_schedule_begins_with_the_share_that_is_there():
    assert share_at(0, 10, 0.5, 0.9) == pytest.approx(0.5)
    assert share_at(5, 10, 0.5, 0.9) == pytest.approx(0.85)


class Watching(Trainer):
    """Notes the sparsity after each call before a step."""

    def fit(self, student, tune, *, on_step=lambda _: None, name="tune", **more):
        seen = SEEN.setdefault(name, [])

        def noted(step: int) -> None:
            on_step(step)
            seen.append(sparsity(prunable_weights(student)))

        return super().fit(student, tune, on_step=noted, name=name, **more)


SEEN: dict[str, list[float]] = {}


def test_the_share_rises_along_the_schedule_while_the_student_learns(tmp_path):
    SEEN.clear()
    plain = trainer_of(tmp_path)
    trainer = Watching(plain.teacher, plain.train, plain.val, tmp_path)
    apply(learner(), PruneStep(sparsity=0.8, ramp=0.7, tune=TUNE), trainer)
    total = num_weights(weights(learner()))
    # 8 of 12 steps, in 3 epochs of 3
    expected = [round(share_at(step, 8, 0.0, 0.8) * total) / total for step in range(9)]
    assert SEEN["ramp"] == pytest.approx(expected)
    assert SEEN["tune"] == pytest.approx([expected[-1]] * 3)


# ---------------------------------------------------------------- zeros that are there


def test_zeros_of_an_earlier_step_stay(tmp_path):
    first = apply(learner(), PruneStep(sparsity=0.5, tune=TUNE), trainer_of(tmp_path / "a"))
    for scope in ("global", "layer"):
        step = PruneStep(sparsity=0.9, scope=scope, tune=TUNE)
        second = apply(first, step, trainer_of(tmp_path / scope))
        for before, after in zip(weights(first), weights(second), strict=True):
            assert (after[before == 0] == 0).all()
        assert sparsity(weights(second)) >= 0.9 - 1e-3


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_as_many_zeros_as_there_are_is_an_error(scope, tmp_path):
    step = PruneStep(sparsity=0.6, scope=scope, tune=NO_TUNE)
    pruned = apply(learner(), step, trainer_of(tmp_path))
    with pytest.raises(ShrinkError, match=r"got sparsity 0\.5, but 0\.\d+ of the weights are 0"):
        apply(pruned, step.model_copy(update={"sparsity": 0.5}), trainer_of(tmp_path))


# ---------------------------------------------------------------- determinism


class Killed(BaseException):
    """Ends a training where no one catches it."""


def _after(steps: int) -> Callable[[], None]:
    left = steps

    def sign() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    return sign


def _result(folder: Path, scope: str, after_step: Callable[[], None] = lambda: None) -> str:
    trainer = replace(trainer_of(folder), after_step=after_step)
    step = PruneStep(sparsity=0.8, scope=scope, ramp=0.7, tune=TUNE)
    return tensors_digest(apply(learner(), step, trainer).model.state_dict())


def test_equal_runs_give_equal_weights(tmp_path):
    assert _result(tmp_path / "a", "global") == _result(tmp_path / "b", "global")


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("signs", [4, 6, 10, 13, 14, 17])
def test_a_killed_pruning_ends_as_one_that_was_not(scope, signs, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY_S", 0.0)
    monkeypatch.setattr(prune, "_LEAST_UPDATES", 2)  # every 4 steps, and in every epoch of 3
    expected = _result(tmp_path / "whole", scope)
    with pytest.raises(Killed):
        _result(tmp_path / "killed", scope, _after(signs))
    assert _result(tmp_path / "killed", scope) == expected


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("signs", [2, 3, 6, 7])
def test_a_pruning_killed_between_draws_ends_as_one_that_was_not(
    scope, signs, tmp_path, monkeypatch
):
    """Checkpoints after every step, masks at the first of each epoch."""
    monkeypatch.setattr(training, "_LONG_EPOCH_S", 0.0)
    monkeypatch.setattr(training, "_SAVING_SHARE", math.inf)
    monkeypatch.setattr(prune, "_LEAST_UPDATES", 2)
    expected = _result(tmp_path / "whole", scope)
    with pytest.raises(Killed):
        _result(tmp_path / "killed", scope, _after(signs))
    assert _result(tmp_path / "killed", scope) == expected


def test_the_streams_are_as_long_as_the_tests_say():
    assert sum(1 for _ in stream(0).rows(0, TUNE.batch_size)) == 3


def test_a_student_without_layers_is_told(tmp_path):
    shrunk = student_of(card_of("vgg_small"))
    shrunk.model.net = nn.Identity()
    with pytest.raises(ShrinkError, match="no convolution or linear layer"):
        prune.apply(shrunk, PruneStep(sparsity=0.5, tune=NO_TUNE), trainer_of(tmp_path))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_a_weight_that_a_parametrization_makes_is_told(norm, scope, tmp_path):
    shrunk = learner()
    norm(shrunk.model.net.classifier)
    with pytest.raises(ShrinkError, match=r"layer classifier: .*remove_parametrizations\(layer"):
        apply(shrunk, PruneStep(sparsity=0.5, scope=scope, tune=TUNE), trainer_of(tmp_path))
