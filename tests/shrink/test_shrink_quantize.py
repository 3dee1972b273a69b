"""Weights on few values: exactness, error, what is left alone, and training with them."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_students import images_of, learner, reloaded, tied, trainer_of
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from pbkd.config import AugmentConfig, QuantizeStep, TuneConfig
from pbkd.data import Stream, load_prepared
from pbkd.errors import ArtifactError, ShrinkError
from pbkd.models import load_teacher, predict
from pbkd.shrink import Shrunk, Trainer
from pbkd.shrink.container import pack
from pbkd.shrink.grids import Codebook, Grid, codes_of
from pbkd.shrink.quantize import _best_steps, _k_means, _simplify_norms, apply
from pbkd.shrink.unpacking import load_packed, read_packed
from pbkd.students import load_model

NO_TUNE = TuneConfig(epochs=0)


@pytest.fixture
def shrunk(finished) -> Shrunk:
    model, card = load_model(next(finished.artifacts("finetune").iterdir()))
    return Shrunk(model, card)


@pytest.fixture
def trainer(finished, tmp_path) -> Trainer:
    prepared = load_prepared(finished.prepared)
    train, val = (
        Stream(prepared.split(name), seed=0, augment=AugmentConfig(pad=1))
        for name in ("train", "val")
    )
    teacher, _ = load_teacher(finished.artifacts("teacher"))
    return Trainer(teacher, train, val, tmp_path / "tuning")


def images(shrunk: Shrunk) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.rand(16, 1, *shrunk.card.image_size)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{path}.weight": module.weight.detach()
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


# ---------------------------------------------------------------- values


def test_a_grid_of_2_bits_has_three_values():
    grid = Grid(torch.tensor([0.5, 2.0]), bits=2)
    codes = grid.codes(torch.tensor([[0.2, 0.3, -9.0], [0.9, 1.1, -3.5]]))
    assert codes.tolist() == [[0, 1, -1], [0, 1, -1]]
    assert grid.values(codes).tolist() == [[0.0, 0.5, -0.5], [0.0, 2.0, -2.0]]


def test_the_steps_of_a_row_are_those_of_least_error_among_the_tried():
    torch.manual_seed(0)
    weight = torch.randn(3, 200)
    weight[2, 0] = 40.0  # one far off must not make all others coarse
    steps = _best_steps(weight, 7)

    def error(row: torch.Tensor, step: float) -> float:
        return float((((row / step).round().clamp(-7, 7) * step - row) ** 2).sum())

    for row, step in zip(weight, steps, strict=True):
        ends = torch.linspace(0.3, 1.0, 29) * row.abs().max() / 7
        assert error(row, float(step)) == pytest.approx(min(error(row, float(e)) for e in ends))
    assert float(steps[2]) < 40 / 7


def test_k_means_of_two_heaps_are_their_means():
    weight = torch.tensor([[1.0, 1.2, -2.0, -2.2, 0.0, 0.0]])
    assert _k_means(weight, 3).tolist() == pytest.approx([-2.1, 0.0, 1.1])
    assert _k_means(weight[:, :4], 2).tolist() == pytest.approx([-2.1, 1.1])
    assert _k_means(torch.zeros(2, 2), 4).tolist() == [0.0]


def test_codes_of_what_lies_off_its_values_are_refused():
    grid = Grid(torch.tensor([0.5]), bits=4)
    assert codes_of("w", torch.tensor([[1.5]]), grid).tolist() == [[3]]
    with pytest.raises(ArtifactError, match="w does not lie on the values"):
        codes_of("w", torch.tensor([[1.4]]), grid)


# ---------------------------------------------------------------- whole students


@pytest.mark.parametrize("form", ["grid", "codebook"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_weight_lies_on_its_values_and_zeros_stay(shrunk, trainer, form, bits):
    model = copy.deepcopy(shrunk.model)
    pruned = {}
    with torch.no_grad():
        for name, weight in weights(model).items():
            weight[weight.abs() < weight.abs().median()] = 0
            pruned[name] = weight == 0
    step = QuantizeStep(form=form, bits=bits, tune=TuneConfig(epochs=1, lr=0.005))

    got = apply(Shrunk(model, shrunk.card), step, trainer)

    own = weights(got.model)
    assert got.grids.keys() == own.keys()
    for index, (name, weight) in enumerate(own.items()):
        codes = codes_of(name, weight, got.grids[name])
        is_end = index in (0, len(own) - 1)
        depthwise = weight.dim() == 4 and weight.shape[1] == 1 and weight.shape[0] > 1
        allowed = 8 if is_end or depthwise else bits
        values = 2**allowed - (form == "grid")
        assert codes.max() - codes.min() < values
        assert bool((weight[pruned[name]] == 0).all()), name
        assert not bool((weight == 0).all()), name


def test_eight_bits_without_training_hardly_change_the_logits(shrunk, trainer):
    got = apply(shrunk, QuantizeStep(bits=8, tune=NO_TUNE), trainer)
    # no noise: what a network makes of it depends on the processor that trained the network
    x = trainer.val.plain(torch.arange(64))
    with torch.no_grad():
        before, after = shrunk.model(x), got.model(x)
    assert float((before - after).abs().max()) < 0.02 * float(before.abs().max())
    assert not torch.equal(before, after)


def test_more_bits_are_nearer(shrunk, trainer):
    x, errors = images(shrunk), []
    for bits in (2, 3, 4, 6):
        step = QuantizeStep(bits=bits, sensitive_bits=bits, tune=NO_TUNE)
        with torch.no_grad():
            errors.append(float((apply(shrunk, step, trainer).model(x) - shrunk.model(x)).norm()))
    assert errors == sorted(errors, reverse=True)


def test_training_with_three_values_gains_accuracy(shrunk, trainer):
    coarse = {"bits": 2, "sensitive_bits": 2}
    plain = apply(shrunk, QuantizeStep(**coarse, tune=NO_TUNE), trainer)
    tuned = apply(shrunk, QuantizeStep(**coarse, tune=TuneConfig(epochs=3, lr=0.02)), trainer)
    accuracy = [trainer.accuracy(each.model) for each in (plain, tuned)]
    assert accuracy[1] > accuracy[0] + 0.02


def test_the_student_that_came_is_left_as_it_was(shrunk, trainer):
    before = copy.deepcopy(shrunk.model.state_dict())
    apply(shrunk, QuantizeStep(bits=4, tune=TuneConfig(epochs=1)), trainer)
    after = shrunk.model.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert before.keys() == after.keys()


def test_what_comes_out_is_a_plain_network_of_the_same_structure(shrunk, trainer):
    got = apply(shrunk, QuantizeStep(bits=4, tune=TuneConfig(epochs=1)), trainer)
    assert got.model.state_dict().keys() == shrunk.model.state_dict().keys()
    assert {type(m) for m in got.model.modules()} == {type(m) for m in shrunk.model.modules()}
    assert not got.model.training


def test_the_folder_gives_the_student_back(shrunk, trainer, tmp_path):
    got = apply(shrunk, QuantizeStep(bits=4, form="codebook", tune=NO_TUNE), trainer)
    got.save(tmp_path / "folder")
    again = Shrunk.load(tmp_path / "folder")
    x = images(shrunk)
    with torch.no_grad():
        assert torch.equal(again.model(x), got.model(x))
    assert again.grids.keys() == got.grids.keys()
    for name, grid in again.grids.items():
        assert isinstance(grid, Codebook)
        assert torch.equal(grid.levels, got.grids[name].levels)


@pytest.mark.parametrize("form", ["grid", "codebook"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_tied_weights_stay_tied_and_files_give_the_same_logits(form, epochs, tmp_path):
    step = QuantizeStep(form=form, bits=3, tune=TuneConfig(epochs=epochs, batch_size=16))
    got = apply(tied(), step, trainer_of(tmp_path))
    net = got.model.net
    assert net.left.weight is net.right.weight is net.kernel
    assert {f"net.{name}" for name in ("left.weight", "right.weight", "kernel")} < got.grids.keys()

    x, path = images_of(got.card), tmp_path / "model.pbkd"
    path.write_bytes(pack(got))
    with torch.no_grad():
        logits = got.model(x)
        assert torch.equal(reloaded(got, tmp_path / "folder")(x), logits)
        assert torch.equal(load_packed(read_packed(path), allow_code=True).model(x), logits)


def test_a_tied_weight_has_the_bits_of_its_most_sensitive_layer(tmp_path):
    step = QuantizeStep(bits=3, sensitive_bits=6, tune=NO_TUNE)
    grids = apply(tied(), step, trainer_of(tmp_path)).grids
    assert {name: grid.bits for name, grid in grids.items()} == {
        "net.stem.weight": 6,
        "net.fc.weight": 3,
        "net.left.weight": 6,
        "net.right.weight": 6,
        "net.kernel": 6,
    }


@pytest.mark.parametrize("form", ["grid", "codebook"])
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_a_weight_that_a_parametrization_makes_is_told(norm, form, tmp_path):
    shrunk = learner()
    norm(shrunk.model.net.classifier)
    with pytest.raises(ShrinkError, match=r"layer classifier: .*remove_parametrizations\(layer"):
        apply(shrunk, QuantizeStep(form=form), trainer_of(tmp_path))


# ---------------------------------------------------------------- what is not quantized


def test_simple_norms_give_the_same(shrunk):
    model = copy.deepcopy(shrunk.model)
    _simplify_norms(model)
    x = images(shrunk)
    with torch.no_grad():
        torch.testing.assert_close(model(x), shrunk.model(x), rtol=1e-4, atol=1e-4)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert bool((norm.running_mean == 0).all())
        assert bool((norm.running_var == 1).all())


def test_norms_that_share_a_scale_give_the_same():
    shrunk = tied()
    x = images_of(shrunk.card)
    with torch.no_grad():
        before = shrunk.model(x)
        _simplify_norms(shrunk.model)
        torch.testing.assert_close(shrunk.model(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rest", "expected"), [("float16", True), ("float32", False)])
def test_the_rest_is_rounded_as_asked(shrunk, trainer, rest, expected):
    got = apply(shrunk, QuantizeStep(bits=8, rest=rest, tune=NO_TUNE), trainer)
    others = [p for n, p in got.model.named_parameters() if n not in got.grids]
    assert others
    assert all(torch.equal(p.half().float(), p) for p in others) is expected


def test_what_float16_cannot_hold_stays(shrunk, trainer):
    model = copy.deepcopy(shrunk.model)
    with torch.no_grad():
        model.net.classifier.bias.fill_(1e6)
    got = apply(Shrunk(model, shrunk.card), QuantizeStep(tune=NO_TUNE), trainer)
    assert bool((got.model.net.classifier.bias == 1e6).all())


def test_equal_runs_give_equal_students(shrunk, trainer, tmp_path):
    step = QuantizeStep(bits=3, tune=TuneConfig(epochs=1))
    states = []
    for name in ("one", "two"):
        own = Trainer(trainer.teacher, trainer.train, trainer.val, tmp_path / name)
        states.append(apply(shrunk, step, own).model.state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_a_student_never_ends_worse_than_it_was_rounded(shrunk, trainer):
    step = QuantizeStep(bits=6, tune=NO_TUNE)
    rounded = trainer.accuracy(apply(shrunk, step, trainer).model)
    harmful = QuantizeStep(bits=6, tune=TuneConfig(epochs=1, lr=50.0, restarts=0))
    got = apply(shrunk, harmful, trainer)
    found = predict(got.model, trainer.val, batch_size=256).accuracy
    assert found >= rounded - 0.005  # norms and biases are rounded after the training
