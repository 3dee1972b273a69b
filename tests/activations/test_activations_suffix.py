"""Suffixes: with any module in a block's place, the whole teacher's logits bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbkd.activations import Suffixes
from pbkd.activations.suffix import FROM_IMAGES
from pbkd.blocks import swapped
from pbkd.blocks.candidates import replaceable_convs
from pbkd.devices import in_channels_last
from pbkd.models import Classifier, NetworkSpec, build_network
from pbkd.testing import OverwritingNet


class SkipsAround(nn.Module):
    """Without modules around its skips: one over two convolutions, one over the last, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.three, self.four = (
            nn.Conv2d(1 if n == 0 else 4, 4, 3, padding=1) for n in range(5)
        )
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        x = self.two(F.relu(self.one(x))).add_(x)
        y = self.three(x)
        return self.fc((self.four(y) + y).relu_().mean((2, 3)))


class FromTheImages(nn.Module):
    """The images come back at the end, so that nothing but them gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)).mean((2, 3)) + x.mean((2, 3))


class Twice(nn.Module):
    """A block that runs twice, and a shared module before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.block = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.fc = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.shared(self.block(self.shared(x))))
        return self.fc(x.mean((2, 3)))


class Particular(nn.Module):
    """Code between the modules that refuses poison by an error of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not x.isfinite().all():
            raise ValueError("not finite")
        return self.last(x).mean((2, 3))


OWN = {net.__name__: net for net in (OverwritingNet, SkipsAround, FromTheImages, Twice, Particular)}
ZOO = ("cifar_vgg11", "cifar_resnet20", "resnet18", "densenet121", "mobilenet_v3_small")


def teacher_of(name: str) -> Classifier:
    torch.manual_seed(0)
    channels = 1 if name in OWN else 3
    spec = NetworkSpec(name=name, in_channels=channels, num_classes=5)
    net = OWN[name]() if name in OWN else build_network(spec)
    return Classifier(net, (0.5,) * channels, (0.25,) * channels).eval().requires_grad_(False)


def images_for(name: str, num: int = 6) -> Tensor:
    size = 8 if name in OWN else 32 if name.startswith("cifar") else 64
    channels = 1 if name in OWN else 3
    generator = torch.Generator().manual_seed(0)
    return in_channels_last(torch.rand(num, channels, size, size, generator=generator))


def another(block: nn.Module) -> nn.Module:
    """Of the same shapes, with other weights, and overwriting what it is given."""
    changed = copy.deepcopy(block)
    for parameter in changed.parameters():
        parameter.mul_(1.5)
    return nn.Sequential(nn.LeakyReLU(0.7, inplace=True), changed).eval()


@pytest.mark.parametrize("name", [*OWN, *ZOO])
@torch.no_grad()
def test_a_suffix_gives_the_whole_teachers_logits_bit_for_bit(name: str) -> None:
    teacher, images = teacher_of(name), images_for(name)
    blocks = replaceable_convs(teacher.net)
    blocks = blocks[:: max(1, len(blocks) // 5)]
    others = {block: another(teacher.net.get_submodule(block)) for block in blocks}
    suffixes = Suffixes(teacher, blocks, images[:2])
    found: dict[str, list[Tensor]] = {block: [] for block in blocks}
    for start, x in suffixes.inputs(images):
        for block in (block for block in blocks if suffixes.starts[block] == start):
            for _ in range(2):  # the input serves every candidate
                with swapped(teacher.net, {block: others[block]}):
                    found[block].append(suffixes.logits(start, x))
    before = teacher(images)
    for block, other in others.items():
        with swapped(teacher.net, {block: other}):
            expected = teacher(images)
        assert not torch.equal(expected, before), "the block must matter"
        assert [torch.equal(logits, expected) for logits in found[block]] == [True, True]
    assert torch.equal(teacher(images), before)
    modules = list(teacher.modules())
    assert not any("forward" in vars(module) for module in modules)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("cifar_vgg11", {"features.4": "features.4"}),
        ("resnet18", {"layer2.1.conv1": "layer2.1", "layer2.1.conv2": "layer2.1"}),
        ("densenet121", {"features.denseblock2.denselayer3.conv2": "features.denseblock2"}),
        ("OverwritingNet", {"stem": "stem", "branch": "relu", "tail": "tail"}),
        ("SkipsAround", {"one": "stem", "two": "stem", "three": "three", "four": "three"}),
        ("FromTheImages", {"first": FROM_IMAGES, "last": FROM_IMAGES}),
        ("Twice", {"shared": "shared", "block": "block"}),
        ("Particular", {"first": "first", "last": "first"}),
    ],
)
def test_a_suffix_begins_as_late_as_the_logits_allow(name: str, starts: dict[str, str]) -> None:
    assert Suffixes(teacher_of(name), starts, images_for(name)[:2]).starts == starts


def test_inputs_come_in_the_order_of_the_network_and_each_once() -> None:
    teacher, images = teacher_of("resnet18"), images_for("resnet18")
    blocks = ("layer2.1.conv2", "conv1", "layer2.1.conv1", "layer1.0.conv1")
    calls: list[str] = []

    def note(path: str, output: Tensor) -> None:
        if len(output) == len(images):  # a spared module gives one image
            calls.append(path)

    for path in ("conv1", "layer1.0", "layer2.0", "layer2.1", "layer4.1"):
        module = teacher.net.get_submodule(path)
        module.register_forward_hook(lambda *args, path=path: note(path, args[-1]))
    suffixes = Suffixes(teacher, blocks, images[:2])
    calls.clear()
    assert [start for start, _ in suffixes.inputs(images)] == ["conv1", "layer1.0", "layer2.1"]
    assert calls == ["conv1", "layer1.0", "layer2.0"]
