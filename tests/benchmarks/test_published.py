"""The baselines of benchmarks/blocks.py train what pbkd trains: they differ in time alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.published import Joint, Published, Recipe, Torchdistill
from pbkd.activations import Capture, RelaySource
from pbkd.blocks import build_candidate
from pbkd.config import AugmentConfig, DistillConfig, SeparableConfig
from pbkd.data import Stream
from pbkd.distill import TraineeSpec
from pbkd.distill.trainee import Trainee
from pbkd.models import Classifier
from pbkd.testing import random_split

PATHS = ("0", "2", "4")
BATCH, EPOCHS = 4, 3
BASELINES = [
    Published,
    Joint,
    pytest.param(
        Torchdistill,
        marks=pytest.mark.skipif(not Torchdistill.installed(), reason="needs torchdistill"),
    ),
]


@pytest.fixture
def teacher() -> Classifier:
    torch.manual_seed(0)
    convs = [nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
    net = nn.Sequential(
        *[layer for conv in convs for layer in (conv, nn.ReLU(inplace=True))],
        nn.Flatten(),
        nn.Linear(8 * 36, 3),
    )
    return Classifier(net, (0.5,), (0.25,)).eval().requires_grad_(False)


@pytest.fixture
def train() -> Stream:
    return Stream(random_split(13), seed=0, augment=AugmentConfig(pad=1, flip=True), views=2)


@pytest.fixture
def candidates(teacher: Classifier) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    config = SeparableConfig(depth=2)
    return {path: build_candidate(config, teacher.net.get_submodule(path)) for path in PATHS}


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(batch_size=BATCH, lr=2e-3, weight_decay=0.01, num_steps=9, dtype=torch.float16)


def weights(candidates: dict[str, nn.Module]) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for m in candidates.values() for p in m.parameters()])


def trained_by_pbkd(
    teacher: Classifier,
    candidates: dict[str, nn.Module],
    train: Stream,
    recipe: Recipe,
    folder: Path,
) -> torch.Tensor:
    """Weights after the same epochs of pbkd's relay and trainees; trains the candidates."""
    config = DistillConfig(lr=recipe.lr, weight_decay=recipe.weight_decay)
    capture = Capture(teacher, PATHS, next(train.epoch(0, BATCH)).images_nchw, recipe.dtype)
    source = RelaySource(capture, train, train, BATCH)
    trainees = []
    for path, module in candidates.items():
        spec = TraineeSpec(
            block=path, config=SeparableConfig(depth=2), seed=0, key=path, score_key=path
        )
        trainees.append(Trainee(spec, module, config, recipe.num_steps, folder / path))
    for epoch in range(EPOCHS):
        for activations in source.epoch(epoch, PATHS):
            for trainee in trainees:
                trainee.step(activations[trainee.spec.block])
    return weights(candidates)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_baseline_trains_the_weights_that_pbkd_trains(
    baseline, layout, teacher, candidates, train, recipe, tmp_path
):
    if baseline is Torchdistill:  # it keeps references, which the ReLU would overwrite
        for relu in (m for m in teacher.modules() if isinstance(m, nn.ReLU)):
            relu.inplace = False
    trained = baseline(teacher, candidates, train, replace(recipe, layout=layout))
    start = weights(candidates)
    for epoch in range(EPOCHS):
        trained.epoch(epoch)
    assert torch.equal(weights(candidates), start)  # it trained copies
    expected = trained_by_pbkd(teacher, candidates, train, recipe, tmp_path)
    assert not torch.allclose(expected, start, atol=1e-3)
    torch.testing.assert_close(weights(trained.candidates), expected, atol=1e-4, rtol=1e-3)


def test_the_published_algorithm_stops_behind_the_block(teacher, candidates, train, recipe):
    published = Published(teacher, candidates, train, recipe)
    calls = []
    for path in PATHS:
        published.teacher.net.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: calls.append(path)
        )
    published.epoch(0)
    steps = 13 // BATCH
    assert [calls.count(path) for path in PATHS] == [3 * steps, 2 * steps, 1 * steps]
