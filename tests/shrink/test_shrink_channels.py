"""Channels that go: which, how many, and that the rest of the network follows."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from tiny_students import (
    every_student,
    images_of,
    learner,
    macs_of,
    reloaded,
    trainer_of,
)
from torch import nn
from torch.nn import functional as F

from pbkd.artifacts import tensors_digest
from pbkd.config import LowRankStep, PruneChannelsStep, PruneStep, Resized, TuneConfig
from pbkd.errors import MissingExtraError, ShrinkError
from pbkd.measure import num_parameters
from pbkd.models import Classifier
from pbkd.shrink import Shrunk, channels, lowrank, prune
from pbkd.shrink.channels import apply
from pbkd.shrink.masks import prunable_weights, sparsity

NO_TUNE = TuneConfig(epochs=0)
STUDENTS = every_student()


def step(**settings) -> PruneChannelsStep:
    return PruneChannelsStep(**{"tune": NO_TUNE, **settings})


def of_net(net: nn.Module) -> Shrunk:
    """A network of the test's own, in the card of another."""
    card = STUDENTS["vgg_small"].card
    return Shrunk(Classifier(net, card.mean, card.std).eval(), card)


# ---------------------------------------------------------------- structure


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_built_from_the_card_it_gives_the_same_logits(student, scope, tmp_path):
    shrunk = STUDENTS[student]
    before = tensors_digest(shrunk.model.state_dict())
    found = apply(shrunk, step(ratio=0.4, scope=scope), trainer_of(tmp_path))
    assert tensors_digest(shrunk.model.state_dict()) == before
    assert [type(edit) for edit in found.card.edits] == [Resized]
    x = images_of(found.card)
    assert found.model(x).shape == (5, 4)
    torch.manual_seed(77)  # what the constructors draw must not matter
    assert torch.equal(reloaded(found, tmp_path)(x), found.model(x))
    assert num_parameters(found.model) < num_parameters(shrunk.model)
    assert not any(module.training for module in found.model.modules())
    assert all(parameter.requires_grad for parameter in found.model.parameters())


def test_sizes_of_two_layers_by_hand(tmp_path):
    """The channels of least norm go: 8 outputs, of which each has a weight of its number."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    net.append(nn.Linear(8, 4))
    order = torch.tensor([5.0, 1.0, 7.0, 3.0, 8.0, 2.0, 6.0, 4.0])
    with torch.no_grad():
        net[0].weight.copy_(order[:, None, None, None].expand(8, 3, 3, 3))
        net[3].weight.fill_(0.1)
    found = apply(of_net(net), step(ratio=0.5), trainer_of(tmp_path))
    assert found.card.edits == (Resized(layers={"0": (4, 3, 1), "3": (4, 4)}),)
    assert found.model.net[0].weight[:, 0, 0, 0].tolist() == [5.0, 7.0, 8.0, 6.0]
    assert found.model.net[3].bias.tolist() == net[3].bias.tolist()


class Branches(nn.Module):
    """Functional branches, an in-place addition, a concatenation, a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.other = nn.Conv2d(8, 6, 1)
        self.depthwise = nn.Conv2d(14, 14, 3, padding=1, groups=14)
        self.last = nn.Conv2d(14, 10, 1)
        self.fc = nn.Linear(40, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x), inplace=True)
        y = self.norm(self.branch(x))
        y += x
        y = torch.cat([y, self.other(y)], 1)
        return self.fc(F.adaptive_avg_pool2d(self.last(self.depthwise(y)), 2).flatten(1))


def test_channels_that_do_nothing_go_first_and_the_function_stays(tmp_path):
    """Through addition, concatenation, depthwise convolution and flattening."""
    torch.manual_seed(0)
    net = Branches().eval()
    with torch.no_grad():
        for layer in (net.stem, net.branch):
            layer.weight[[1, 4]] = 0
            layer.bias[[1, 4]] = 0
        net.norm.weight[[1, 4]] = 0
        net.norm.bias[[1, 4]] = 0
        for consumer in (net.branch, net.other):
            consumer.weight[:, [1, 4]] = 0
        net.other.weight[[0, 3]] = 0
        net.other.bias[[0, 3]] = 0
        net.last.weight[2] = 0
        net.last.bias[2] = 0
        net.fc.weight[:, 8:12] = 0
        for gone in (1, 4, 8, 11):
            net.depthwise.weight[gone] = 0
            net.depthwise.bias[gone] = 0
            net.last.weight[:, gone] = 0
    shrunk = of_net(net)
    found = apply(shrunk, step(ratio=5 / 24), trainer_of(tmp_path))  # 5 of 8 + 6 + 10
    assert found.card.edits[0].layers == {
        "stem": (6, 3, 1),
        "branch": (6, 6, 1),
        "norm": (6,),
        "other": (4, 6, 1),
        "depthwise": (10, 10, 10),
        "last": (9, 10, 1),
        "fc": (4, 36),
    }
    x = images_of(shrunk.card)
    torch.testing.assert_close(found.model(x), shrunk.model(x))


