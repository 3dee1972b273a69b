"""The end-to-end training loop, and prediction."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbkd.config import AugmentConfig
from pbkd.data import Batch, Split, Stream
from pbkd.errors import TrainingError
from pbkd.models import fit, predict
from pbkd.models.guard import Guard, Watch
from pbkd.models.recipe import Recipe
from pbkd.models.run import Fitted, Loss, Run
from pbkd.models.training import fit_guarded
from pbkd.testing import random_split

NUM = 24


def _stream(seed: int = 0) -> Stream:
    """Two classes, told apart by the brightness of the upper half."""
    noise = random_split(NUM, num_classes=2, seed=seed)
    images = noise.images // 2
    images[:, :, :4] += (noise.labels * 127).astype(np.uint8)[:, None, None, None]
    return Stream(Split(images, noise.labels), seed=0, augment=AugmentConfig())


def _linear(scale: float = 0.0) -> nn.Module:
    """A linear model; at ``scale`` 1 it knows the answer."""
    layer = nn.Linear(64, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[1, :32] = scale
        layer.bias[1] = -scale * 32 * 0.5
    return nn.Sequential(nn.Flatten(), layer)


def _learn(batch: Batch, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, batch.labels_n)


def _unlearn(batch: Batch, logits: Tensor) -> Tensor:
    """Lower the logits of the labels, at a constant rate."""
    return (logits.gather(1, batch.labels_n[:, None])[:, 0] - logits.mean(1)).mean()


def _fit(
    model: nn.Module,
    loss: Loss,
    history: Path,
    *,
    epochs: int = 3,
    batch_size: int = 8,
    lr: float = 0.5,
) -> float:
    return fit(
        model,
        _stream(),
        _stream(seed=1),
        loss,
        Recipe(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=0.0),
        history=history,
    )


def _accuracies(history: Path) -> list[float]:
    return [json.loads(line)["val_accuracy"] for line in history.read_text().splitlines()]


def test_training_learns(tmp_path: Path) -> None:
    model = _linear()
    assert predict(model, _stream(seed=1), batch_size=5).accuracy == 0.5
    assert _fit(model, _learn, tmp_path / "history.jsonl") == 1.0
    assert predict(model, _stream(seed=1), batch_size=5).accuracy == 1.0
    assert not model.training


def test_training_in_bfloat16_learns_and_keeps_float32_weights(tmp_path: Path) -> None:
    model = _linear()
    recipe = Recipe(epochs=3, batch_size=8, lr=0.5, weight_decay=0.0, mixed_precision="always")
    seen = []
    model[1].register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
    history = tmp_path / "history.jsonl"
    assert fit(model, _stream(), _stream(seed=1), _learn, recipe, history=history) == 1.0
    assert set(seen) == {torch.bfloat16, torch.float32}  # in steps, and on the validation split
    assert all(weights.dtype == torch.float32 for weights in model.parameters())


def test_the_first_weights_are_kept_where_every_epoch_is_worse(tmp_path: Path) -> None:
    model = _linear(scale=1.0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    kept = _fit(model, _unlearn, tmp_path / "history.jsonl", lr=1.0)
    assert max(_accuracies(tmp_path / "history.jsonl")) < kept == 1.0
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_the_weights_of_the_best_epoch_are_kept(tmp_path: Path) -> None:
    steps_per_epoch, steps = NUM // 8, 0
    good_epochs = 4

    def learn_then_unlearn(batch: Batch, logits: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return (_learn if steps <= good_epochs * steps_per_epoch else _unlearn)(batch, logits)

    model = _linear()
    kept = _fit(model, learn_then_unlearn, tmp_path / "history.jsonl", epochs=8)
    accuracies = _accuracies(tmp_path / "history.jsonl")
    assert kept == max(accuracies[:good_epochs]) > max(0.5, *accuracies[good_epochs:])
    assert predict(model, _stream(seed=1), batch_size=5).accuracy == kept


def test_of_equally_good_weights_the_last_are_kept(tmp_path: Path) -> None:
    models = []
    for epochs in (0, 1, 2):
        torch.manual_seed(0)
        models.append(_linear(scale=1.0))
        assert _fit(models[-1], _learn, tmp_path / "history.jsonl", epochs=epochs, lr=1e-3) == 1.0
    weights = [model.get_parameter("1.weight") for model in models]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_no_epochs_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = _linear(scale=1.0)
    assert _fit(model, _learn, tmp_path / "history.jsonl", epochs=0) == 1.0
    assert (tmp_path / "history.jsonl").read_text() == ""
    assert torch.equal(model.get_parameter("1.weight"), _linear(1.0).get_parameter("1.weight"))


def test_history_has_a_line_per_epoch_with_the_mean_loss(tmp_path: Path) -> None:
    losses = []

    def recorded(batch: Batch, logits: Tensor) -> Tensor:
        loss = _learn(batch, logits)
        losses.append(loss.item())
        return loss

    path = tmp_path / "history.jsonl"
    path.write_text("of an earlier run\n")
    _fit(_linear(), recorded, path, epochs=2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [line["train_loss"] for line in lines] == pytest.approx(means)
    assert all(0 <= line["val_accuracy"] <= 1 for line in lines)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path, value: float) -> None:
    def diverge(batch: Batch, logits: Tensor) -> Tensor:
        return logits.sum() * value + value

    with pytest.raises(TrainingError, match=r"epoch 0: the training loss is .*lower `lr`"):
        _fit(_linear(), diverge, tmp_path / "history.jsonl")
    assert (tmp_path / "history.jsonl").read_text() == ""


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("batch_size", [NUM // 4, NUM // 3, NUM // 2, NUM])
def test_the_shortest_trainings_run(tmp_path: Path, epochs: int, batch_size: int) -> None:
    model = _linear()
    _fit(model, _learn, tmp_path / "history.jsonl", epochs=epochs, batch_size=batch_size)
    assert len(_accuracies(tmp_path / "history.jsonl")) == epochs


def test_training_is_repeatable(tmp_path: Path) -> None:
    models = [_linear(), _linear()]
    for model in models:
        _fit(model, _learn, tmp_path / "history.jsonl")
    first, second = (model.get_parameter("1.weight") for model in models)
    assert torch.equal(first, second)


# ---------------------------------------------------------------- guarded


def _guarded(model: nn.Module, loss: Loss, history: Path, guard: Guard, **recipe: object) -> Fitted:
    settings = {"epochs": 8, "batch_size": 8, "lr": 0.5, "weight_decay": 0.0} | recipe
    return fit_guarded(
        model,
        _stream(),
        _stream(seed=1),
        loss,
        Recipe(**settings),  # type: ignore[arg-type]
        guard,
        history=history,
    )


def _spoilt_after(steps: int, spoil: Loss) -> Loss:
    """Learns; from step number ``steps`` on, does something else."""
    done = 0

    def loss(batch: Batch, logits: Tensor) -> Tensor:
        nonlocal done
        done += logits.requires_grad
        return (_learn if done <= steps else spoil)(batch, logits)

    return loss


def test_without_trouble_the_guard_changes_nothing(tmp_path: Path) -> None:
    plain, guarded = _linear(), _linear()
    accuracy = _fit(plain, _learn, tmp_path / "a.jsonl", epochs=4)
    got = _guarded(guarded, _learn, tmp_path / "b.jsonl", Guard(patience=4, restarts=2), epochs=4)
    assert (got.val_accuracy, got.epochs, got.stopped, got.restarts) == (accuracy, 4, "epochs", 0)
    assert torch.equal(plain.get_parameter("1.weight"), guarded.get_parameter("1.weight"))
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize(("schedule", "risen"), [("one_cycle", 4), ("cosine", 0)])
def test_patience_counts_epochs_after_the_rise_and_among_themselves(
    tmp_path: Path, patience: int, schedule: str, risen: int
) -> None:
    """The start is better than every epoch, and is of no account."""
    guard = Guard(patience=patience)
    model = _linear(scale=1.0)
    path = tmp_path / "history.jsonl"

    def idle(batch: Batch, logits: Tensor) -> Tensor:
        return logits.sum() * 0 + 1

    got = _guarded(model, idle, path, guard, epochs=16, schedule=schedule)
    assert (got.stopped, got.epochs) == ("plateau", risen + 1 + patience)


def test_a_better_epoch_renews_the_patience() -> None:
    watch = Watch(start_accuracy=0.9)
    accuracies = [0.5, 0.5, 0.6, 0.6, 0.55, 0.61, 0.61, 0.6, 0.61]
    stops = [watch.is_plateau(accuracy, patience=3) for accuracy in accuracies]
    assert stops == [False] * 8 + [True]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_loss_out_of_bounds_begins_again_at_a_quarter_of_the_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    def spoil(batch: Batch, logits: Tensor) -> Tensor:
        return _learn(batch, logits) * 0 + value

    path = tmp_path / "history.jsonl"
    model, expected = _linear(), _linear()
    done = 0

    def loss(batch: Batch, logits: Tensor) -> Tensor:
        nonlocal done
        done += logits.requires_grad
        return (spoil if done in (5, 6) else _learn)(batch, logits)

    got = _guarded(model, loss, path, Guard(restarts=1), lr=0.02)
    assert (got.stopped, got.restarts, got.epochs) == ("epochs", 1, 1 + 8)
    _guarded(expected, _learn, tmp_path / "b.jsonl", Guard(), lr=0.02 / 4)
    assert torch.equal(model.get_parameter("1.weight"), expected.get_parameter("1.weight"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["restarts"] for line in lines] == [0] + [1] * 8
    assert [line["epoch"] for line in lines] == [0, *range(8)]
    assert "beginning again at lr 0.005" in caplog.text


def test_a_collapse_of_the_accuracy_is_a_divergence_once_the_rate_has_risen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = _linear(scale=1.0)

    def turned(batch: Batch, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, 1 - batch.labels_n)

    got = _guarded(model, turned, tmp_path / "history.jsonl", Guard(restarts=0), lr=0.5)
    assert (got.val_accuracy, got.stopped) == (1.0, "diverged")
    assert len(_accuracies(tmp_path / "history.jsonl")) == 2  # of the rise
    assert "epoch 2: the validation accuracy is 0.1667, below 0.5 times the 1.0000" in caplog.text
    assert torch.equal(model.get_parameter("1.weight"), _linear(1.0).get_parameter("1.weight"))


def test_the_best_weights_of_before_the_divergence_are_kept(tmp_path: Path) -> None:
    def spoil(batch: Batch, logits: Tensor) -> Tensor:
        return logits.sum() * float("nan")

    path = tmp_path / "history.jsonl"
    got = _guarded(_linear(), _spoilt_after(10, spoil), path, Guard(restarts=1))
    assert (got.stopped, got.restarts) == ("diverged", 1)
    assert got.val_accuracy == max(_accuracies(path)) > 0.5


def test_weights_that_give_no_number_are_never_kept(tmp_path: Path) -> None:
    """Of a NaN, argmax makes a class, which may be the right one as often as the start's."""

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            logits = torch.zeros(len(x), 2) + self.weight
            return logits if self.training else logits / (self.weight == 0)

    model = Fragile()
    got = _guarded(model, _learn, tmp_path / "history.jsonl", Guard(restarts=1))
    assert got.stopped == "diverged"
    assert torch.equal(model.weight, torch.zeros(2))


