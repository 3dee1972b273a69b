"""Data sets of torchvision: their files, written by hand, and sets that behave like some there."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets

from pbkd.config import PrepareConfig
from pbkd.data import Prepared
from pbkd.data import prepare as prepare_from
from pbkd.data.prepare import SPLITS
from pbkd.errors import DataError

NUM_TRAIN, NUM_TEST = 120, 60


@pytest.fixture(autouse=True)
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that were asked for; there is no network."""
    asked: list[str] = []

    def refuse(request: Any, *args: Any, **kwargs: Any) -> None:
        asked.append(request if isinstance(request, str) else request.full_url)
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


def prepare(root: Path, dataset: str, **settings: Any) -> Prepared:
    settings = {"val_fraction": 0.4, "test_fraction": 0.4, **settings}
    config = PrepareConfig(source="torchvision", path="raw", dataset=dataset, **settings)
    return prepare_from(config, 0, root / "prepared", root, root / "downloads")


def _images(num: int, *shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), np.uint8)


def _labels(num: int, num_classes: int = 10) -> NDArray[np.int64]:
    return np.random.default_rng(1).permutation(np.arange(num) % num_classes)


def _counted(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Counter[tuple[bytes, int]]:
    """(N, C, H, W) images with their labels."""
    return Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def _content(prepared: Prepared, *names: str) -> Counter[tuple[bytes, int]]:
    splits = [prepared.split(name) for name in names]
    return sum((_counted(split.images, split.labels) for split in splits), Counter())


# ---------------------------------------------------------------- sets with `train=`


def _write_mnist(folder: Path) -> dict[str, Counter[tuple[bytes, int]]]:
    """Raw idx files (LeCun): big-endian magic number and sizes, then bytes."""
    folder.mkdir(parents=True)
    written = {}
    for name, num in (("train", NUM_TRAIN), ("t10k", NUM_TEST)):
        images, labels = _images(num, 28, 28, seed=num), _labels(num)
        header = np.array([0x803, num, 28, 28], ">i4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x801, num], ">i4").tobytes()
        content = header + labels.astype(np.uint8).tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(content)
        written[name] = _counted(images[:, None], labels)
    return written


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
@pytest.mark.parametrize("where", ["raw", "downloads"])
def test_gray_images_of_idx_files(
    tmp_path: Path, dataset: str, where: str, requests: list[str]
) -> None:
    written = _write_mnist(tmp_path / where / dataset / "raw")
    prepared = prepare(tmp_path, dataset)
    assert prepared.image_shape == (1, 28, 28)
    assert prepared.meta.num_images == {"train": 72, "val": 48, "test": NUM_TEST}
    assert _content(prepared, "train", "val") == written["train"]
    assert _content(prepared, "test") == written["t10k"]
    assert prepared.meta.class_names == tuple(getattr(datasets, dataset).classes)
    assert requests == []


@pytest.mark.parametrize(("channels", "num"), [("rgb", 3), ("gray", 1)])
def test_channels_and_size_may_be_set(tmp_path: Path, channels: str, num: int) -> None:
    _write_mnist(tmp_path / "raw" / "FashionMNIST" / "raw")
    prepared = prepare(tmp_path, "FashionMNIST", channels=channels, image_size=32)
    assert prepared.image_shape == (num, 32, 32)


def _write_cifar10(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Counter[tuple[bytes, int]]]:
    """Pickled batches as in cifar-10-python.tar.gz, and their checksums in torchvision's class."""
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    sums, written = [], {}
    for seed, name in enumerate(names):
        images, labels = _images(40, 3, 32, 32, seed=seed), _labels(40)
        batch = {"data": images.reshape(40, -1), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
        written[name] = _counted(images, labels)
        sums.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
    classes = ["airplane", *(f"class {number}" for number in range(1, 10))]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    meta = datasets.CIFAR10.meta | {
        "md5": hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    }
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    train = sum((written[name] for name in names[:5]), Counter())
    return {"train": train, "test": written["test_batch"]}


def test_colour_images_of_pickled_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = _write_cifar10(tmp_path / "raw" / "cifar-10-batches-py", monkeypatch)
    prepared = prepare(tmp_path, "CIFAR10")
    assert prepared.image_shape == (3, 32, 32)
    assert prepared.meta.class_names[:2] == ("airplane", "class 1")
    assert _content(prepared, "train", "val") == written["train"]
    assert _content(prepared, "test") == written["test"]


def test_a_damaged_file_of_a_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "raw" / "cifar-10-batches-py"
    _write_cifar10(folder, monkeypatch)
    (folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"CIFAR10 is neither in .* nor could it be"):
        prepare(tmp_path, "CIFAR10")
    assert not (tmp_path / "prepared").exists()


# ---------------------------------------------------------------- without a network


@pytest.mark.parametrize(
    ("dataset", "folder", "files"),
    [
        ("CIFAR10", "downloads", ["cifar-10-python.tar.gz"]),
        ("CIFAR100", "downloads", ["cifar-100-python.tar.gz"]),
        ("FashionMNIST", "downloads/FashionMNIST/raw", ["t10k-images-idx3-ubyte.gz"]),
        ("SVHN", "downloads", ["train_32x32.mat", "test_32x32.mat"]),
        ("STL10", "downloads", ["stl10_binary.tar.gz"]),
        ("USPS", "downloads", ["usps.bz2"]),
    ],
)
def test_missing_files_are_named_with_their_folder(
    tmp_path: Path, dataset: str, folder: str, files: list[str], requests: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, dataset)
    message = str(caught.value)
    assert f"prepare.dataset: {dataset} is neither in {tmp_path / 'raw'} nor could" in message
    advice = message.partition(f"; put its files into {tmp_path / folder}: ")[2]
    assert set(files) <= set(advice.split(", ")), message
    assert requests
    assert not (tmp_path / "prepared").exists()
    assert not (tmp_path / "raw").exists()


def test_a_file_that_was_put_where_the_message_says_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str]
) -> None:
    written = _write_cifar10(tmp_path / "packed" / "cifar-10-batches-py", monkeypatch)
    (tmp_path / "downloads").mkdir()
    path = tmp_path / "downloads" / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "packed" / "cifar-10-batches-py", "cifar-10-batches-py")
    checksum = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", checksum)
    assert _content(prepare(tmp_path, "CIFAR10"), "test") == written["test"]
    assert requests == []


