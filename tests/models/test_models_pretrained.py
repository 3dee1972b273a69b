"""A teacher's weights from files and from torchvision."""

from __future__ import annotations

import io
import re
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from pbkd.config import AugmentConfig, SeparableConfig, TeacherConfig
from pbkd.errors import PbkdError, TeacherError
from pbkd.models import (
    ModelCard,
    NetworkSpec,
    build_classifier,
    build_network,
    load_pretrained,
    pretrained_transforms,
    save_model,
)

State = dict[str, Tensor]
CLASSES = ("cat", "dog", "owl")
RESNET = "ResNet18_Weights.IMAGENET1K_V1"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where torchvision's weights lie."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def _net(
    name: str = "vgg_small", num_classes: int = 3, seed: int = 0, width: float = 0.1
) -> nn.Module:
    """Random weights, random batch-norm statistics."""
    torch.manual_seed(seed)
    own = {"vgg_small", "cifar_resnet20"}
    spec = NetworkSpec(
        name=name, num_classes=num_classes, in_channels=3, width=width if name in own else 1.0
    )
    net = build_network(spec)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return net


def _config(weights: str = "weights.pt", **settings: Any) -> TeacherConfig:
    return TeacherConfig(**{"model": "vgg_small", "width": 0.1, "weights": weights, **settings})


def _same(net: nn.Module, state: State) -> set[str]:
    """Names of the tensors that are as in a state."""
    own = net.state_dict()
    return {
        name for name, value in own.items() if name in state and torch.equal(value, state[name])
    }


HEAD = {"classifier.weight", "classifier.bias"}
SOURCE = dict(_net(seed=1).state_dict())


# ---------------------------------------------------------------- kinds of files


def _prefixed(prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in SOURCE.items()}


