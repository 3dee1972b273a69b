"""Repair: what learns, from what, and that it never ends worse than it began."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pbkd.blocks import build_candidate, swap
from pbkd.config import AugmentConfig, RepairConfig, SeparableConfig
from pbkd.data import Split, Stream
from pbkd.distill import damage_kl, relative_l2
from pbkd.models import Classifier, NetworkSpec, build_network, predict
from pbkd.students.recalibrate import recalibrate
from pbkd.students.repair import Repair, repair
from pbkd.testing import OverwritingNet, random_split

METHODS = ["local", "joint"]
BATCH = 16
PLAIN = Stream(random_split(64), seed=1, augment=AugmentConfig(pad=1))
RGB = Stream(random_split(64, channels=3), seed=1, augment=AugmentConfig(flip=True))
VAL = Stream(random_split(40, seed=9), seed=1, augment=AugmentConfig())


def classifier(net: nn.Module, channels: int = 1) -> Classifier:
    return Classifier(net, (0.5,) * channels, (0.25,) * channels).eval()


class Dropping(nn.Module):
    """Convolutions with batch norm and dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
        )
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def pair(kind: str = "dropping") -> tuple[Classifier, Classifier, list[str], Stream]:
    """Teacher, student with fresh separable candidates, their paths, and images."""
    torch.manual_seed(0)
    train = PLAIN
    if kind == "dropping":
        teacher, paths = classifier(Dropping()), ["features.0", "features.4"]
    elif kind == "residual":
        spec = NetworkSpec(name="cifar_resnet20", num_classes=3, in_channels=3, width=0.25)
        paths = ["layer1.0", "layer2.0", "layer3.2"]
        teacher, train = classifier(build_network(spec), 3), RGB
    else:
        paths = ["stem", "branch", "entry", "tail"]
        teacher = classifier(OverwritingNet(in_place=kind == "overwriting"))
    recalibrate(teacher, train, num_batches=4, batch_size=BATCH)
    with torch.no_grad():
        teacher.net.fc.weight.mul_(20)  # so that the logits tell good features from bad ones
    student = copy.deepcopy(teacher)
    teacher.requires_grad_(False)
    blocks = {
        path: build_candidate(SeparableConfig(), student.net.get_submodule(path)) for path in paths
    }
    swap(student.net, blocks)
    recalibrate(student, train, num_batches=4, batch_size=BATCH)
    return teacher, student, paths, train


def run(
    folder: Path,
    kind: str = "dropping",
    method: str = "joint",
    *,
    train: Stream | None = None,
    paths: list[str] | None = None,
    **settings: float,
) -> tuple[Classifier, list[dict[str, float]]]:
    teacher, student, all_paths, images = pair(kind)
    config = RepairConfig.model_validate(
        {"epochs": 2, "batch_size": BATCH, "method": method, **settings}
    )
    history = folder / "repair.jsonl"
    repair(student, teacher, paths or all_paths, train or images, config, history)
    return student, [json.loads(line) for line in history.read_text().splitlines()]


def kl(teacher: Classifier, student: Classifier, stream: Stream) -> float:
    logits = [predict(m, stream, batch_size=64).logits_nk for m in (teacher, student)]
    return float(damage_kl(*logits))