def test_groups_stay_groups(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.GroupNorm(4, 8),
        nn.Conv2d(8, 12, 3, groups=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )
    half, quarter = (
        apply(of_net(net), step(ratio=ratio, scope="layer"), trainer_of(tmp_path))
        for ratio in (0.5, 0.25)
    )
    assert half.card.edits[0].layers == {"0": (4, 3, 1), "1": (4,), "2": (6, 4, 2), "5": (4, 6)}
    # of 2 in each group of the norm none can go, of 6 in each of the convolution one
    assert quarter.card.edits[0].layers == {"2": (10, 8, 2), "5": (4, 10)}


def test_after_other_steps_and_before_them(tmp_path):
    shrunk = STUDENTS["stitched"]
    trainer = trainer_of(tmp_path)
    pruned = prune.apply(shrunk, PruneStep(sparsity=0.3, scope="layer", tune=NO_TUNE), trainer)
    narrow = apply(pruned, step(ratio=0.3), trainer)
    assert sparsity(prunable_weights(narrow.model)) > 0.1
    once = lowrank.apply(shrunk, LowRankStep(ratio=0.6, tune=NO_TUNE), trainer)
    twice = apply(once, step(max_macs=0.7), trainer)
    thrice = lowrank.apply(
        apply(shrunk, step(ratio=0.3), trainer), LowRankStep(ratio=0.6, tune=NO_TUNE), trainer
    )
    assert [edit.kind for edit in twice.card.edits] == ["factorized", "resized"]
    assert [edit.kind for edit in thrice.card.edits] == ["resized", "factorized"]
    for index, found in enumerate((narrow, twice, thrice)):
        x = images_of(found.card)
        assert torch.equal(reloaded(found, tmp_path / str(index))(x), found.model(x))


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("student", "share"),
    [
        ("vgg_small", 0.9),
        ("cifar_resnet20", 0.35),
        ("stitched", 0.6),
        ("mobilenet_v3_small", 0.5),
    ],
)
def test_the_limit_of_macs_is_met_and_one_removal_fewer_would_not(
    student, share, tmp_path, monkeypatch
):
    shrunk = STUDENTS[student]
    numbers = []
    least = channels._least

    def noted(*args):
        numbers.append(least(*args))
        return numbers[0]

    monkeypatch.setattr(channels, "_least", noted)
    found = apply(shrunk, step(max_macs=share), trainer_of(tmp_path))
    limit = share * macs_of(shrunk)
    assert macs_of(found) <= limit
    example = images_of(shrunk.card, 2)
    pruning = channels._Pruning(shrunk.model, shrunk.card, example, "global")
    fewer = Shrunk(pruning.pruned(numbers[0] - 1), shrunk.card)
    assert macs_of(fewer) > limit


def test_a_limit_of_macs_can_be_a_figure(tmp_path):
    shrunk = STUDENTS["cifar_resnet20"]
    own = macs_of(shrunk)
    figure = f"{own / 2 / 1e3:.3f}k"
    assert own / 2 >= macs_of(apply(shrunk, step(max_macs=figure), trainer_of(tmp_path))) > 0


def test_a_limit_of_latency_is_searched_with_the_measured_times(tmp_path, monkeypatch):
    """With a clock whose milliseconds are megaMACs."""
    shrunk = STUDENTS["cifar_resnet20"]
    probes = []

    def measured(models, example, *, batch_size, threads, min_duration_s):
        assert (batch_size, threads) == (1, 1)
        probes.append(models)
        x = example[:1]
        return {name: Median(channels.count_macs(model, x) / 1e6) for name, model in models.items()}

    class Median:
        def __init__(self, median_ms: float) -> None:
            self.median_ms = median_ms

    monkeypatch.setattr(channels, "measure_interleaved", measured)
    own = macs_of(shrunk)
    by_share = apply(shrunk, step(max_latency=0.5), trainer_of(tmp_path))
    assert 0.4 * own < macs_of(by_share) <= 0.5 * own
    assert len(probes) <= channels._PROBES + 2
    by_figure = apply(shrunk, step(max_latency=f"{own / 2e6}ms"), trainer_of(tmp_path))
    assert by_figure.card == by_share.card