NORMALISED = _prefixed("net.") | {
    "mean": torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1),
    "std": torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1),
}
SAVED: dict[str, Any] = {
    "state": SOURCE,
    "ordered": _net(seed=1).state_dict(),
    "state_dict": {"epoch": 3, "state_dict": SOURCE, "optimizer": {"lr": 0.1}},
    "model_state_dict": {"model_state_dict": SOURCE},
    "model": {"model": SOURCE, "best": 0.9},
    "DataParallel": _prefixed("module."),
    "compiled": _prefixed("_orig_mod."),
    "compiled, then parallel": _prefixed("module._orig_mod."),
    "parallel, then compiled": _prefixed("_orig_mod.module."),
    "nested and parallel": {"state_dict": _prefixed("module.")},
    "half": {name: t.half() if t.is_floating_point() else t for name, t in SOURCE.items()},
    "without counters": {n: t for n, t in SOURCE.items() if not n.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("kind", SAVED)
def test_files_of_torch_save(tmp_path: Path, kind: str) -> None:
    torch.save(SAVED[kind], tmp_path / "weights.pt")
    net = _net()
    loaded = load_pretrained(net, _config(), CLASSES, tmp_path)
    assert (loaded.has_new_head, loaded.mean, loaded.std) == (False, None, None)
    expected = {
        name: t.half().float() if kind == "half" and t.is_floating_point() else t
        for name, t in SOURCE.items()
    }
    assert _same(net, expected) >= {n for n in SOURCE if not n.endswith("num_batches_tracked")}


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_files_of_safetensors(tmp_path: Path, prefix: str) -> None:
    save_file(_prefixed(prefix), tmp_path / "weights.safetensors")
    net = _net()
    assert not load_pretrained(net, _config("weights.safetensors"), CLASSES, tmp_path).has_new_head
    assert _same(net, SOURCE) == set(SOURCE)


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt"])
@pytest.mark.parametrize("stem", ["a/weights", "My_Weights"])
def test_a_files_name_is_not_taken_for_torchvisions(tmp_path: Path, stem: str, ending: str) -> None:
    path = tmp_path / f"{stem}.{ending}"
    path.parent.mkdir(exist_ok=True)
    torch.save(SOURCE, path)
    net = _net()
    assert pretrained_transforms(f"{stem}.{ending}") is None
    load_pretrained(net, _config(f"{stem}.{ending}"), CLASSES, tmp_path)
    assert _same(net, SOURCE) == set(SOURCE)


def test_an_absolute_path(tmp_path: Path) -> None:
    torch.save(SOURCE, tmp_path / "weights.pt")
    net = _net()
    load_pretrained(net, _config(str(tmp_path / "weights.pt")), CLASSES, tmp_path / "root")
    assert _same(net, SOURCE) == set(SOURCE)


def test_normalisation_in_the_file_is_given_back(tmp_path: Path) -> None:
    torch.save(NORMALISED, tmp_path / "weights.pt")
    net = _net()
    loaded = load_pretrained(net, _config(), CLASSES, tmp_path)
    assert _same(net, SOURCE) == set(SOURCE)
    assert loaded.mean == pytest.approx((0.1, 0.2, 0.3))
    assert loaded.std == pytest.approx((0.4, 0.5, 0.6))


@pytest.mark.parametrize("outer", ["", "module.", "net."])
def test_a_network_whose_own_names_begin_with_a_prefix(tmp_path: Path, outer: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = _net(seed=seed)

    state = Wrapped(1).state_dict()
    torch.save({f"{outer}{name}": t for name, t in state.items()}, tmp_path / "weights.pt")
    net = Wrapped(0)
    load_pretrained(net, _config(), CLASSES, tmp_path)
    assert _same(net, state) == set(state)


def test_modules_that_ask_for_their_version(tmp_path: Path) -> None:
    """MNASNet refuses tensors that do not say of which version they are."""
    state = dict(_net("mnasnet0_5", seed=1).state_dict())
    save_file(state, tmp_path / "weights.safetensors")
    net = _net("mnasnet0_5")
    config = _config("weights.safetensors", model="mnasnet0_5", width=1)
    load_pretrained(net, config, CLASSES, tmp_path)
    assert _same(net, state) == set(state)


# ---------------------------------------------------------------- a folder of pbkd's


CARD = ModelCard(
    network=NetworkSpec(name="vgg_small", num_classes=3, in_channels=3, width=0.1),
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    image_size=(8, 8),
    class_names=CLASSES,
    augment=AugmentConfig(),
    data_digest="d",
)


def _save_model(folder: Path, **changes: Any) -> State:
    card = CARD.model_copy(update=changes)
    torch.manual_seed(1)
    model = build_classifier(card)
    save_model(folder, model, card)
    return dict(model.net.state_dict())


@pytest.mark.parametrize("weights", ["model", "model/model.safetensors"])
@pytest.mark.parametrize("head", ["auto", "keep"])
def test_a_model_of_pbkd_with_the_same_classes(tmp_path: Path, weights: str, head: str) -> None:
    state = _save_model(tmp_path / "model")
    net = _net()
    loaded = load_pretrained(net, _config(weights, epochs=0, head=head), CLASSES, tmp_path)
    assert not loaded.has_new_head
    assert _same(net, state) == set(state)
    assert loaded.mean == pytest.approx(CARD.mean)
    assert loaded.std == pytest.approx(CARD.std)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("dog", "cat", "owl"), "`cat` stands where the data has `dog`"),
        (("cat", "dog", "pig"), "`owl` stands where the data has `pig`"),
    ],
)
def test_a_model_of_pbkd_with_other_classes(
    tmp_path: Path, names: tuple[str, ...], match: str
) -> None:
    state = _save_model(tmp_path / "model")
    with pytest.raises(TeacherError, match=f"was made for other classes: {match}; rename"):
        load_pretrained(_net(), _config("model"), names, tmp_path)
    for head, expected in (("keep", set(state)), ("new", set(state) - HEAD)):
        net = _net()
        loaded = load_pretrained(net, _config("model", head=head), names, tmp_path)
        assert loaded.has_new_head is (head == "new")
        assert _same(net, state) == expected


def test_a_model_of_pbkd_with_more_classes_gets_a_new_head(tmp_path: Path) -> None:
    network = CARD.network.model_copy(update={"num_classes": 5})
    state = _save_model(tmp_path / "model", network=network, class_names=tuple("abcde"))
    net = _net()
    assert load_pretrained(net, _config("model"), CLASSES, tmp_path).has_new_head
    assert _same(net, state) == set(state) - HEAD


def test_a_compressed_student_is_refused(tmp_path: Path) -> None:
    _save_model(tmp_path / "model", replacements={"features.3": SeparableConfig()})
    with pytest.raises(TeacherError, match="is a compressed student"):
        load_pretrained(_net(), _config("model"), CLASSES, tmp_path)


# ---------------------------------------------------------------- files that cannot be used