def assert_same(one: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("kind", ["dropping", "residual", "overwriting"])
@pytest.mark.parametrize("method", METHODS)
def test_the_student_comes_nearer_to_its_teacher(tmp_path, kind, method):
    student, lines = run(tmp_path, kind, method, epochs=6, lr=1e-2)
    teacher, before, _, train = pair(kind)
    assert lines[-1]["train_loss"] < lines[1]["train_loss"]
    assert kl(teacher, student, train) < kl(teacher, before, train)
    assert [line["epoch"] for line in lines] == list(range(-1, 6))
    assert lines[0]["train_loss"] is None
    assert lines[0]["kl"] == pytest.approx(kl(teacher, before, train))


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16_the_student_comes_nearer_to_its_teacher_as_well(tmp_path, method):
    teacher, before, _, train = pair()
    student, lines = run(tmp_path, method=method, mixed_precision="always", epochs=6, lr=1e-2)
    exact, _ = run(tmp_path, method=method, epochs=6, lr=1e-2)
    assert lines[-1]["train_loss"] < lines[1]["train_loss"]
    assert kl(teacher, student, train) < kl(teacher, before, train)
    first = student.net.get_submodule("features.0"), exact.net.get_submodule("features.0")
    for weights, others in zip(*(block.parameters() for block in first), strict=True):
        assert weights.dtype == torch.float32
        assert not torch.equal(weights, others)


@pytest.mark.parametrize("method", METHODS)
def test_labels_are_not_used(tmp_path, method):
    rng = np.random.default_rng(5)
    split = random_split(64)
    shuffled = Split(split.images, rng.permutation(split.labels))
    assert (shuffled.labels != split.labels).any()
    other = Stream(shuffled, seed=1, augment=AugmentConfig(pad=1))
    assert_same(run(tmp_path, method=method)[0], run(tmp_path, method=method, train=other)[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_is_left_as_it_was(tmp_path, method):
    teacher, student, paths, train = pair()
    before = copy.deepcopy(teacher)
    config = RepairConfig(method=method, batch_size=BATCH)
    repair(student, teacher, paths, train, config, tmp_path / "repair.jsonl")
    assert_same(teacher, before)
    assert not any(module.training or module._forward_hooks for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_operations_that_overwrite_activations_change_nothing(tmp_path, method):
    found, lines = run(tmp_path, "overwriting", method)
    expected, expected_lines = run(tmp_path, "not overwriting", method)
    assert lines == expected_lines
    assert_same(found, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_it_never_ends_worse_than_it_began(tmp_path, method, lr):
    student, lines = run(tmp_path, method=method, lr=lr)
    assert_same(student, pair()[1])
    assert all(line["kl"] is None or line["kl"] >= lines[0]["kl"] for line in lines)


def test_a_first_epoch_that_taught_nothing_is_tried_again_at_a_lower_rate(tmp_path, caplog):
    student, lines = run(tmp_path, lr=2.0, epochs=3)
    places = [(line["epoch"], line["restarts"]) for line in lines]
    assert places == [(-1, 0), (0, 0), (0, 1), (1, 1), (2, 1)]
    assert lines[1]["train_loss"] > 10
    assert lines[-1]["train_loss"] < 1
    assert "the first epoch taught nothing; again at lr 0.5" in caplog.text
    calm, calm_lines = run(tmp_path, lr=0.5, epochs=3)
    assert [line["restarts"] for line in calm_lines] == [0, 0, 0, 0]
    assert_same(student, calm)


def test_a_loss_that_rose_is_no_reason_where_the_student_came_nearer(tmp_path, monkeypatch):
    monkeypatch.setitem(Repair.run.__globals__, "_has_risen", lambda losses: True)
    _, lines = run(tmp_path, "residual", lr=3e-2, epochs=2)
    assert lines[1]["kl"] < lines[0]["kl"]
    assert [line["restarts"] for line in lines] == [0, 0, 0]


def test_a_student_whose_activations_died_is_tried_again(tmp_path, monkeypatch, caplog):
    epoch = Repair._epoch

    def deadly(self: Repair, number: int) -> Tensor:
        losses = epoch(self, number)
        if self.restarts == 0:
            with torch.no_grad():
                self.student.net.fc.weight.zero_()
                self.student.net.fc.bias.copy_(torch.tensor(guess))
        return losses

    teacher, _, _, train = pair()
    logits = predict(teacher, train, batch_size=64).logits_nk
    guess = logits.double().softmax(1).mean(0).log().tolist()
    monkeypatch.setattr(Repair, "_epoch", deadly)
    _, lines = run(tmp_path, lr=1e-2)
    assert [line["restarts"] for line in lines] == [0, 0, 1, 1]


def test_the_weights_of_the_best_epoch_are_kept_by_the_validation_images(tmp_path):
    teacher, student, paths, train = pair()
    config = RepairConfig(epochs=4, batch_size=BATCH, lr=3e-2)
    history = tmp_path / "repair.jsonl"
    repair(student, teacher, paths, train, config, history, val=VAL)
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert kl(teacher, student, VAL) == pytest.approx(min(line["kl"] for line in lines))


@pytest.mark.parametrize("settings", [{"method": "none"}, {"epochs": 0}])
def test_nothing_to_do(tmp_path, settings):
    student, lines = run(tmp_path, **settings)
    assert_same(student, pair()[1])
    assert lines == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("paths", [["branch"], ["branch", "tail"]])
def test_a_candidate_without_weights_is_no_obstacle(tmp_path, method, paths):
    teacher, student, _, train = pair("overwriting")
    swap(student.net, {"branch": nn.Identity()})
    config = RepairConfig(method=method, batch_size=BATCH)
    repair(student, teacher, paths, train, config, tmp_path / "repair.jsonl")
    assert kl(teacher, student, train) >= 0


@pytest.mark.parametrize("method", METHODS)
def test_what_learns(tmp_path, method):
    student, _ = run(tmp_path, method=method, epochs=6, lr=1e-2)
    _, before, paths, _ = pair()
    theirs = dict(before.named_parameters())
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, theirs[name])}
    blocks = {n for n in theirs if any(n.startswith(f"net.{path}.") for path in paths)}
    between = {"net.features.1.weight", "net.features.1.bias"}  # nothing compares what comes after
    assert changed == (blocks | between if method == "joint" else blocks)


@pytest.mark.parametrize("method", METHODS)
def test_mode_gradients_and_hooks_are_as_before(tmp_path, method):
    teacher, student, paths, train = pair()
    student.net.fc.requires_grad_(False)
    before = [parameter.requires_grad for parameter in student.parameters()]
    config = RepairConfig(method=method, batch_size=BATCH)
    repair(student, teacher, paths, train, config, tmp_path / "repair.jsonl")
    assert [parameter.requires_grad for parameter in student.parameters()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert not any(module.training for module in student.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_draws_depend_on_the_streams_seed_alone_and_change_no_other(tmp_path, method):
    students = []
    for seed in (1, 2):
        teacher, student, paths, train = pair()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        config = RepairConfig(method=method, batch_size=BATCH)
        repair(student, teacher, paths, train, config, tmp_path / "repair.jsonl")
        assert torch.equal(torch.get_rng_state(), before)
        students.append(student)
    assert_same(*students)


@pytest.mark.parametrize("method", METHODS)
def test_how_far_gradients_go(tmp_path, method):
    """The first block learns from the second one's loss where gradients go through the student."""
    gradients: list[Tensor] = []
    for paths in (["features.0"], ["features.0", "features.4"]):
        teacher, student, _, train = pair()
        found: list[Tensor] = []
        student.net.features[0].depthwise0.weight.register_hook(found.append)
        config = RepairConfig(method=method, batch_size=BATCH)
        repair(student, teacher, paths, train, config, tmp_path / "repair.jsonl")
        gradients.append(found[0] * (len(paths) if method == "joint" else 1))  # a mean of losses
    equal = torch.allclose(*gradients)
    assert equal == (method != "joint")


@pytest.mark.parametrize("method", METHODS)
def test_what_a_block_gets_and_what_its_loss_is(tmp_path, method):
    """The student's own input, with the teacher's output for the teacher's input; one batch."""
    teacher, student, _, train = pair("not overwriting")
    gets: dict[str, Tensor] = {}
    handles = [
        net.net.get_submodule("tail").register_forward_pre_hook(
            lambda _, args, name=name: gets.setdefault(name, args[0].clone())
        )
        for name, net in (("teacher", teacher), ("student", student))
    ]
    images = next(train.epoch(0, 64)).images_nchw
    with torch.no_grad():
        teacher(images), student(images)
    for handle in handles:
        handle.remove()
    tail = copy.deepcopy(student.net.get_submodule("tail"))
    seen: list[Tensor] = []
    student.net.get_submodule("tail").depthwise0.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone()) if torch.is_grad_enabled() else None
    )
    config = RepairConfig(method=method, batch_size=64, lr=1e-12)
    history = tmp_path / "repair.jsonl"
    repair(student, teacher, ["tail"], train, config, history)
    (got,) = seen
    torch.testing.assert_close(got, gets["student"])
    assert not torch.allclose(got, gets["teacher"])
    with torch.no_grad():
        loss = relative_l2(tail(got), teacher.net.get_submodule("tail")(gets["teacher"]))
    line = json.loads(history.read_text().splitlines()[1])
    assert line["train_loss"] == pytest.approx(float(loss), rel=1e-4)
