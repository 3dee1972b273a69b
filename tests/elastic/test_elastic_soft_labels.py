"""Kept labels: what is written of a view, what is read back, and what students learn from it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pbkd.config import AugmentConfig, FinetuneConfig
from pbkd.data import Stream
from pbkd.elastic.soft_labels import SoftLabels, labels_key, write_labels
from pbkd.models import Classifier, ModelCard, NetworkSpec
from pbkd.students import finetune
from pbkd.testing import random_split

IMAGES, CLASSES, T = 300, 7, 3.0
AUGMENT = AugmentConfig(pad=1, flip=True)
CARD = ModelCard(
    network=NetworkSpec(name="vgg_small", num_classes=CLASSES, in_channels=1),
    mean=(0.5,),
    std=(0.25,),
    image_size=(8, 8),
    class_names=tuple(map(str, range(CLASSES))),
    augment=AUGMENT,
    data_digest="data",
    digest="teacher",
)


def stream(views: int | None = None) -> Stream:
    return Stream(random_split(IMAGES), seed=3, augment=AUGMENT, views=views)


def network(scale: float = 1.0) -> Classifier:
    torch.manual_seed(0)
    pixels = random_split(1).images[0].size
    layer = nn.Linear(pixels, CLASSES)
    with torch.no_grad():
        layer.weight.mul_(scale)
    return Classifier(nn.Sequential(nn.Flatten(), layer), (0.5,), (0.25,)).eval()


def labels(
    folder: Path, teacher: Classifier, *, views: int = 2, top: int | None = None
) -> SoftLabels:
    folders = [folder / f"{view}" for view in range(views)]
    for view, path in enumerate(folders):
        path.mkdir(parents=True)
        write_labels(path, teacher, stream(), view, top, T)
    return SoftLabels(folders, CLASSES, T, "cpu")


def test_every_batch_of_every_epoch_gets_its_own_labels(tmp_path: Path) -> None:
    teacher = network(5.0)
    soft = labels(tmp_path, teacher)
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for epoch in range(4):
        for batch in stream(views=2).epoch(epoch, 50):
            with torch.no_grad():
                expected = teacher(batch.images_nchw)
            torch.testing.assert_close(soft(batch), expected, rtol=1e-3, atol=1e-3)
            assert batch.view == epoch % 2
            seen[batch.view] |= set(batch.rows.tolist())
    assert seen == {0: set(range(IMAGES)), 1: set(range(IMAGES))}


def test_they_take_two_bytes_per_image_and_class(tmp_path: Path) -> None:
    labels(tmp_path, network())
    array = np.load(tmp_path / "1" / "logits.npy", allow_pickle=False)
    assert (array.shape, array.dtype) == ((IMAGES, CLASSES), np.float16)


@pytest.mark.parametrize("top", [1, 2, CLASSES - 1])
def test_of_the_largest_ones_shares_are_right_and_the_rest_is_spread(
    tmp_path: Path, top: int
) -> None:
    teacher = network(5.0)
    soft = labels(tmp_path, teacher, top=top)
    for batch in stream(views=2).epoch(1, 50):
        with torch.no_grad():
            expected = (teacher(batch.images_nchw) / T).softmax(1)
        found = (soft(batch) / T).softmax(1)
        torch.testing.assert_close(found.sum(1), torch.ones(50))
        values, classes = expected.topk(top)
        torch.testing.assert_close(found.gather(1, classes), values, rtol=2e-3, atol=2e-3)
        others = found.scatter(1, classes, 0.0)
        share = others.sum(1, keepdim=True) / (CLASSES - top)
        is_other = torch.ones_like(found).scatter(1, classes, 0.0)
        torch.testing.assert_close(others, share * is_other, rtol=2e-3, atol=1e-4)


def test_as_many_as_there_are_classes_are_all_of_them(tmp_path: Path) -> None:
    labels(tmp_path, network(), top=CLASSES)
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["logits.npy"]


def test_logits_beyond_half_precision_stay_finite(tmp_path: Path) -> None:
    soft = labels(tmp_path, network(1e6))
    batch = next(stream(views=2).epoch(0, 50))
    assert bool(soft(batch).isfinite().all())


def test_a_large_view_is_read_batch_by_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft = labels(tmp_path, network())
    batch = next(stream(views=2).epoch(0, 50))
    expected = soft(batch)
    monkeypatch.setattr("pbkd.elastic.soft_labels._ON_DEVICE_BYTES", 0)
    again = SoftLabels([tmp_path / "0", tmp_path / "1"], CLASSES, T, "cpu")
    assert torch.equal(again(batch), expected)


def test_a_student_learns_from_them_what_it_learns_from_the_teacher(tmp_path: Path) -> None:
    teacher, student = network(5.0), network()
    soft = labels(tmp_path / "labels", teacher)
    config = FinetuneConfig(epochs=3, batch_size=50, temperature=T, label_weight=0.0, lr=0.05)
    students = []
    for number, source in enumerate((teacher, soft)):
        one = copy.deepcopy(student)
        history = tmp_path / f"{number}.jsonl"
        finetune(one, source, stream(views=2), stream(), config, history)
        students.append(one.net[1].weight)
    assert not torch.allclose(students[0], student.net[1].weight, atol=1e-3)
    torch.testing.assert_close(*students, rtol=5e-3, atol=5e-4)


def test_a_key_stands_for_all_that_labels_depend_on() -> None:
    def key(card: ModelCard = CARD, seed: int = 0, view: int = 0, **config: object) -> str:
        return labels_key(card, FinetuneConfig.model_validate(config), seed, view)

    keys = [
        key(),
        key(seed=1),
        key(view=1),
        key(CARD.model_copy(update={"digest": "other"})),
        key(CARD.model_copy(update={"data_digest": "other"})),
        key(CARD.model_copy(update={"augment": AugmentConfig()})),
        key(top_labels=3),
        key(top_labels=3, temperature=2.0),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == key(temperature=2.0, epochs=1, lr=1.0, views=3)
