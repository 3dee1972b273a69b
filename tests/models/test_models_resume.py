"""Trainings that are killed and go on, their random draws, rates and memory."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbkd.config import AugmentConfig
from pbkd.data import Batch, Split, Stream
from pbkd.errors import TrainingError
from pbkd.models import fit, run, training
from pbkd.models.guard import Guard
from pbkd.models.recipe import Recipe
from pbkd.models.run import Loss
from pbkd.models.training import fit_guarded
from pbkd.testing import random_split

NUM, BATCH_SIZE, EPOCHS = 24, 8, 5
STEPS_PER_EPOCH = NUM // BATCH_SIZE
RECIPE = Recipe(epochs=EPOCHS, batch_size=BATCH_SIZE, lr=0.05, weight_decay=1e-2)


@pytest.fixture(autouse=True)
def _checkpoint_after_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY_S", 0.0)


class Killed(BaseException):
    """Ends a training where no one catches it."""


def _stream(seed: int) -> Stream:
    noise = random_split(NUM, num_classes=2, seed=seed)
    images = noise.images // 2 + (noise.labels * 90).astype(np.uint8)[:, None, None, None]
    return Stream(Split(images, noise.labels), seed=0, augment=AugmentConfig(pad=1, flip=True))


def _model(seed: int = 3) -> nn.Module:
    """With a state in every way: parameters, batch-norm statistics, dropout draws."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(0.1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 9, 8),
        nn.Dropout(0.25),
        nn.Linear(8, 2),
    )


def _learn(batch: Batch, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, batch.labels_n)


def _after(steps: int, act: Callable[[], object]) -> Loss:
    """The loss, which does something else before its step number ``steps``."""
    done = 0

    def loss(batch: Batch, logits: Tensor) -> Tensor:
        nonlocal done
        if done == steps:
            act()
        done += 1
        return _learn(batch, logits)

    return loss


def _kill() -> None:
    raise Killed


def _fit(
    folder: Path,
    model: nn.Module,
    loss: Loss = _learn,
    recipe: Recipe = RECIPE,
    checkpoint: str | None = "a.pt",
) -> float:
    return fit(
        model,
        _stream(0),
        _stream(1),
        loss,
        recipe,
        history=folder / "history.jsonl",
        checkpoint=None if checkpoint is None else folder / checkpoint,
    )


Result = tuple[dict[str, Tensor], float, str]


def _result(
    folder: Path, loss: Loss = _learn, recipe: Recipe = RECIPE, *, seed: int = 3, **more: Any
) -> Result:
    """Weights, accuracy and history of a training; the seed is of its first weights."""
    model = _model(seed)
    accuracy = _fit(folder, model, loss, recipe, **more)
    return model.state_dict(), accuracy, (folder / "history.jsonl").read_text()


def _assert_same(found: Result, expected: Result) -> None:
    assert found[1:] == expected[1:]
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][name], value) for name, value in expected[0].items())


def _recipe(**changes: Any) -> Recipe:
    return Recipe(**{**RECIPE.__dict__, **changes})


