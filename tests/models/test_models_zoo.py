"""The zoo: parameter counts by hand, names, width."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from pbkd.errors import TeacherError
from pbkd.measure import count_macs, num_parameters
from pbkd.models import (
    Classifier,
    NetworkSpec,
    build_network,
    check_network,
    network_code,
    network_names,
)
from pbkd.models.zoo import _OWN, BasicBlock, CifarResNet


def _spec(name: str, *, channels: int = 3, classes: int = 10, width: float = 1.0) -> NetworkSpec:
    return NetworkSpec(name=name, num_classes=classes, in_channels=channels, width=width)


def _conv_parameters(net: nn.Module) -> int:
    return sum(num_parameters(m) for m in net.modules() if isinstance(m, nn.Conv2d))


def test_resnet20_has_the_known_number_of_parameters() -> None:
    # 269,722 with shortcuts free of parameters, and two projections with their batch norms
    expected = 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert expected == 272_474
    assert num_parameters(build_network(_spec("cifar_resnet20"))) == expected


@pytest.mark.parametrize(
    ("name", "num_convs", "parameters"),
    [
        ("cifar_vgg11", 8, 9_217_728),
        ("cifar_vgg13", 10, 9_402_048),
        ("cifar_vgg16", 13, 14_710_464),
        ("cifar_vgg19", 16, 20_018_880),
    ],
)
def test_vgg_convolutions_have_the_known_number_of_parameters(
    name: str, num_convs: int, parameters: int
) -> None:
    with torch.device("meta"):
        net = build_network(_spec(name))
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == num_convs
    assert _conv_parameters(net) == parameters
    norms = sum(2 * m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert num_parameters(net) == parameters + norms + 512 * 10 + 10


def test_a_narrow_vgg_by_hand() -> None:
    channels = [1, 8, 8, 16, 16, 32, 32]
    pairs = list(itertools.pairwise(channels))
    convs = sum(9 * i * o for i, o in pairs)
    norms = sum(2 * o for _, o in pairs)
    net = build_network(_spec("vgg_small", channels=1, classes=3, width=0.25))
    assert num_parameters(net) == convs + norms + 32 * 3 + 3
    pixels = [64, 64, 16, 16, 4, 4]
    macs = sum(p * 9 * i * o for p, (i, o) in zip(pixels, pairs, strict=True)) + 32 * 3
    assert count_macs(net, torch.rand(1, 1, 8, 8)) == macs


def test_a_narrow_resnet_by_hand() -> None:
    w1, w2, w3 = 2, 4, 8
    stem = 9 * w1 + 2 * w1
    group1 = 6 * (9 * w1 * w1 + 2 * w1)
    group2 = 9 * w1 * w2 + 5 * 9 * w2 * w2 + 6 * 2 * w2 + w1 * w2 + 2 * w2
    group3 = 9 * w2 * w3 + 5 * 9 * w3 * w3 + 6 * 2 * w3 + w2 * w3 + 2 * w3
    net = build_network(_spec("cifar_resnet20", channels=1, classes=3, width=0.125))
    assert num_parameters(net) == stem + group1 + group2 + group3 + w3 * 3 + 3
    macs = 64 * (9 * w1 + 6 * 9 * w1 * w1)
    macs += 16 * (9 * w1 * w2 + 5 * 9 * w2 * w2 + w1 * w2)
    macs += 4 * (9 * w2 * w3 + 5 * 9 * w3 * w3 + w2 * w3)
    assert count_macs(net, torch.rand(1, 1, 8, 8)) == macs + w3 * 3


@pytest.mark.parametrize(("name", "num_convs"), [("cifar_resnet20", 19), ("cifar_resnet56", 55)])
def test_a_resnet_is_as_deep_as_its_name_says(name: str, num_convs: int) -> None:
    net = build_network(_spec(name, width=0.1))
    assert isinstance(net, CifarResNet)
    kernels = [m.kernel_size for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert kernels.count((3, 3)) == num_convs
    assert kernels.count((1, 1)) == 2


def test_a_width_never_leaves_a_layer_without_channels() -> None:
    net = build_network(_spec("vgg_small", width=0.001))
    assert {m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)} == {1}


@pytest.mark.parametrize("name", _OWN)
def test_every_network_of_our_own_gives_logits(name: str) -> None:
    assert name in network_names()
    net = build_network(_spec(name, channels=2, classes=5, width=0.05)).eval()
    assert net(torch.rand(2, 2, 32, 32)).shape == (2, 5)


def test_the_cifar_resnet18_has_the_parameters_of_resnet18_with_a_small_stem() -> None:
    net = build_network(_spec("cifar_resnet18"))
    theirs = build_network(_spec("resnet18"))
    assert num_parameters(net) == num_parameters(theirs) - (7 * 7 - 3 * 3) * 3 * 64


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "vgg11"])
def test_torchvisions_networks_are_known_by_their_names(name: str) -> None:
    net = build_network(_spec(name, classes=7)).eval()
    assert type(net).__module__.startswith("torchvision.models")
    with torch.no_grad():
        assert net(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_torchvisions_networks_take_three_channels() -> None:
    with pytest.raises(TeacherError, match=r"takes 3 channels, .* have 1; set prepare\.channels"):
        build_network(_spec("resnet18", channels=1))


@pytest.mark.parametrize("name", ["resnet18", "tests.models.own_networks:small"])
def test_only_our_own_networks_have_a_width(name: str) -> None:
    with pytest.raises(TeacherError, match=r"teacher\.width: got 0\.5; only vgg_small, "):
        build_network(_spec(name, width=0.5), allow_code=True)


def test_a_function_of_the_users_builds_a_network() -> None:
    net = build_network(_spec("tests.models.own_networks:small", channels=2), allow_code=True)
    assert net(torch.rand(3, 2, 8, 8)).shape == (3, 10)


def test_a_function_is_not_called_unless_code_is_allowed() -> None:
    with pytest.raises(TeacherError, match="not pbkd's; if you trust it, pass allow_code=True"):
        build_network(_spec("tests.models.own_networks:boom"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:build", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("tests.models.own_networks:nothing", "AttributeError: .*'nothing'"),
        ("tests.models.own_networks:boom", "ZeroDivisionError: boom"),
        ("tests.models.own_networks:no_arguments", "TypeError: .*num_classes"),
        ("tests.models.own_networks:no_module", "gives int, expected a torch.nn.Module"),
    ],
)
def test_a_function_that_builds_nothing_is_told(name: str, said: str) -> None:
    with pytest.raises(TeacherError, match=said):
        build_network(_spec(name), allow_code=True)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("googlenet", (64, 64), "gives GoogLeNetOutputs in training mode"),
        ("inception_v3", (32, 32), "cannot take images of 3x32x32: "),
        ("tests.models.own_networks:two_outputs", (8, 8), "gives tuple in training mode"),
        ("tests.models.own_networks:eleven", (8, 8), r"gives \(2, 11\) in training mode"),
    ],
)
def test_a_network_must_give_one_tensor_of_logits(
    name: str, size: tuple[int, int], said: str
) -> None:
    spec = _spec(name)
    net = build_network(spec, allow_code=True)
    with pytest.raises(TeacherError, match=said):
        check_network(net, spec, size)


def test_a_check_leaves_the_network_as_it_was() -> None:
    spec = _spec("vgg_small", width=0.1)
    net = build_network(spec).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.random.get_rng_state()
    check_network(net, spec, (8, 8))
    assert not net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cifar_resnet2O", "did you mean `cifar_resnet20`"),
        ("vgg-16", "did you mean `vgg16`"),
        ("transformer-xxl", "known are vgg_small, cifar_vgg11"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(TeacherError, match=f"unknown network `{name}`; {said}"):
        build_network(_spec(name))


def test_a_residual_block_adds_its_skip() -> None:
    block = BasicBlock(2, 2, 1).eval()
    nn.init.zeros_(block.bn2.weight)
    x_nchw = torch.randn(2, 2, 4, 4)
    assert torch.equal(block(x_nchw), x_nchw.relu())


def test_a_classifier_normalises_its_images() -> None:
    images = torch.rand(2, 2, 3, 3)
    model = Classifier(nn.Identity(), (0.5, 0.25), (0.1, 2.0))
    expected = torch.stack([(images[:, 0] - 0.5) / 0.1, (images[:, 1] - 0.25) / 2], dim=1)
    assert torch.equal(model(images), expected)


def test_changed_code_of_the_users_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "changing_network.py"
    path.write_text((Path(__file__).parent / "own_networks.py").read_text())
    spec = _spec("changing_network:small")
    spec = spec.model_copy(update={"code": network_code(spec.name)})
    assert len(spec.code) == 64
    build_network(spec, allow_code=True)
    path.write_text(path.read_text() + "\n# changed\n")
    with pytest.raises(TeacherError, match="code of changing_network is not that of the teacher"):
        build_network(spec, allow_code=True)