def _fails(
    root: Path, match: str, weights: str = "weights.pt", kind: type[PbkdError] = TeacherError
) -> None:
    net = _net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(kind, match=match):
        load_pretrained(net, _config(weights), CLASSES, root)
    assert _same(net, before) == set(before)


OTHERS: dict[str, Callable[[], Any]] = {
    "other architecture": lambda: _net("cifar_resnet20").state_dict(),
    "other width": lambda: _net(width=0.2).state_dict(),
    "a tensor less": lambda: {n: t for n, t in SOURCE.items() if n != "features.0.weight"},
    "a tensor more": lambda: SOURCE | {"more": torch.ones(1)},
    "a statistic less": lambda: {
        n: t for n, t in SOURCE.items() if not n.endswith("1.running_var")
    },
    "no tensors": dict,
    "unknown prefix": lambda: _prefixed("backbone."),
    "prefix of some": lambda: SOURCE | {"module.more": torch.ones(1)},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("head", ["auto", "keep", "new"])
def test_weights_of_another_architecture_are_refused(tmp_path: Path, kind: str, head: str) -> None:
    torch.save(OTHERS[kind](), tmp_path / "weights.pt")
    match = r"weights\.pt is of another architecture than vgg_small: \d+ of its \d+ tensors are mis"
    with pytest.raises(TeacherError, match=match):
        load_pretrained(_net(), _config(head=head), CLASSES, tmp_path)


def test_the_message_counts_what_differs(tmp_path: Path) -> None:
    state = dict(SOURCE)
    del state["features.0.weight"]
    state |= {"more": torch.ones(1), "features.3.weight": torch.ones(1), "other": torch.ones(1)}
    torch.save(state, tmp_path / "weights.pt")
    match = (
        f"1 of its {len(SOURCE)} tensors are missing, 2 are unknown, 1 have another shape "
        r"\(such as features\.0\.weight\); change teacher\.model, teacher\.width or the file"
    )
    _fails(tmp_path, match)


CONTENTS: dict[str, Any] = {
    "list": [1, 2],
    "tensor": torch.ones(3),
    "numbers": {"a": 1.0},
    "nested numbers": {"state_dict": {"a": 1}},
    "numbered tensors": {0: torch.ones(1)},
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_of_something_else_is_refused(tmp_path: Path, kind: str) -> None:
    torch.save(CONTENTS[kind], tmp_path / "weights.pt")
    _fails(tmp_path, r"weights\.pt holds \w+, expected tensors by name, as model\.state_dict\(\)")


def _saved(legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(SOURCE, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, legacy: bool) -> None:
    whole = _saved(legacy)
    for kept in [*range(0, len(whole), len(whole) // 30), len(whole) - 1]:
        (tmp_path / "weights.pt").write_bytes(whole[:kept])
        with pytest.raises(TeacherError, match=r"weights\.pt (is not a whole|is no) file of torch"):
            load_pretrained(_net(), _config(), CLASSES, tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_of_safetensors_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(SOURCE, path)
    path.write_bytes(path.read_bytes()[:kept])
    _fails(tmp_path, "teacher.weights: .* is not a whole safetensors file", path.name)


@pytest.mark.parametrize(
    "content", [b"text, not weights\n" * 30, bytes(range(256)) * 4, b"PK\x03\x04"]
)
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "weights"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    _fails(tmp_path, f"teacher.weights: .*{name} is n", name)


@pytest.mark.parametrize("name", ["weights.pt", "folder", "ResNet18"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    _fails(tmp_path, rf"{name}\S* does not exist; expected a file of .* ResNet18_Weights", name)


class Code:
    """What a pickle can do: make a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_file_is_not_run(tmp_path: Path, nested: bool, legacy: bool) -> None:
    content: Any = Code(tmp_path / "ran")
    content = {"state_dict": SOURCE, "args": content} if nested else content
    torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=not legacy)
    _fails(tmp_path, "holds more than tensors, and code in it is not run")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # the trap works


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(_net(), tmp_path / "weights.pt")
    _fails(tmp_path, r"save the weights alone, .* torch\.save\(model\.state_dict\(\), \.\.\.\)")


# ---------------------------------------------------------------- the head


def _head_file(root: Path, num_classes: int) -> State:
    state = dict(_net(num_classes=num_classes, seed=1).state_dict())
    torch.save(state, root / "weights.pt")
    return state


@pytest.mark.parametrize(
    ("head", "num_classes", "is_new"),
    [("auto", 3, False), ("keep", 3, False), ("new", 3, True), ("auto", 7, True), ("new", 7, True)],
)
def test_a_new_head_keeps_its_fresh_weights(
    tmp_path: Path, head: str, num_classes: int, is_new: bool
) -> None:
    state = _head_file(tmp_path, num_classes)
    net, fresh = _net(), dict(_net().state_dict())
    loaded = load_pretrained(net, _config(head=head), CLASSES, tmp_path)
    assert loaded.has_new_head is is_new
    assert _same(net, state) == set(state) - (HEAD if is_new else set())
    assert (_same(net, fresh) >= HEAD) is is_new


def test_weights_without_a_head_get_a_new_one(tmp_path: Path) -> None:
    state = {name: value for name, value in SOURCE.items() if name not in HEAD}
    torch.save(state, tmp_path / "weights.pt")
    net = _net()
    assert load_pretrained(net, _config(), CLASSES, tmp_path).has_new_head
    assert _same(net, SOURCE) == set(state)


def test_a_head_that_does_not_fit_cannot_be_kept(tmp_path: Path) -> None:
    _head_file(tmp_path, 7)
    match = r"teacher\.head: keep: the head of weights\.pt does not give 3 classes; set .* new"
    with pytest.raises(TeacherError, match=match):
        load_pretrained(_net(), _config(head="keep"), CLASSES, tmp_path)


@pytest.mark.parametrize(("head", "num_classes"), [("new", 3), ("auto", 7)])
def test_a_new_head_must_be_trained(tmp_path: Path, head: str, num_classes: int) -> None:
    _head_file(tmp_path, num_classes)
    match = r"weights\.pt has no head for 3 classes, and teacher\.epochs is 0"
    with pytest.raises(TeacherError, match=match):
        load_pretrained(_net(), _config(head=head, epochs=0), CLASSES, tmp_path)


# ---------------------------------------------------------------- torchvision's


def test_transforms_are_those_of_torchvision() -> None:
    found = pretrained_transforms(RESNET)
    assert found is not None
    assert (found.size, found.resize, found.interpolation) == (224, 256, "bilinear")
    assert found.mean == (0.485, 0.456, 0.406)
    assert found.std == (0.229, 0.224, 0.225)
    other = pretrained_transforms("EfficientNet_B1_Weights.IMAGENET1K_V2")
    assert other is not None
    assert (other.size, other.resize, other.interpolation) == (240, 255, "bilinear")
    newest = pretrained_transforms("ResNet50_Weights.DEFAULT")
    assert newest == pretrained_transforms("ResNet50_Weights.IMAGENET1K_V2")
    assert newest is not None
    assert newest.resize == 232
    assert pretrained_transforms(None) is None
    assert pretrained_transforms("weights/a.safetensors") is None


def test_every_transform_of_torchvisions_models_is_understood() -> None:
    for name in models.list_models(module=models):
        for entry in models.get_model_weights(name):
            found = pretrained_transforms(str(entry))
            assert found is not None, entry
            assert found.resize >= found.size >= 100
            assert len(found.mean) == len(found.std) == 3


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("ResNet18_Weights.IMAGENET1K_V3", r"did you mean `ResNet18_Weights\.IMAGENET1K_V1`\?"),
        ("Resnet18_Weights.IMAGENET1K_V1", r"did you mean `ResNet18_Weights\.IMAGENET1K_V1`\?"),
        ("VGG16BN_Weights.IMAGENET1K_V1", r"did you mean `VGG16_\S*Weights\.IMAGENET1K_V1`\?"),
        ("Q_Weights.x", r"expected one such as \w+_Weights\.IMAGENET1K_V1"),
    ],
)
def test_an_unknown_name_gets_the_nearest(tmp_path: Path, name: str, match: str) -> None:
    expected = f"teacher.weights: torchvision has no `{re.escape(name)}`; {match}"
    with pytest.raises(TeacherError, match=expected):
        pretrained_transforms(name)
    with pytest.raises(TeacherError, match=expected):
        load_pretrained(_net(), _config(name), CLASSES, tmp_path)


def test_weights_for_another_task_are_refused() -> None:
    name = "FasterRCNN_ResNet50_FPN_Weights.COCO_V1"
    with pytest.raises(TeacherError, match=f"{name} is not for classification of images"):
        pretrained_transforms(name)


@pytest.mark.parametrize("model", ["resnet34", "vgg_small", "package:function"])
def test_weights_of_another_model_are_refused(tmp_path: Path, hub: Path, model: str) -> None:
    config = _config(RESNET, model=model, width=1)
    with pytest.raises(TeacherError, match=f"{RESNET} is not of teacher.model `{model}`; name"):
        load_pretrained(_net(), config, CLASSES, tmp_path)


def _file_name(weights: str) -> str:
    return Path(models.get_weight(weights).url).name


@pytest.fixture(scope="module")
def resnet18() -> State:
    return dict(_net("resnet18", num_classes=1000, seed=1).state_dict())


def _resnet_config(**settings: Any) -> TeacherConfig:
    return _config(RESNET, model="resnet18", width=1, **settings)


def test_downloaded_weights_get_a_new_head(tmp_path: Path, hub: Path, resnet18: State) -> None:
    torch.save(resnet18, hub / _file_name(RESNET))
    net, fresh = _net("resnet18"), dict(_net("resnet18").state_dict())
    loaded = load_pretrained(net, _resnet_config(), CLASSES, tmp_path)
    assert loaded.has_new_head
    assert loaded.mean == (0.485, 0.456, 0.406)
    assert loaded.std == (0.229, 0.224, 0.225)
    head = {"fc.weight", "fc.bias"}
    assert _same(net, resnet18) == set(resnet18) - head
    assert _same(net, fresh) >= head


def test_downloaded_weights_keep_the_head_for_their_own_classes(
    tmp_path: Path, hub: Path, resnet18: State
) -> None:
    torch.save(resnet18, hub / _file_name(RESNET))
    names = tuple(models.get_weight(RESNET).meta["categories"])
    net = _net("resnet18", num_classes=1000)
    assert not load_pretrained(net, _resnet_config(epochs=0), names, tmp_path).has_new_head
    assert _same(net, resnet18) == set(resnet18)
    with pytest.raises(TeacherError, match="`tench` stands where the data has `goldfish`"):
        load_pretrained(net, _resnet_config(), (names[1], names[0], *names[2:]), tmp_path)


def test_old_names_in_torchvisions_files_are_understood(tmp_path: Path, hub: Path) -> None:
    """DenseNet's files say `norm.1` for what is `norm1` today (torchvision.models.densenet)."""
    state = dict(_net("densenet121", seed=1).state_dict())
    old = {re.sub(r"(denselayer\d+\.\w+)([12]\.)", r"\1.\2", n): t for n, t in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    name = "DenseNet121_Weights.IMAGENET1K_V1"
    torch.save(old, hub / _file_name(name))
    net = _net("densenet121")
    load_pretrained(net, _config(name, model="densenet121", width=1, head="new"), CLASSES, tmp_path)
    assert _same(net, state) >= set(state) - HEAD


def test_code_in_a_downloaded_file_is_not_run(tmp_path: Path, hub: Path) -> None:
    torch.save({"fc.weight": Code(tmp_path / "ran")}, hub / _file_name(RESNET))
    with pytest.raises(TeacherError, match=rf"delete {_file_name(RESNET)} in {hub}"):
        load_pretrained(_net("resnet18"), _resnet_config(), CLASSES, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"PK\x03\x04", _saved()[:-1], _saved(True)[:999]]
)
def test_a_damaged_download_is_named(tmp_path: Path, hub: Path, content: bytes) -> None:
    (hub / _file_name(RESNET)).write_bytes(content)
    match = rf"{re.escape(RESNET)}: .*delete {_file_name(RESNET)} in {hub}"
    with pytest.raises(TeacherError, match=f"(?s){match}"):
        load_pretrained(_net("resnet18"), _resnet_config(), CLASSES, tmp_path)


@pytest.mark.parametrize("has_folder", [True, False])
def test_without_a_network_file_and_folder_are_named(
    tmp_path: Path, hub: Path, has_folder: bool
) -> None:
    if not has_folder:
        shutil.rmtree(hub)
    match = (
        rf"{re.escape(RESNET)} cannot be downloaded \(.*no network.*\); without a network, put "
        rf"{_file_name(RESNET)} into {hub}, or give a file's path"
    )
    with pytest.raises(TeacherError, match=match):
        load_pretrained(_net("resnet18"), _resnet_config(), CLASSES, tmp_path)
    assert not (hub / _file_name(RESNET)).exists()
