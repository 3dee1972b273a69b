"""`narrow`: which channels are inner, which stay, and that masking them says the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models import resnet

from pbkd.blocks import build_candidate, init_candidate, settle_candidate
from pbkd.blocks.inner import find_inner
from pbkd.config import NarrowConfig
from pbkd.config.candidates import InnerChannels
from pbkd.errors import CandidateError
from pbkd.measure import num_parameters
from pbkd.models.zoo import BasicBlock
from tests.blocks.library import OddBlock, relative_error, seen, started


def _conv(num_in: int = 6, num_out: int = 6, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, 3, padding=1, **settings)


class Freely(nn.Module):
    """Three convolutions and a forward of the test's."""

    def __init__(self, forward: Callable[[Freely, Tensor], Tensor], last: nn.Conv2d | None) -> None:
        super().__init__()
        self.a, self.b, self.c = _conv(), _conv(), last or _conv()
        self.scale = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.function = forward

    def forward(self, x_nchw: Tensor) -> Tensor:
        return self.function(self, x_nchw)


def _groups(block: nn.Module, channels: int = 6, size: int = 8) -> list[InnerChannels]:
    return list(find_inner(block.eval(), torch.zeros(1, channels, size, size)))


def _group(producers: str, between: str, consumers: str) -> InnerChannels:
    return InnerChannels(
        producers=tuple(producers.split()),
        between=tuple(between.split()),
        consumers=tuple(consumers.split()),
    )


@pytest.mark.parametrize(
    ("block", "channels", "expected"),
    [
        (BasicBlock(6, 8, 2), 6, [_group("conv1", "bn1", "conv2")]),
        (resnet.BasicBlock(6, 6), 6, [_group("conv1", "bn1", "conv2")]),
        (
            resnet.Bottleneck(8, 2),
            8,
            [_group("conv1", "bn1", "conv2"), _group("conv2", "bn2", "conv3")],
        ),
        (
            nn.Sequential(
                _conv(6, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                _conv(8, 8, groups=8), nn.Dropout(0.5), _conv(8, 4), nn.ReLU(), _conv(4, 6),
            ),
            6,
            [_group("0", "1 4", "6"), _group("6", "", "8")],
        ),
        (
            models.mobilenet_v3_small().get_submodule("features.4"),
            24,
            [
                _group(
                    "block.0.0 block.2.fc2",
                    "block.0.1 block.1.0 block.1.1",
                    "block.2.fc1 block.3.0",
                ),
                _group("block.2.fc1", "", "block.2.fc2"),
            ],
        ),
        (
            OddBlock(),
            8,
            [
                _group("conv1 branch squeeze.fc2", "norm depthwise", "squeeze.fc1 conv2"),
                _group("squeeze.fc1", "", "squeeze.fc2"),
            ],
        ),
    ],
)  # fmt: skip
def test_inner_channels_are_found(
    block: nn.Module, channels: int, expected: list[InnerChannels]
) -> None:
    assert _groups(block, channels) == expected


def test_also_where_an_image_is_a_pixel() -> None:
    assert _groups(BasicBlock(6, 8, 1), 6, size=1) == [_group("conv1", "bn1", "conv2")]


@pytest.mark.parametrize(
    ("forward", "last"),
    [
        pytest.param(lambda m, x: m.c(torch.cat([x, m.a(x)], 1)), _conv(12, 6), id="concatenated"),
        pytest.param(lambda m, x: m.c(x + m.a(x)), None, id="added to the input"),
        pytest.param(lambda m, x: m.a(x) + m.c(m.a(x)), None, id="called twice"),
        pytest.param(lambda m, x: m.c(m.a(x).flip(1)), None, id="in another order"),
        pytest.param(lambda m, x: m.c(F.conv2d(m.a(x), m.b.weight, padding=1)), None, id="mixed"),
        pytest.param(lambda m, x: m.c(m.a(x).softmax(1)), None, id="normed over channels"),
        pytest.param(lambda m, x: m.c(m.a(x)), _conv(6, 6, groups=2), id="groups"),
        pytest.param(lambda m, x: (y := m.a(x)) + m.c(y), None, id="leaves the block"),
        pytest.param(lambda m, x: m.c(m.a(x) * m.scale), None, id="a parameter of that size"),
        pytest.param(
            lambda m, x: m.c(m.a(x).unflatten(1, (6, 1)).flatten(1, 2)), None, id="its code counts"
        ),
    ],
)
def test_what_is_no_inner_channel_stays(
    forward: Callable[[Freely, Tensor], Tensor], last: nn.Conv2d | None
) -> None:
    block = Freely(forward, last).eval()
    with pytest.raises(CandidateError, match="Freely has no inner channels"):
        settle_candidate(NarrowConfig(), block, torch.zeros(1, 6, 8, 8))


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: (y := m.a(x)) + m.c(y), id="leaves the block"),
        pytest.param(lambda m, x: m.c(m.a(x).flip(1)), id="in another order"),
    ],
)
def test_such_channels_are_not_even_tried(forward: Callable[[Freely, Tensor], Tensor]) -> None:
    assert _groups(Freely(forward, None)) == []