# ---------------------------------------------------------------- sets with `split=`


def test_a_set_whose_splits_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SVHN knows train, test and extra; the labels of its file go from 1 to 10, 10 being 0."""
    (tmp_path / "raw").mkdir()
    entries = dict(datasets.SVHN.split_list)
    written = {}
    for name, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        images, labels = _images(num, 3, 32, 32, seed=num), _labels(num)
        path = tmp_path / "raw" / f"{name}_32x32.mat"
        stored = {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels, labels, 10)[:, None]}
        scipy.io.savemat(path, stored)
        written[name] = _counted(images, labels)
        checksum = hashlib.md5(path.read_bytes()).hexdigest()
        entries[name] = [*entries[name][:2], checksum]
    monkeypatch.setattr(datasets.SVHN, "split_list", entries)
    prepared = prepare(tmp_path, "SVHN")
    assert prepared.meta.class_names == tuple("0123456789")
    assert _content(prepared, "train", "val") == written["train"]
    assert _content(prepared, "test") == written["test"]


class Fake(datasets.VisionDataset):
    """A set as torchvision's are, of 4 x 4 images whose pixels tell split and place."""

    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    names: ClassVar[list[str] | None] = ["cat", "dog"]
    label: ClassVar[Callable[[int], Any]] = staticmethod(lambda index: index % 2)
    opened: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, root: str, split: str = "train", *, kind: str = "a", top: int = 9) -> None:
        super().__init__(root)
        if split not in self.splits:
            raise ValueError(
                f"Unknown value '{split}' for argument split. Valid values are {self.splits}."
            )
        self.opened.append({"root": root, "split": split, "kind": kind, "top": top})
        self.number = self.splits.index(split)
        if self.names is not None:
            self.classes = self.names

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return Image.new("RGB", (4, 4), (self.number, index, 0)), self.label(index)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    class Shown(Fake):
        opened: ClassVar[list[dict[str, Any]]] = []

    monkeypatch.setattr(datasets, "Shown", Shown, raising=False)
    monkeypatch.setattr(datasets, "__all__", (*datasets.__all__, "Shown"))
    return Shown


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "val", "test"), {"train": {0}, "val": {1}, "test": {2}}),
        (("test", "valid", "train"), {"train": {2}, "val": {1}, "test": {0}}),
        (("train", "validation", "test", "extra"), {"train": {0}, "val": {1}, "test": {2}}),
        (("trainval", "test"), {"train": {0}, "val": {0}, "test": {1}}),
        (("train", "trainval", "val", "test"), {"train": {0}, "val": {2}, "test": {3}}),
        (("train", "val"), {"train": {0}, "val": {0}, "test": {1}}),
        (("train", "extra"), {"train": {0}, "val": {0}, "test": {0}}),
    ],
)
def test_splits_of_a_set_stay(
    tmp_path: Path, fake: type[Fake], splits: tuple[str, ...], expected: dict[str, set[int]]
) -> None:
    fake.splits = splits
    prepared = prepare(tmp_path, "Shown")
    found = {name: set(prepared.split(name).images[:, 0].ravel().tolist()) for name in SPLITS}
    assert found == expected
    for name in SPLITS:  # the label belongs to the image
        split = prepared.split(name)
        assert np.array_equal(split.images[:, 1, 0, 0] % 2, split.labels)