RECIPES = {
    f"{optimizer} {schedule}": _recipe(optimizer=optimizer, schedule=schedule)
    for optimizer in ("sgd", "adamw")
    for schedule in ("one_cycle", "cosine")
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("step", [0, 3, 7, 14])
def test_a_killed_training_ends_as_one_that_was_not(
    tmp_path: Path, recipe: Recipe, step: int
) -> None:
    expected = _result(tmp_path, recipe=recipe, checkpoint=None)
    with pytest.raises(Killed):
        _result(tmp_path, _after(step, _kill), recipe)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert lines == expected[2].splitlines()[: step // STEPS_PER_EPOCH]
    num_steps = 0

    def counted(batch: Batch, logits: Tensor) -> Tensor:
        nonlocal num_steps
        num_steps += 1
        return _learn(batch, logits)

    is_resumed = step >= STEPS_PER_EPOCH  # first weights and random state are of no account
    found = _result(tmp_path, counted, recipe, seed=4 if is_resumed else 3)
    _assert_same(found, expected)
    done = step // STEPS_PER_EPOCH  # finished epochs are not done again
    assert num_steps == (EPOCHS - done) * STEPS_PER_EPOCH


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("step", [1, 2, 4, 8, 14])
def test_a_long_epoch_goes_on_at_the_right_step(
    tmp_path: Path, recipe: Recipe, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _result(tmp_path, recipe=recipe, checkpoint=None)
    monkeypatch.setattr(training, "_LONG_EPOCH_S", 0.0)
    monkeypatch.setattr(training, "_SAVING_SHARE", math.inf)
    with pytest.raises(Killed):
        _result(tmp_path, _after(step, _kill), recipe)
    seen: list[int] = []

    def counted(batch: Batch, logits: Tensor) -> Tensor:
        seen.extend(batch.rows.tolist())
        return _learn(batch, logits)

    found = _result(tmp_path, counted, recipe, seed=4)
    _assert_same(found, expected)
    assert len(seen) == (EPOCHS * STEPS_PER_EPOCH - step) * BATCH_SIZE  # no step is done again
    rest = seen[: -step % STEPS_PER_EPOCH * BATCH_SIZE]
    assert len(rest) == len(set(rest))  # nor an image of the epoch seen twice


def test_saving_within_an_epoch_takes_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(run.Run, "save", lambda self, _: saved.append(len(self.epoch_losses)))
    _result(tmp_path)
    assert saved == [0] * EPOCHS, "no epoch here takes a minute"
    monkeypatch.setattr(training, "_LONG_EPOCH_S", 0.0)
    saved.clear()
    _result(tmp_path)
    assert saved.count(1) + saved.count(2) > 0
    saver = training._Saver(None, tmp_path)  # type: ignore[arg-type]
    saver._took_s = 1e6
    saver.within_epoch()  # a model that takes long to save is not saved again at once


def test_killed_in_every_epoch(tmp_path: Path) -> None:
    expected = _result(tmp_path, checkpoint=None)
    for _ in range(EPOCHS - 1):
        with pytest.raises(Killed):
            _result(tmp_path, _after(STEPS_PER_EPOCH, _kill))
    _assert_same(_result(tmp_path), expected)


def _knowing(scale: float) -> nn.Module:
    """At ``scale`` 1, a linear model that knows the answer: class 1 is brighter."""
    layer = nn.Linear(64, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[1] = scale
        layer.bias.copy_(torch.tensor([0.0, -64 * 108 / 255 * scale]))
    return nn.Sequential(nn.Flatten(), layer)


def _unlearn(batch: Batch, logits: Tensor) -> Tensor:
    return (logits.gather(1, batch.labels_n[:, None])[:, 0] - logits.mean(1)).mean()


def test_the_best_weights_of_before_the_kill_are_kept(tmp_path: Path) -> None:
    """The first ones are, and the process that goes on never saw them."""
    recipe = _recipe(lr=1.0, schedule="cosine", weight_decay=0.0)
    killing = _after(7, _kill)
    with pytest.raises(Killed):
        _fit(tmp_path, _knowing(1.0), lambda *args: killing(*args) * 0 + _unlearn(*args), recipe)
    model = _knowing(0.0)
    assert _fit(tmp_path, model, _unlearn, recipe) == 1.0
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert len(lines) == EPOCHS
    assert not any('"val_accuracy": 1.0' in line for line in lines)
    expected = _knowing(1.0).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    expected = _result(tmp_path)
    _assert_same(_result(tmp_path, _after(0, _kill)), expected)


def test_checkpoints_are_written_only_every_few_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY_S", 1000.0)
    _result(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"history.jsonl"}


def test_a_checkpoint_is_written_whole(tmp_path: Path) -> None:
    _result(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"history.jsonl", "a.pt"}
    assert torch.load(tmp_path / "a.pt", weights_only=True)["next_epoch"] == EPOCHS


def test_a_flipped_bit_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = _result(tmp_path, checkpoint=None)
    with pytest.raises(Killed):
        _result(tmp_path, _after(7, _kill))
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[len(content) // 2] ^= 1  # of a weight: torch itself would not see it
    (tmp_path / "a.pt").write_bytes(content)
    _assert_same(_result(tmp_path), expected)
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("kept", [0, 10, 700, -1, -100])
def test_a_damaged_checkpoint_begins_again_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: int
) -> None:
    expected = _result(tmp_path, checkpoint=None)
    with pytest.raises(Killed):
        _result(tmp_path, _after(7, _kill))
    path = tmp_path / "a.pt"
    path.write_bytes(path.read_bytes()[:kept])
    _assert_same(_result(tmp_path), expected)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"checkpoint {path} is damaged (")
    assert warnings[0].endswith("; beginning again")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Code()}, tmp_path / "a.pt")
    _assert_same(_result(tmp_path), _result(tmp_path, checkpoint=None))
    assert not (tmp_path / "ran").exists()


def test_draws_depend_on_the_streams_seed_alone_and_change_no_other(tmp_path: Path) -> None:
    results = []
    for seed in (1, 2):
        model = _model()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        accuracy = _fit(tmp_path, model)
        assert torch.equal(torch.get_rng_state(), before)
        results.append((model.state_dict(), accuracy, (tmp_path / "history.jsonl").read_text()))
        (tmp_path / "a.pt").unlink()
    _assert_same(results[0], results[1])


def test_every_epoch_draws_anew(tmp_path: Path) -> None:
    """With a rate near nothing, only what dropout leaves out tells the epochs apart."""
    model = _model()
    masks: list[Tensor] = []
    model[-2].register_forward_hook(
        lambda module, _, output: masks.append(output == 0) if module.training else None
    )
    _fit(tmp_path, model, recipe=_recipe(lr=1e-12, weight_decay=0.0))
    assert len(masks) == EPOCHS * STEPS_PER_EPOCH
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)


