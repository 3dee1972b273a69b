"""`pbkd.compress`: from a model and data in memory to a student."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pbkd
from pbkd.arrays import split_of
from pbkd.config import BlocksConfig
from pbkd.errors import BlockError, BudgetError, ConfigError, DataError, PbkdError, TeacherError
from pbkd.measure import count_macs, num_parameters
from tests.models.own_networks import Odd, two_outputs

QUICK: dict[str, Any] = {
    "budget": {"max_macs": 0.75},  # what all separable ones give
    "blocks": {"exclude": ["stem"]},  # out of one channel, a separable one makes but one pattern
    "distill": {"epochs": 6, "batch_size": 16},
    "stitch": {"max_damage": 5.0, "recalibrate_batches": 2, "repair": {"batch_size": 16}},
    "finetune": {"epochs": 6, "batch_size": 16},
}


def _data(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three classes of stripes, told apart by direction and width."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 3
    across = np.indices((num, 1, 8, 8))[3]
    down = np.indices((num, 1, 8, 8))[2]
    kind = labels[:, None, None, None]
    stripes = np.where(kind == 0, across % 2, np.where(kind == 1, down % 2, across // 2 % 2))
    return (stripes * 180 + rng.integers(0, 75, stripes.shape)).astype(np.uint8), labels


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A trained odd network; it takes images in [0, 1]."""
    torch.manual_seed(0)
    net = Odd(3, 1)
    images, labels = (torch.from_numpy(array) for array in _data(192))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(images / 255), labels).backward()
        optimizer.step()
    return net.eval()


def test_an_odd_network_is_compressed_and_says_what_it_left_out(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO, logger="pbkd"):
        student = pbkd.compress(model, _data(192), _data(60, seed=1), **QUICK)
    assert "left out twice: shared module: called 2 times in one pass" in caplog.text
    done = student.compression
    assert [choice.block for choice in done.choices] == ["left", "last"]
    assert all(choice.candidate == "separable" for choice in done.choices)
    assert done.teacher_accuracy > 0.95
    assert done.accuracy > 0.9
    assert done.num_parameters == num_parameters(student) < done.teacher_num_parameters
    image = torch.zeros(1, 1, 8, 8)
    assert done.macs == count_macs(student, image) < done.teacher_macs
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    images, labels = (torch.from_numpy(array) for array in _data(60, seed=1))
    assert not student.training
    accuracy = float((student(images / 255).argmax(1) == labels).float().mean())
    assert accuracy == pytest.approx(done.accuracy)


def test_the_normalisation_is_in_the_student(model: nn.Module) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
            return self.net(x_nchw * 0.5 + 0.25)

    data, val = _data(64), _data(60, seed=1)
    quick: dict[str, Any] = {
        "budget": {"max_macs": 1.0},
        "finetune": {"epochs": 0},
        "distill": {"epochs": 1},
    }
    plain = pbkd.compress(model, data, val, **quick)
    wrapped = pbkd.compress(
        Normalised(),
        data,
        val,
        mean=[0.25],
        std=[0.5],
        **quick,
    )
    assert wrapped.compression.teacher_accuracy == plain.compression.teacher_accuracy > 0.95


def test_a_second_call_trains_nothing_again(model: nn.Module, tmp_path: Path) -> None:
    first = pbkd.compress(model, _data(96), _data(60, seed=1), folder=tmp_path, **QUICK)
    items = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    second = pbkd.compress(model, _data(96), _data(60, seed=1), folder=tmp_path, **QUICK)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")} == items
    assert len(items) > 4
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())