def test_a_limit_of_latency_is_met_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(channels, "_PROBE_S", 0.05)
    shrunk = STUDENTS["mobilenet_v3_small"]
    threads = torch.get_num_threads()
    found = apply(shrunk, step(max_latency=0.97), trainer_of(tmp_path))
    assert macs_of(found) < macs_of(shrunk)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_every_layer_keeps_channels(scope, tmp_path):
    shrunk = STUDENTS["resnet18"]
    found = apply(shrunk, step(ratio=0.999, scope=scope), trainer_of(tmp_path))
    for path, module in found.model.net.named_modules():
        if isinstance(module, nn.Conv2d):
            own = shrunk.model.net.get_submodule(path).out_channels
            assert module.out_channels == (1 if scope == "layer" else own // 16)
    assert found.model.net.fc.out_features == 4


@pytest.mark.parametrize("limit", [{"max_macs": "900G"}, {"max_latency": "100s"}])
def test_a_student_that_keeps_to_the_limit_passes_through(limit, tmp_path):
    shrunk = STUDENTS["cifar_resnet20"]
    assert apply(shrunk, step(**limit), trainer_of(tmp_path)) is shrunk


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_macs": 0.0001}, r"got max_macs .*, the fewest channels come to"),
        ({"max_latency": "1us"}, r"got max_latency .ms. 0\.001, the fewest channels come to"),
        ({"ratio": 0.0001}, "got ratio 0.0001, which is less than one channel"),
    ],
)
def test_what_cannot_be_met_is_an_error(settings, message, tmp_path):
    with pytest.raises(ShrinkError, match=f"prune_channels of cifar_resnet20: {message}"):
        apply(STUDENTS["cifar_resnet20"], step(**settings), trainer_of(tmp_path))


# ---------------------------------------------------------------- what is not understood


class Fixed(nn.Module):
    """Knows its channels by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).reshape(len(x), 8, -1).mean(2))


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("no way")


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Fixed(), r"prune_channels of vgg_small: .*RuntimeError: .*; take `low_rank` or `prune`"),
        (Failing(), "comes out wrong .KeyError: 'no way'.; take"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "no layer has channels that could go"),
    ],
)
@pytest.mark.parametrize("limit", [{"ratio": 0.5}, {"max_macs": 0.5}])
def test_what_cannot_be_traced_is_told(net, message, limit, tmp_path):
    with pytest.raises(ShrinkError, match=message):
        apply(of_net(net), step(**limit), trainer_of(tmp_path))


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pbkd\[shrink\]'"):
        apply(STUDENTS["vgg_small"], step(ratio=0.5), trainer_of(tmp_path))


# ---------------------------------------------------------------- no trace, equal runs


def test_it_leaves_no_trace(tmp_path, capfd):
    shrunk = STUDENTS["mobilenet_v3_small"]
    frozen = shrunk.model.net.get_submodule("features.0.0").weight
    frozen.requires_grad_(False)
    torch.manual_seed(5)
    random, filters, grad = torch.get_rng_state(), warnings.filters[:], torch.is_grad_enabled()
    try:
        with torch.no_grad():
            found = apply(shrunk, step(ratio=0.3), trainer_of(tmp_path))
            assert not torch.is_grad_enabled()
    finally:
        frozen.requires_grad_(True)
    assert torch.equal(torch.get_rng_state(), random)
    assert warnings.filters == filters
    assert torch.is_grad_enabled() == grad
    assert capfd.readouterr() == ("", "")
    assert not found.model.net.get_submodule("features.0.0").weight.requires_grad
    assert found.model.net.get_submodule("features.12.0").weight.requires_grad
    for model in (shrunk.model, found.model):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_equal_runs_give_equal_weights_before_and_after_training(tmp_path):
    tune = TuneConfig(epochs=1, batch_size=16)
    found = [
        apply(learner(), step(max_macs=0.5, tune=tune), trainer_of(tmp_path / name))
        for name in ("a", "b")
    ]
    assert found[0].card == found[1].card
    digests = {tensors_digest(each.model.state_dict()) for each in found}
    assert len(digests) == 1
    untrained = apply(learner(), step(max_macs=0.5), trainer_of(tmp_path / "c"))
    assert untrained.card == found[0].card
    assert tensors_digest(untrained.model.state_dict()) not in digests