def test_a_block_of_tokens_is_refused() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with pytest.raises(CandidateError, match=r"takes tensors of shape \(1, 5, 8\)"):
        settle_candidate(NarrowConfig(), block, torch.zeros(1, 5, 8))


def test_code_that_counts_the_channels_is_found_by_masking() -> None:
    block = Freely(lambda m, x: m.c((y := m.a(x)) * y.shape[1]), None).eval()
    assert _groups(block) == [_group("a", "", "c")]
    with pytest.raises(CandidateError, match="no inner channels"):
        settle_candidate(NarrowConfig(), block, torch.zeros(1, 6, 8, 8))


def test_one_bad_group_does_not_forbid_the_good_one() -> None:
    block = Freely(lambda m, x: m.c(m.b(m.a(x)) * m.scale), None).eval()
    config = settle_candidate(NarrowConfig(), block, torch.zeros(1, 6, 8, 8))
    assert isinstance(config, NarrowConfig)
    assert config.inner == (_group("a", "", "b"),)


@pytest.mark.parametrize("make", [lambda: BasicBlock(8, 8, 1), OddBlock])
def test_with_all_channels_it_is_the_block(make: Callable[[], nn.Module]) -> None:
    block = seen(make(), 8, 8)
    x_nchw = torch.randn(4, 8, 7, 5)
    candidate = started(NarrowConfig(ratio=0.999), block, x_nchw)
    assert num_parameters(candidate) == num_parameters(block)
    assert relative_error(candidate, block, x_nchw) < 1e-10


def test_channels_that_say_nothing_go_first_and_nothing_changes() -> None:
    block = seen(BasicBlock(8, 8, 1), 8, 8)
    x_nchw = torch.randn(4, 8, 7, 5)
    silent = [0, 3, 4, 7]
    with torch.no_grad():
        block.conv2.weight[:, silent[:2]] = 0  # type: ignore[index]
        block.bn1.weight[silent[2:]] = 0  # type: ignore[index]
        block.bn1.bias[silent[2:]] = -1  # type: ignore[index]
        block.conv1.weight[0] *= 100  # type: ignore[index, operator]  what makes it says nothing
    candidate = started(NarrowConfig(ratio=0.5), block, x_nchw)
    assert relative_error(candidate, block, x_nchw) < 1e-10
    assert torch.equal(candidate.conv1.weight, block.conv1.weight[[1, 2, 5, 6]])  # type: ignore[index]
    with torch.no_grad():
        block.conv2.weight[:, 1] = 100  # type: ignore[index]
    assert relative_error(candidate, block, x_nchw) > 0.1


def test_parameters_by_hand() -> None:
    block = nn.Sequential(_conv(6, 10), nn.BatchNorm2d(10), nn.ReLU(), _conv(10, 4)).eval()
    config = settle_candidate(NarrowConfig(ratio=0.25), block, torch.zeros(1, 6, 8, 8))
    candidate = build_candidate(config, block)
    # 2 channels: of 2.5, the even one
    assert num_parameters(candidate) == (6 * 9 + 1) * 2 + 2 * 2 + 2 * 9 * 4 + 4
    x_nchw = torch.randn(2, 6, 8, 8)
    init_candidate(config, candidate, block, x_nchw)
    assert candidate(x_nchw).shape == (2, 4, 8, 8)