def test_several_budgets_give_a_family_and_a_new_one_trains_no_block(
    model: nn.Module, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**QUICK, "folder": tmp_path}
    one = pbkd.compress(model, _data(96), _data(60, seed=1), **settings)
    store = tmp_path / "store"
    trained = {path: path.stat().st_mtime_ns for path in (store / "trainees").rglob("*")}
    settings["students"] = {"all": settings.pop("budget"), "some": {"max_parameters": 0.95}}
    family = pbkd.compress(model, _data(96), _data(60, seed=1), **settings)
    assert list(family) == ["all", "some"]
    some = family["some"].compression
    assert one.compression.macs < some.macs < some.teacher_macs
    assert some.num_parameters <= some.limits["parameters"] == 0.95 * some.teacher_num_parameters
    assert {p: p.stat().st_mtime_ns for p in (store / "trainees").rglob("*")} == trained
    assert len(list((store / "students").iterdir())) == 2
    same = family["all"].state_dict()
    assert all(torch.equal(value, same[name]) for name, value in one.state_dict().items())
    assert family["all"].compression == one.compression


def test_latency_can_be_limited(model: nn.Module) -> None:
    settings: dict[str, Any] = {
        **QUICK,
        "budget": {"max_latency": "10s", "max_macs": 0.75},
        "finetune": {"epochs": 0},
    }
    done = pbkd.compress(model, _data(60), _data(60, seed=1), **settings).compression
    assert done.limits == {"latency": 10_000.0, "macs": 0.75 * done.teacher_macs}


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"max_macs": 0.1}, "(?i)keeps to .* macs; the smallest reachable is"),
        (None, "(?i)keeps to .* macs"),  # half of them; this network has nothing that small
    ],
)
def test_a_budget_that_cannot_be_kept_is_told_before_any_training(
    model: nn.Module, budget: Any, said: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**QUICK, "budget": budget, "folder": tmp_path}
    with pytest.raises(BudgetError, match=said):
        pbkd.compress(model, _data(60), _data(60, seed=1), **settings)
    assert not (tmp_path / "store").exists()


class Streamed(IterableDataset[Any]):
    """Pairs that can only be read in their order."""

    def __init__(self, pairs: list[Any]) -> None:
        self.pairs = pairs

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pairs)


def test_data_may_be_arrays_tensors_or_pairs() -> None:
    images, labels = _data(9)
    floats = torch.from_numpy(images) / 255
    pairs = [(image, int(label)) for image, label in zip(floats, labels, strict=True)]
    tensors = TensorDataset(floats, torch.from_numpy(labels))
    for given in (
        (images, labels),
        [images, list(labels)],
        tensors.tensors,
        tensors,
        DataLoader(tensors, batch_size=None),
        pairs,
        iter(pairs),
        Streamed(pairs),
    ):
        split = split_of(given, "train")
        assert split.images.dtype == np.uint8
        assert np.array_equal(split.images, images)
        assert np.array_equal(split.labels, labels)


def test_two_pairs_are_told_from_two_arrays() -> None:
    images, labels = _data(2)
    for given in (
        ([*images], [*labels]),
        [[image, label] for image, label in zip(images, labels, strict=True)],
        tuple(zip(images, labels, strict=True)),
    ):
        split = split_of(given, "train")
        assert np.array_equal(split.images, images)
        assert np.array_equal(split.labels, labels)


def test_numbers_of_numpy_and_torch_count_as_pythons(model: nn.Module, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "budget": {"max_macs": 1.0},
        "finetune": {"epochs": 0},
        "distill": {"epochs": 1},
        "folder": tmp_path,
    }
    data, val = _data(64), _data(60, seed=1)
    pbkd.compress(model, data, val, seed=1, mean=[0.25], std=[0.5], **settings)
    items = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    mean, std = torch.full((1, 1, 1), 0.25), np.float32(0.5)
    pbkd.compress(model, data, val, seed=np.int64(1), mean=mean, std=std, **settings)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")} == items


