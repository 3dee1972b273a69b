"""One trainee by itself: schedule, early stop, best weights, divergence, and its files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pbkd.activations import Activation
from pbkd.artifacts import load_tensors
from pbkd.config import DistillConfig, SeparableConfig
from pbkd.distill import TraineeResult, TraineeSpec
from pbkd.distill.trainee import HISTORY, RESULT, WEIGHTS, Trainee, read_history

SPEC = TraineeSpec(block="a.b", config=SeparableConfig(), seed=0, key="k", score_key="s")


def make(tmp_path: Path, num_steps: int = 100, **settings: object) -> Trainee:
    torch.manual_seed(0)
    config = DistillConfig.model_validate({"batch_size": 8, **settings})
    return Trainee(SPEC, nn.Linear(3, 2), config, num_steps, tmp_path / "progress" / "k.jsonl")


def batch(seed: int = 0) -> Activation:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, generator=generator)
    return Activation(x.half(), (x[:, :2] * 2 + 1).half())


def weights(trainee: Trainee) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainee.module.state_dict().items()}


def result_of(trainee: Trainee, folder: Path) -> TraineeResult:
    folder.mkdir()
    trainee.write(folder)
    return TraineeResult.model_validate_json((folder / RESULT).read_text())


def test_the_cosine_schedule_is_at_half_in_the_middle_and_at_0_at_the_end(tmp_path):
    epochs, steps = 4, 5
    trainee = make(tmp_path, num_steps=epochs * steps, lr=0.01, epochs=epochs, patience=99)
    trainee.end_epoch(1.0)
    for _ in range(epochs):
        for step in range(steps):
            trainee.step(batch(step))
        trainee.end_epoch(1.0)
    rates = [line.lr for line in read_history(trainee.progress)]
    expected = [0.01 * (1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(epochs + 1)]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert trainee.stopped == "epochs"


@pytest.mark.parametrize(
    ("patience", "min_improvement", "losses", "stop_epoch", "best_epoch"),
    [
        # losses begin with epoch -1
        pytest.param(2, 0.0, [1.0, 0.5, 0.5, 0.6], 2, 0, id="two epochs without a better loss"),
        pytest.param(2, 0.0, [1.0, 1.5, 1.2], 1, -1, id="never better than the inherited weights"),
        pytest.param(3, 0.0, [1.0, 0.9, 1.0, 1.0, 0.8, 1, 1, 1], 6, 3, id="a better one in time"),
        pytest.param(2, 0.1, [1.0, 0.5, 0.48, 0.47], 2, 2, id="too little counts as no better"),
        pytest.param(1, 0.0, [1.0, 0.9, 0.8, 0.7, 0.7], 3, 2, id="patience of one"),
    ],
)
def test_a_plateau_ends_training_after_patience(
    tmp_path, patience, min_improvement, losses, stop_epoch, best_epoch
):
    trainee = make(tmp_path, patience=patience, min_improvement=min_improvement, epochs=50)
    for index, loss in enumerate(losses):
        assert trainee.active, f"stopped before epoch {index - 1}"
        trainee.end_epoch(loss)
    result = result_of(trainee, tmp_path / "item")
    assert result.stopped == "plateau"
    assert f"{patience} epochs" in result.message
    assert (result.num_epochs, result.best_epoch) == (stop_epoch + 1, best_epoch)
    assert result.best_val_loss == min(losses)


def test_the_best_weights_are_kept_not_the_last(tmp_path):
    trainee = make(tmp_path, epochs=3)
    trainee.end_epoch(1.0)
    best = None
    for epoch, loss in enumerate([0.5, 0.1, 0.3]):
        trainee.step(batch(epoch))
        if loss == 0.1:
            best = weights(trainee)
        trainee.end_epoch(loss)
    assert best is not None
    assert result_of(trainee, tmp_path / "item").best_epoch == 1
    kept = load_tensors(tmp_path / "item" / WEIGHTS)
    assert all(torch.equal(kept[name], tensor) for name, tensor in best.items())
    assert not torch.equal(kept["weight"], trainee.module.weight)


def test_the_inherited_weights_are_kept_where_training_only_made_it_worse(tmp_path):
    trainee = make(tmp_path, epochs=1)
    initial = weights(trainee)
    trainee.end_epoch(0.2)
    trainee.step(batch())
    trainee.end_epoch(0.3)
    result = result_of(trainee, tmp_path / "item")
    assert (result.best_epoch, result.best_val_loss, result.initial_val_loss) == (-1, 0.2, 0.2)
    assert torch.equal(load_tensors(tmp_path / "item" / WEIGHTS)["weight"], initial["weight"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(tmp_path, bad):
    trainee = make(tmp_path, epochs=9)
    trainee.end_epoch(1.0)
    trainee.step(batch())
    good = weights(trainee)
    trainee.end_epoch(0.5)
    trainee.step(batch())
    trainee.end_epoch(bad)
    assert not trainee.active
    result = result_of(trainee, tmp_path / "item")
    assert (result.stopped, result.best_epoch, result.best_val_loss) == ("diverged", 0, 0.5)
    assert "epoch 1" in result.message
    assert "lower distill.lr" in result.message
    assert torch.equal(load_tensors(tmp_path / "item" / WEIGHTS)["weight"], good["weight"])


def test_a_huge_learning_rate_diverges_by_its_training_loss(tmp_path):
    trainee = make(tmp_path, lr=1e30, epochs=9)
    trainee.end_epoch(1.0)
    for _ in range(4):
        trainee.step(batch())
    trainee.end_epoch(0.1)  # the validation loss alone would not show it
    assert trainee.stopped == "diverged"
    assert result_of(trainee, tmp_path / "item").best_epoch == -1


def test_a_loss_that_is_not_finite_at_the_very_start_is_null_in_the_result(tmp_path):
    trainee = make(tmp_path)
    trainee.end_epoch(math.nan)
    result = result_of(trainee, tmp_path / "item")
    assert (result.stopped, result.num_epochs, result.best_epoch) == ("diverged", 0, -1)
    assert result.initial_val_loss is None
    assert result.best_val_loss is None
    assert (tmp_path / "item" / WEIGHTS).is_file()
    assert "NaN" not in (tmp_path / "item" / HISTORY).read_text()


def test_history_begins_before_the_first_step_and_holds_every_epoch(tmp_path):
    trainee = make(tmp_path, epochs=2)
    trainee.end_epoch(1.0)
    losses = []
    for epoch in range(2):
        for step in range(3):
            with torch.no_grad():
                output = trainee.module(batch(step).input.float())
                losses.append(float(trainee.loss(output, batch(step).output.float())))
            trainee.step(batch(step))
        trainee.end_epoch(0.5 - epoch / 10)
    result_of(trainee, tmp_path / "item")
    lines = [json.loads(line) for line in (tmp_path / "item" / HISTORY).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [-1, 0, 1]
    assert [line["val_loss"] for line in lines] == [1.0, 0.5, 0.4]
    assert lines[0]["train_loss"] is None
    means = [np.mean(losses[:3]), np.mean(losses[3:])]
    assert [line["train_loss"] for line in lines[1:]] == pytest.approx(means, rel=1e-5)
    assert lines[0]["time"] <= lines[1]["time"] <= lines[2]["time"]


def test_a_growing_history_is_read_up_to_its_last_whole_line(tmp_path):
    trainee = make(tmp_path)
    trainee.end_epoch(1.0)
    with trainee.progress.open("a") as file:
        file.write('{"epoch": 0, "train_lo')
    assert [line.epoch for line in read_history(trainee.progress)] == [-1]
    assert read_history(tmp_path / "none") == []


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_the_first_step_is_the_optimizers_formula(tmp_path, optimizer):
    lr, decay = 0.01, 0.1
    trainee = make(tmp_path, lr=lr, weight_decay=decay, optimizer=optimizer, loss="mse")
    w, b = (p.detach().double().numpy().copy() for p in trainee.module.parameters())
    x, t = (side.double().numpy() for side in (batch().input, batch().output))
    trainee.step(batch())
    g = 2 * (x @ w.T + b - t).T @ x / t.size
    if optimizer == "adamw":  # both moments are unbiased after one step: g / |g|
        expected = w * (1 - lr * decay) - lr * g / (np.abs(g) + 1e-8)
    else:  # weight decay joins the gradient; the average is 0.01 g^2 after one step
        g = g + decay * w
        expected = w - lr * g / (np.sqrt(0.01 * g**2) + 1e-8)
    np.testing.assert_allclose(trainee.module.weight.detach().numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_restored_trainee_goes_on_as_the_one_before(tmp_path, optimizer, steps):
    trainee = make(tmp_path / "one", optimizer=optimizer)
    trainee.end_epoch(1.0)
    for step in range(3):
        trainee.step(batch(step))
    trainee.end_epoch(0.5)
    for step in range(steps):
        trainee.step(batch(step))
    torch.save(trainee.snapshot(), tmp_path / "snapshot")
    other = make(tmp_path / "other", optimizer=optimizer)
    with torch.no_grad():
        other.module.weight.zero_()
    other.restore(torch.load(tmp_path / "snapshot", weights_only=True))
    assert (other.epoch, other.num_taken, other.lr) == (1, steps, trainee.lr)
    for both in (trainee, other):
        both.step(batch(7))
        both.end_epoch(0.7)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(trainee).items())
    assert [line.model_dump(exclude={"time"}) for line in read_history(other.progress)] == [
        line.model_dump(exclude={"time"}) for line in read_history(trainee.progress)
    ]
    for both in (trainee, other):
        result_of(both, both.progress.parent / "item")
    kept, expected = (
        load_tensors(both.progress.parent / "item" / WEIGHTS) for both in (other, trainee)
    )
    assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())


def test_validation_runs_in_evaluation_mode_and_weighs_by_images(tmp_path):
    trainee = make(tmp_path, loss="mse")
    trainee.module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    loss = trainee.batch_loss(batch())
    output = trainee.module[1](batch().input.float()).detach()
    expected = 8 * (output - batch().output.float()).square().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert not loss.requires_grad


class _FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(x, 0.5, training=self.training)
        return self.norm(self.linear(x))


def test_a_step_draws_nothing_and_trains_batch_norms(tmp_path):
    states = []
    for seed in (0, 1):
        torch.manual_seed(7)
        module = _FunctionalDropout()
        torch.manual_seed(seed)
        trainee = Trainee(SPEC, module, DistillConfig(batch_size=8), 10, tmp_path / f"{seed}.jsonl")
        trainee.step(batch())
        states.append(weights(trainee))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert states[0]["norm.num_batches_tracked"] == 1
