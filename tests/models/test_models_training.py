"""The end-to-end training loop, and prediction."""

from __future__ import annotations

import json
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
from pbkd.models.training import Loss, Recipe
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