PAIRS = TensorDataset(torch.zeros(6, 1, 8, 8), torch.arange(6))


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"distill": {"epoch": 2}}, ConfigError, r"distill\.epoch: Extra inputs"),
        ({"budget": {"max_macs": "5ms"}}, ConfigError, r"stitch\.students\.compressed\.max_macs"),
        ({"budget": {"max_macs": 0.5}, "students": {}}, ConfigError, "expected one of them"),
        ({"students": {}}, ConfigError, "name a student"),
        ({"stitch": {"sweep": {"points": 3}}}, ConfigError, r"stitch\.sweep: give limits by"),
        ({"finetune": {"baselines": ["scratch"]}}, ConfigError, "only `pbkd run` trains"),
        ({"finetune": {"teachers": "cached"}}, ConfigError, "only `pbkd run` keeps labels"),
        ({"budget": 0.25}, ConfigError, "budget: got 0.25, expected limits such as"),
        ({"budget": "25%"}, ConfigError, "budget: got '25%', expected limits such as"),
        ({"budget": {"max_macs": True}}, ConfigError, "max_macs: .* expected a limit such as"),
        ({"students": {"a": 0.25}}, ConfigError, r"students\.a: got 0.25, expected limits"),
        ({"students": ["a"]}, ConfigError, r"students: got \['a'\], expected {name: limits}"),
        ({"seed": None}, ConfigError, "seed: got None, expected an integer from 0"),
        ({"seed": -1}, ConfigError, "seed: got -1, expected an integer from 0"),
        ({"seed": 0.5}, ConfigError, "seed: got 0.5, expected an integer from 0"),
        ({"mean": [0.5, 0.5]}, ConfigError, r"mean: got \[0.5, 0.5\], expected one finite number"),
        ({"mean": "gray"}, ConfigError, "mean: got 'gray', expected one finite number"),
        ({"mean": [float("nan")]}, ConfigError, r"mean: got \[nan\], expected one finite number"),
        ({"std": [float("inf")]}, ConfigError, r"std: got \[inf\], expected one finite number"),
        ({"std": [0]}, ConfigError, r"std: got \(0.0,\), expected figures above 0"),
        ({"model": two_outputs(3, 1)}, TeacherError, "gives tuple in training mode"),
        ({"blocks": BlocksConfig(select="residual")}, BlockError, "matches nothing in Odd"),
        ({"train": []}, DataError, "train: got nothing, expected .* pairs"),
        ({"train": None}, DataError, "train: got NoneType, expected .* pairs"),
        ({"train": [(np.zeros((1, 8, 8), np.uint8), 0, 1)]}, DataError, "as an item, expected"),
        ({"train": [("1.png", 0)]}, DataError, "train: pixels of type <U5, expected uint8"),
        ({"train": [(np.zeros((1, 8, 8), np.uint8), 0.5)]}, DataError, "got 0.5 as an image's"),
        ({"train": DataLoader(PAIRS, batch_size=3)}, DataError, "give its `dataset`, not the"),
        ({"train": [PAIRS, PAIRS]}, DataError, "got TensorDataset, which is no array"),
        ({"val": (_data(9)[0], _data(8)[1])}, DataError, r"labels of shape \(8,\)"),
        ({"val": (np.zeros((4, 8, 8), np.uint8), np.zeros(4, int))}, DataError, "val: images of"),
        ({"val": (np.zeros((4, 1, 8, 8)) - 1, np.zeros(4, int))}, DataError, "normalisation"),
        ({"val": (np.zeros((4, 1, 8, 8), np.uint8), np.zeros(4))}, DataError, "labels of shape"),
        (
            {"train": [(np.zeros((1, 8, 8), np.uint8), 0), (np.zeros((1, 9, 8), np.uint8), 1)]},
            DataError,
            "images of 2 shapes",
        ),
    ],
)
def test_what_cannot_be_used_is_told_before_any_training(
    model: nn.Module, change: dict[str, Any], kind: type[PbkdError], said: str
) -> None:
    arguments: dict[str, Any] = {"model": model, "train": _data(9), "val": _data(9), **change}
    with pytest.raises(kind, match=said):
        pbkd.compress(**arguments)


def test_importing_pbkd_does_not_import_torch() -> None:
    code = "import sys, pbkd; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_compressing_imports_no_orchestrator() -> None:
    code = (
        "import sys, pbkd; pbkd.compress; "
        "sys.exit(bool({'prefect', 'dvc', 'mlflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
