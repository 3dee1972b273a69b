"""Going on from a cut: bit for bit what the whole teacher gives, and only where that holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbkd.activations import Capture, Resume, find_cuts
from pbkd.activations.resume import exact_inputs
from pbkd.blocks.candidates import replaceable_convs
from pbkd.devices import in_channels_last
from pbkd.models import Classifier, NetworkSpec, build_network
from pbkd.testing import OverwritingNet

NAMES = ("cifar_vgg11", "cifar_resnet20", "densenet121", "mobilenet_v3_small")


def images_for(name: str, num: int = 4) -> Tensor:
    size = 32 if name.startswith("cifar") else 64
    generator = torch.Generator().manual_seed(0)
    return in_channels_last(torch.rand(num, 3, size, size, generator=generator))


def capture_of(net: nn.Module, images: Tensor, paths: tuple[str, ...] | None = None) -> Capture:
    channels = images.shape[1]
    model = Classifier(net, (0.5,) * channels, (0.25,) * channels).eval()
    return Capture(model, paths or replaceable_convs(net), images, torch.float32)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_network(NetworkSpec(name=name, in_channels=3, num_classes=5))


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_goes_on_from_a_cut_bit_for_bit(name: str) -> None:
    images = images_for(name)
    capture = capture_of(network(name), images)
    cuts = find_cuts(capture, images[:2])
    assert cuts, "every network can begin with its first block"
    expected = capture(images)
    for block in list(cuts)[:: max(1, len(cuts) // 3)]:
        later = capture.paths[capture.paths.index(block) :]
        with exact_inputs(capture, [cuts[block]]) as exact:
            capture(images)
        resume = Resume(capture, cuts[block], images[:2])
        found = resume(exact[cuts[block]], later)
        assert tuple(found) == later
        for path in later:
            assert torch.equal(found[path].input, expected[path].input)
            assert torch.equal(found[path].output, expected[path].output)


def test_a_residual_module_is_a_cut_for_its_first_convolution_and_not_for_its_second() -> None:
    images = images_for("cifar_resnet20")
    cuts = find_cuts(capture_of(network("cifar_resnet20"), images), images[:2])
    assert cuts["layer2.1.conv1"] == "layer2.1"
    assert "layer2.1.conv2" not in cuts
    assert cuts["conv1"] == "conv1"


def test_every_convolution_of_a_chain_is_a_cut() -> None:
    images = images_for("cifar_vgg11")
    capture = capture_of(network("cifar_vgg11"), images)
    assert find_cuts(capture, images[:2]) == {path: path for path in capture.paths}


def test_operations_that_overwrite_do_not_spoil_a_cut() -> None:
    torch.manual_seed(0)
    images = in_channels_last(torch.rand(4, 1, 8, 8))
    paths = ("stem", "branch", "entry", "tail")
    capture = capture_of(OverwritingNet(in_place=True), images, paths)
    cuts = find_cuts(capture, images[:2])
    assert set(cuts) == {"stem", "entry", "tail"}  # a skip leads around `branch`
    expected = capture(images)
    with exact_inputs(capture, ["entry"]) as exact:
        capture(images)
    found = Resume(capture, "entry", images[:2])(exact["entry"], ("entry", "tail"))
    for path in ("entry", "tail"):
        assert torch.equal(found[path].input, expected[path].input)
        assert torch.equal(found[path].output, expected[path].output)


def test_a_small_batch_is_filled_up_and_the_filling_is_not_handed_out() -> None:
    images = images_for("cifar_vgg11")
    capture = capture_of(network("cifar_vgg11"), images)
    block = capture.paths[3]
    with exact_inputs(capture, [block]) as exact:
        expected = capture(images)
    found = Resume(capture, block, images)(exact[block][:1], (block,), fill_to=4)
    assert torch.equal(found[block].output, expected[block].output[:1])


class UsedTwice(nn.Module):
    """A module that runs before the block and again after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(self.first(self.block(x))).mean((2, 3))


def test_a_module_that_is_used_again_is_stubbed_for_its_early_calls_only() -> None:
    torch.manual_seed(0)
    images = in_channels_last(torch.rand(4, 4, 8, 8))
    capture = capture_of(UsedTwice(), images, ("block", "last"))
    assert find_cuts(capture, images[:2]) == {"block": "block", "last": "last"}


def test_the_teacher_is_left_as_it_was() -> None:
    images = images_for("cifar_resnet20")
    capture = capture_of(network("cifar_resnet20"), images)
    before = capture.model(images)
    find_cuts(capture, images[:2])
    assert torch.equal(capture.model(images), before)
    assert not any("forward" in vars(module) for module in capture.net.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in capture.net.modules())


class Reshaped(nn.Module):
    """A chain in which one activation is in a layout that a cache does not give back."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.shuffle = nn.ChannelShuffle(2)
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.shuffle(self.first(x)).contiguous())).mean((2, 3))


def test_an_input_in_another_layout_is_no_cut() -> None:
    torch.manual_seed(0)
    images = in_channels_last(torch.rand(4, 1, 8, 8))
    capture = capture_of(Reshaped(), images, ("block", "last"))
    assert set(find_cuts(capture, images[:2])) == {"last"}