def _rates(folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rate of every step."""
    rates = []
    make = run.make_optimizer

    def recorded(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        optimizer = make(model, recipe)
        optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(run, "make_optimizer", recorded)
    _result(folder, recipe=recipe, checkpoint=None)
    monkeypatch.undo()
    return rates


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("epochs", [1, 5])
def test_cosine_only_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, epochs: int
) -> None:
    recipe = _recipe(optimizer=optimizer, schedule="cosine", epochs=epochs)
    num = epochs * STEPS_PER_EPOCH
    expected = [0.05 / 2 * (1 + math.cos(math.pi * step / num)) for step in range(num)]
    assert _rates(tmp_path, recipe, monkeypatch) == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_cycle_rises_for_a_quarter_and_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    recipe = _recipe(optimizer=optimizer, schedule="one_cycle", epochs=8)
    rates = _rates(tmp_path, recipe, monkeypatch)
    assert len(rates) == 24
    peak = int(np.argmax(rates))
    assert peak == pytest.approx(24 / 4, abs=1)
    assert rates[peak] == pytest.approx(0.05, rel=0.05)
    assert rates[0] == pytest.approx(0.05 / 25)
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.05 / 25


def test_optimizers_train_differently(tmp_path: Path) -> None:
    histories = {_result(tmp_path, recipe=r, checkpoint=None)[2] for r in RECIPES.values()}
    assert len(histories) == len(RECIPES)


@pytest.mark.parametrize("step", [1, 4, 7, 11])
def test_a_training_killed_after_a_restart_ends_as_one_that_was_not(
    tmp_path: Path, step: int
) -> None:
    """The rate of the first attempt diverges in its second epoch, in every process."""
    history, checkpoint = tmp_path / "history.jsonl", tmp_path / "a.pt"
    guard = Guard(patience=3, restarts=2)

    def train(model: nn.Module, kill_at: int | None, path: Path | None) -> tuple[object, ...]:
        done = 0

        def loss(batch: Batch, logits: Tensor) -> Tensor:
            nonlocal done
            first = '"restarts": 1' not in history.read_text() and restarts() == 0
            late = len(history.read_text().splitlines()) >= 1
            if logits.requires_grad:
                if not first:
                    done += 1
                if done == kill_at:
                    raise Killed
            bad = float("nan") if first and late else 1.0
            return _learn(batch, logits) * bad

        def restarts() -> int:
            return int("beginning again" in messages.getvalue())

        fitted = fit_guarded(
            model, _stream(0), _stream(1), loss, RECIPE, guard, history=history, checkpoint=path
        )
        return fitted.val_accuracy, fitted.epochs, fitted.stopped, fitted.restarts

    messages = io.StringIO()
    handler = logging.StreamHandler(messages)
    logger = logging.getLogger("pbkd.models.run")
    logger.addHandler(handler)
    try:
        model = _model()
        expected = train(model, None, None), model.state_dict(), history.read_text()
        assert expected[0][3] == 1
        messages.truncate(0), messages.seek(0)
        with pytest.raises(Killed):
            train(_model(), step, checkpoint)
        model = _model()
        found = train(model, None, checkpoint), model.state_dict(), history.read_text()
    finally:
        logger.removeHandler(handler)
    assert found[0] == expected[0]
    assert found[2] == expected[2]
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


FULL: list[Exception] = [
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nat"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_into_memory_is_named(tmp_path: Path, error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(TrainingError) as caught:
        _result(tmp_path, _after(4, fail))
    message = str(caught.value)
    assert message.startswith("no memory for a batch of 8 images")
    assert message.endswith("; lower `batch_size`")
    assert "\n" not in message
    assert ("9 bytes" in message) == bool(error.args)


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        _result(tmp_path, _after(4, fail))