def test_arguments_are_passed_on(tmp_path: Path, fake: type[Fake]) -> None:
    prepare(tmp_path, "Shown", arguments={"kind": "b", "top": 3})
    expected = {"root": str(tmp_path / "raw"), "kind": "b", "top": 3}
    assert fake.opened == [expected | {"split": split} for split in SPLITS]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kund": "b"}, r"prepare\.arguments: Shown: .*unexpected keyword argument 'kund'"),
        ({"root": "x"}, r"prepare\.arguments: Shown: .*multiple values .* 'root'"),
    ],
)
def test_arguments_that_a_set_does_not_take_are_named(
    tmp_path: Path, fake: type[Fake], arguments: dict[str, str], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        prepare(tmp_path, "Shown", arguments=arguments)


def test_other_values_that_a_set_refuses_are_told(
    tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, root: str, split: str) -> None:
        raise ValueError("the fold must be from 1 to 10")

    monkeypatch.setattr(fake, "__init__", refuse)
    with pytest.raises(DataError, match=r"prepare\.dataset: Shown: the fold must be from 1 to 10"):
        prepare(tmp_path, "Shown")


def test_a_set_with_train_and_split_takes_split_from_the_arguments(
    tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As EMNIST, where `split` names a part of the classes."""
    given = []

    def init(self: Any, root: str, split: str, train: bool) -> None:
        given.append((split, train))
        Fake.__init__(self, root, "train" if train else "test")

    monkeypatch.setattr(fake, "__init__", init)
    prepared = prepare(tmp_path, "Shown", arguments={"split": "letters"})
    assert given == [("letters", True), ("letters", False)]
    assert set(prepared.split("test").images[:, 0].ravel().tolist()) == {2}


def test_a_set_without_a_training_split_is_refused(tmp_path: Path, fake: type[Fake]) -> None:
    fake.splits = ("test", "val")
    with pytest.raises(DataError, match=r"prepare\.dataset: Shown has no training split"):
        prepare(tmp_path, "Shown")


def test_classes_without_names_are_numbered(tmp_path: Path, fake: type[Fake]) -> None:
    fake.names = None
    assert prepare(tmp_path, "Shown").meta.class_names == ("0", "1")


LABELS: dict[str, tuple[Callable[[int], Any], str]] = {
    "two numbers": (lambda index: (1, 2), "expected one class number per image"),
    "box": (lambda index: np.zeros(4), "expected one class number per image"),
    "mask": (lambda index: np.zeros((4, 4), np.int64), "expected one class number per image"),
    "real number": (lambda index: 0.5, "expected one class number per image"),
    "text": (lambda index: "cat", "expected one class number per image"),
    "none": (lambda index: None, "expected one class number per image"),
    "negative": (lambda index: index % 2 - 1, "expected one class number per image"),
    "unnamed": (lambda index: index % 3, "label 2 has no class name"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_set_for_another_task_is_refused(tmp_path: Path, fake: type[Fake], kind: str) -> None:
    label, match = LABELS[kind]
    fake.label = staticmethod(label)
    with pytest.raises(DataError, match=match):
        prepare(tmp_path, "Shown")
    assert not (tmp_path / "prepared").exists()


def test_a_set_that_gives_no_images_is_refused(
    tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "__getitem__", lambda self, index: (torch.zeros(3, 4, 4), index % 2))
    with pytest.raises(DataError, match="Shown gives Tensor, expected images"):
        prepare(tmp_path, "Shown")


@pytest.mark.parametrize("attribute", ["targets", "labels", "_labels"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_labels_that_a_set_holds_are_taken_without_opening_its_images(
    tmp_path: Path, fake: type[Fake], attribute: str, kind: Callable[[list[int]], Any]
) -> None:
    opened = []
    setattr(fake, attribute, kind([1 - index % 2 for index in range(20)]))
    fake.label = staticmethod(lambda index: opened.append(index) or index % 2)
    prepared = prepare(tmp_path, "Shown", limit=4)
    split = prepared.split("test")
    assert np.array_equal(1 - split.images[:, 1, 0, 0] % 2, split.labels)
    assert len(opened) <= 2 * 3 * 4  # those of the limit, and to look at the first


# ---------------------------------------------------------------- sets that cannot be used


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("CIFAR11", "did you mean `CIFAR100?`"),
        ("fashionMNIST", "did you mean `FashionMNIST`"),
        ("SVNH", "did you mean `SVHN`"),
        ("zzz", "see torchvision.datasets"),
        ("wrap_dataset_for_transforms_v2", "torchvision has no"),  # a function
        ("mnist", "torchvision has no"),  # a module
    ],
)
def test_an_unknown_set_names_the_nearest(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(DataError, match=rf"prepare\.dataset: torchvision has no `{name}`; ") as e:
        prepare(tmp_path, name)
    assert e.match(hint)


@pytest.mark.parametrize("dataset", ["FakeData", "EuroSAT", "Caltech101", "VOCDetection"])
def test_a_set_without_splits_is_refused(tmp_path: Path, dataset: str) -> None:
    match = f"{dataset} has neither a `train` nor a `split` argument; export it as an image folder"
    with pytest.raises(DataError, match=match):
        prepare(tmp_path, dataset)