def test_a_training_may_be_as_long_as_the_clock_says(tmp_path: Path) -> None:
    rates = []

    def slow(batch: Batch, logits: Tensor) -> Tensor:
        if logits.requires_grad:
            time.sleep(0.02)
            rates.append(time.monotonic())
        return _learn(batch, logits)

    began = time.monotonic()
    got = _guarded(_linear(), slow, tmp_path / "history.jsonl", Guard(), seconds=1.0)
    assert 0.95 < got.duration_s < 1.3
    assert 0.9 < rates[-1] - began < 1.2
    assert got.epochs == -(-len(rates) // 3)
    assert got.stopped == "epochs"


def test_the_schedule_follows_the_clock(tmp_path: Path) -> None:
    def slow(batch: Batch, logits: Tensor) -> Tensor:
        time.sleep(0.01)
        return _learn(batch, logits)

    recipe = Recipe(epochs=1, batch_size=8, lr=0.1, weight_decay=0.0, seconds=0.6)
    run = Run(_linear(), _stream(), _stream(1), slow, recipe)
    rates = []
    while not run.stopped:
        run.epoch()
        rates.append(run.optimizer.param_groups[0]["lr"])
    peak = rates.index(max(rates))
    assert max(rates) > 0.09
    assert peak < len(rates) / 2
    assert rates[-1] < 0.02


def test_no_time_is_one_step(tmp_path: Path) -> None:
    got = _guarded(_linear(), _learn, tmp_path / "history.jsonl", Guard(), seconds=1e-9)
    assert got.epochs == 1


def test_there_is_a_sign_of_life_per_step_and_batch(tmp_path: Path) -> None:
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1

    recipe = Recipe(epochs=2, batch_size=8, lr=0.1, weight_decay=0.0)
    path = tmp_path / "history.jsonl"
    fit_guarded(
        _linear(),
        _stream(),
        _stream(1),
        _learn,
        recipe,
        Guard(),
        history=path,
        after_step=beat,
    )
    assert beats == 2 * 3 + 3  # steps, and validations of one batch each


def test_statistics_of_slow_batch_norms_follow_a_short_training(tmp_path: Path) -> None:
    """As those of MobileNetV3 (0.01) and MNASNet (0.0003), which average over many steps."""
    norm = nn.BatchNorm2d(1, momentum=0.0003)
    model = nn.Sequential(norm, _linear())
    _fit(model, _learn, tmp_path / "h", epochs=20)  # 60 steps
    brightness = torch.tensor(_stream()._split.images / 255, dtype=torch.float32).mean().item()
    assert norm.running_mean is not None
    assert norm.running_mean.item() == pytest.approx(brightness, rel=0.1)
    assert norm.momentum == 0.0003


# ---------------------------------------------------------------- prediction


@pytest.mark.parametrize("training", [True, False])
def test_prediction_is_in_order_in_evaluation_mode_and_keeps_the_mode(training: bool) -> None:
    stream = Stream(random_split(11), seed=0, augment=AugmentConfig(pad=2, flip=True))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Dropout(0.5)).train(training)
    predictions = predict(model, stream, batch_size=4, limit=10)
    assert model.training is training
    images = stream.plain(torch.arange(10))
    torch.testing.assert_close(predictions.logits_nk, model.eval()(images).detach())
    assert predictions.labels_n.tolist() == [0, 1, 2] * 3 + [0]
    hits = predictions.logits_nk.argmax(1) == predictions.labels_n
    assert predictions.accuracy == pytest.approx(int(hits.sum()) / 10)


def test_large_images_are_predicted_a_few_at_a_time() -> None:
    stream = Stream(random_split(9, size=1024), seed=0, augment=AugmentConfig())
    sizes: list[int] = []
    model = nn.Sequential(nn.AvgPool2d(128), nn.Flatten(), nn.Linear(64, 3))
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    assert len(predict(model, stream, batch_size=256).labels_n) == 9
    assert sizes == [4, 4, 1]
