"""Finding blocks: selectors, refusals by name and reason, and facts by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet

from pbkd.blocks import Discovery, find_blocks
from pbkd.config import BlocksConfig, SeparableConfig
from pbkd.errors import BlockError
from pbkd.models import NetworkSpec
from pbkd.models.zoo import BasicBlock, CifarResNet
from pbkd.testing import OverwritingNet

X_NCHW = torch.rand(2, 4, 6, 6)


def _conv(channels: int = 4, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, **settings)


def _paths(discovery: Discovery) -> list[str]:
    return [block.path for block in discovery.blocks]


def _refused(discovery: Discovery) -> dict[str, str]:
    return {item.name: item.reason for item in discovery.refused}


# ---------------------------------------------------------------- selectors


def test_convs_selects_every_convolution_with_a_kernel_above_1() -> None:
    net = nn.Sequential(
        _conv(), nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 8, (1, 5))), nn.Flatten()
    )
    assert _paths(find_blocks(net, BlocksConfig(), X_NCHW)) == ["0", "2.1"]


def test_residual_selects_the_blocks_of_pbkd_and_of_torchvision() -> None:
    narrowing = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4))
    net = nn.Sequential(
        BasicBlock(4, 16, 1),
        resnet.BasicBlock(16, 16),
        resnet.Bottleneck(16, 4),
        BasicBlock(16, 8, 2),
        resnet.BasicBlock(8, 4, downsample=narrowing),
        nn.Sequential(_conv(), _conv()),
    )
    discovery = find_blocks(net, BlocksConfig(select="residual"), X_NCHW)
    assert _paths(discovery) == ["0", "1", "2", "3", "4"]
    assert [block.module for block in discovery.blocks] == [
        "BasicBlock",
        "BasicBlock",
        "Bottleneck",
        "BasicBlock",
        "BasicBlock",
    ]


def _resnet() -> nn.Module:
    return CifarResNet(
        (16, 32, 64), 2, NetworkSpec(name="", num_classes=3, in_channels=4, width=0.25)
    )


@pytest.mark.parametrize(
    ("paths", "exclude", "expected"),
    [
        (("layer1.0",), (), ["layer1.0"]),
        (("layer?.0.conv2",), (), ["layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"]),
        (("layer3.1", "layer1.*.conv1"), ("layer1.0*",), [
            "layer1.1.conv1", "layer3.1"
        ]),
        (("conv1", "conv*"), (), ["conv1"]),
        (("layer[23].1",), ("layer3*",), ["layer2.1"]),
    ],
)  # fmt: skip
def test_paths_selects_by_globs(
    paths: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]
) -> None:
    config = BlocksConfig(select="paths", paths=paths, exclude=exclude)
    assert _paths(find_blocks(_resnet(), config, X_NCHW)) == expected


def test_excluded_blocks_are_left_alone() -> None:
    config = BlocksConfig(exclude=("layer[123].*.conv1", "conv1"))
    paths = _paths(find_blocks(_resnet(), config, X_NCHW))
    assert len(paths) == 6
    assert all(path.endswith("conv2") for path in paths)


def test_the_last_override_that_matches_wins() -> None:
    deep, normed = SeparableConfig(depth=2), SeparableConfig(batch_norm=True)
    config = BlocksConfig(
        select="paths",
        paths=("layer1.*.conv1",),
        overrides={"layer1.*": (deep, deep), "layer1.1.*": (normed, SeparableConfig())},
    )
    discovery = find_blocks(_resnet(), config, X_NCHW)
    names = {block.path: [c.name for c in block.candidates] for block in discovery.blocks}
    assert names == {
        "layer1.0.conv1": ["separable-depth.2"],
        "layer1.1.conv1": ["separable-batch_norm.true", "separable"],
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BlocksConfig(select="paths", paths=("layer9",)), "blocks.paths: `layer9` matches no"),
        (BlocksConfig(select="paths", paths=("conv1", "x*")), "blocks.paths: `x*` matches no"),
        (BlocksConfig(exclude=("layer9*",)), "`layer9*` in exclude or overrides matches no"),
        (BlocksConfig(overrides={"x": (SeparableConfig(),)}), "`x` in exclude or overrides"),
        (BlocksConfig(exclude=("*",)), "blocks.select: `convs` matches nothing in CifarResNet"),
    ],
)
def test_what_matches_nothing_is_named(config: BlocksConfig, said: str) -> None:
    with pytest.raises(BlockError) as caught:
        find_blocks(_resnet(), config, X_NCHW)
    assert said in str(caught.value)


def test_a_selector_that_matches_nothing_is_named() -> None:
    with pytest.raises(BlockError, match="`residual` matches nothing in Sequential"):
        find_blocks(nn.Sequential(_conv()), BlocksConfig(select="residual"), X_NCHW)


# ---------------------------------------------------------------- refusals

Call = Callable[[nn.Module, Tensor], Tensor]


class Around(nn.Module):
    """``stem``, a good block, and then ``block``, called as the test says."""

    def __init__(self, block: nn.Module, call: Call = lambda block, x: block(x)) -> None:
        super().__init__()
        self.block = block
        self.stem = _conv()
        self.call = call

    def forward(self, x_nchw: Tensor) -> Tensor:
        return self.call(self.block, self.stem(x_nchw))


class Freely(nn.Module):
    """A block whose signature and output are the test's."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.conv = _conv()
        self.function = function

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.function(self.conv, *args, **kwargs)


TWO_INPUTS = Freely(lambda conv, x, y: conv(x) + y)
A_KEYWORD = Freely(lambda conv, x, scale=1: conv(x) * scale)
A_LIST = Freely(lambda conv, xs: conv(xs[0]))
A_TUPLE = Freely(lambda conv, x: (conv(x), x))


@pytest.mark.parametrize(
    ("block", "call", "reason"),
    [
        (TWO_INPUTS, lambda b, x: b(x, x), "takes 2 inputs, expected one tensor"),
        (A_KEYWORD, lambda b, x: b(x, scale=2), "takes keyword inputs (scale), expected one"),
        (A_KEYWORD, lambda b, x: b(x=x), "takes keyword inputs (x), expected one tensor"),
        (A_LIST, lambda b, x: b([x]), "takes list, expected one tensor"),
        (A_TUPLE, lambda b, x: b(x)[0], "gives tuple, expected one tensor"),
        (_conv(), lambda b, x: b(b(x)), "shared module: called 2 times in one pass"),
        (_conv(), lambda b, x: x * 2, "never called in a pass"),
        (_conv(groups=4), lambda b, x: b(x), "neither fewer parameters nor fewer MACs"),
        (nn.ReLU(), lambda b, x: b(x), "holds no dense k x k convolution"),
        (nn.Sequential(_conv(groups=4)), lambda b, x: b(x), "holds no dense k x k convolution"),
    ],
)
def test_a_block_that_cannot_be_replaced_is_refused_with_the_reason(
    block: nn.Module, call: Call, reason: str
) -> None:
    config = BlocksConfig(select="paths", paths=("stem", "block"))
    discovery = find_blocks(Around(block, call), config, X_NCHW)
    assert _paths(discovery) == ["stem"]
    assert list(_refused(discovery)) == ["block"]
    assert reason in _refused(discovery)["block"]


def test_a_module_under_two_names_is_refused() -> None:
    net = Around(_conv())
    net.alias = net.block
    config = BlocksConfig(select="paths", paths=("stem", "block"))
    refused = _refused(find_blocks(net, config, X_NCHW))
    assert refused == {"block": "shared module: the same as block, alias"}


def _tie_weights(net: Around) -> None:
    net.other = _conv()
    net.other.weight = net.block.weight  # type: ignore[union-attr]


def _use_the_weight_elsewhere(net: Around) -> None:
    net.weight = net.block.weight  # type: ignore[assignment]


def _share_a_part(net: Around) -> None:
    net.block = nn.Sequential(_conv(), nn.BatchNorm2d(4))
    net.other = nn.Sequential(nn.ReLU(), net.block[1])


@pytest.mark.parametrize("tie", [_tie_weights, _use_the_weight_elsewhere, _share_a_part])
def test_a_block_that_shares_parameters_is_refused(tie: Callable[[Around], None]) -> None:
    net = Around(_conv())
    tie(net)
    config = BlocksConfig(select="paths", paths=("stem", "block"))
    refused = _refused(find_blocks(net, config, X_NCHW))
    assert refused == {"block": "shares parameters with another module"}


@pytest.mark.parametrize("paths", [("block.0", "block"), ("stem", "block", "block.2.0")])
def test_paths_that_overlap_are_an_error(paths: tuple[str, ...]) -> None:
    net = Around(nn.Sequential(_conv(), nn.ReLU(), nn.Sequential(_conv())))
    config = BlocksConfig(select="paths", paths=paths)
    with pytest.raises(BlockError, match=r"paths: block\..* lies inside block, .* name one of"):
        find_blocks(net, config, X_NCHW)


def test_a_residual_block_within_another_is_refused() -> None:
    inner = BasicBlock(4, 4, 1)
    outer = BasicBlock(4, 4, 1)
    outer.conv1 = nn.Sequential(outer.conv1, inner)  # type: ignore[assignment]
    outer.conv3 = _conv()
    outer.downsample = nn.Sequential(_conv())
    discovery = find_blocks(Around(outer), BlocksConfig(select="residual"), X_NCHW)
    assert _paths(discovery) == ["block"]
    reason = "overlaps: lies inside block, which is selected too"
    assert _refused(discovery) == {"block.conv1.1": reason}


def test_a_block_inside_a_refused_one_is_kept() -> None:
    inner = _conv()
    net = Around(nn.Sequential(inner), lambda block, x: block(block(x)))
    config = BlocksConfig(select="paths", paths=("stem", "block", "block.0"))
    assert _paths(find_blocks(net, config, X_NCHW)) == ["stem"]  # called twice, both
    unused = Around(nn.Sequential(inner), lambda block, x: block[0](x))
    assert _paths(find_blocks(unused, config, X_NCHW)) == ["stem", "block.0"]


def test_a_path_that_begins_like_another_is_no_overlap() -> None:
    net = nn.ModuleDict({"block": _conv(), "block1": _conv()})
    net.forward = lambda x: net["block1"](net["block"](x))  # type: ignore[method-assign]
    assert _paths(find_blocks(net, BlocksConfig(), X_NCHW)) == ["block", "block1"]


def test_a_network_without_any_good_block_is_an_error_that_names_all() -> None:
    net = Around(_conv(groups=4), lambda block, x: block(x))
    config = BlocksConfig(select="paths", paths=("block", "block*"))
    said = r"no selected block can be replaced: block: separable: neither fewer"
    with pytest.raises(BlockError, match=said):
        find_blocks(net, config, X_NCHW)


def test_a_candidate_that_saves_nothing_is_rejected_and_others_stay() -> None:
    # 3 input and 2 output channels: 54 parameters; depth 1 has 27 + 6, depth 2 27 + 9 more
    net = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False))
    config = BlocksConfig(candidates=(SeparableConfig(), SeparableConfig(depth=2)))
    block = find_blocks(net, config, torch.rand(1, 3, 6, 6)).blocks[0]
    assert [c.name for c in block.candidates] == ["separable"]
    assert [(r.name, r.reason) for r in block.rejected] == [
        ("separable-depth.2", "neither fewer parameters nor fewer MACs")
    ]


def test_a_candidate_with_more_macs_and_fewer_parameters_is_listed() -> None:
    # depth 2 runs its first pair before the stride, on four times the pixels
    net = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False))
    config = BlocksConfig(candidates=(SeparableConfig(depth=2),))
    block = find_blocks(net, config, torch.rand(1, 8, 8, 8)).blocks[0]
    (candidate,) = block.candidates
    assert (block.num_parameters, candidate.num_parameters) == (576, 2 * (72 + 64))
    assert (block.macs, candidate.macs) == (16 * 576, 64 * (72 + 64) + 16 * (72 + 64))


# ---------------------------------------------------------------- facts


def test_facts_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Conv2d(6, 5, (1, 3))
    )
    discovery = find_blocks(net, BlocksConfig(), X_NCHW)
    first, second = discovery.blocks
    assert (first.input_shape, first.output_shape) == ((4, 6, 6), (6, 3, 3))
    assert (second.input_shape, second.output_shape) == ((6, 3, 3), (5, 3, 1))
    assert (first.num_parameters, second.num_parameters) == (216, 95)
    assert (first.macs, second.macs) == (9 * 216, 3 * 90)
    assert (discovery.num_parameters, discovery.macs) == (311, 9 * 216 + 3 * 90)
    assert first.share_of_parameters == 216 / 311
    assert second.share_of_macs == 270 / (9 * 216 + 270)
    assert first.elements_per_image == 4 * 36 + 6 * 9
    (candidate,) = second.candidates
    assert candidate.num_parameters == 6 * 3 + 6 * 5 + 5
    assert candidate.macs == 3 * (6 * 3 + 6 * 5)


class Backwards(nn.Module):
    """Runs its parts in the opposite order of their definition."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.a = _conv(), _conv(), _conv()

    def forward(self, x_nchw: Tensor) -> Tensor:
        return self.c(self.b(self.a(x_nchw)))


def test_blocks_come_in_the_order_in_which_they_run() -> None:
    assert _paths(find_blocks(Backwards(), BlocksConfig(), X_NCHW)) == ["a", "b", "c"]


class Branching(nn.Module):
    """Its path depends on the data, so no tracer can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark = _conv(), _conv()

    def forward(self, x_nchw: Tensor) -> Tensor:
        return self.bright(x_nchw) if x_nchw.mean() > 0 else self.dark(x_nchw)


def test_a_network_that_cannot_be_traced_is_no_obstacle() -> None:
    net = Branching()
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(net)
    discovery = find_blocks(net, BlocksConfig(), X_NCHW)
    assert _paths(discovery) == ["bright"]
    assert _refused(discovery) == {"dark": "never called in a pass"}


def test_shapes_are_right_behind_in_place_operations() -> None:
    net = OverwritingNet()
    config = BlocksConfig(select="paths", paths=("stem", "branch", "entry", "tail"))
    discovery = find_blocks(net, config, torch.rand(2, 1, 6, 6))
    assert _paths(discovery) == ["stem", "branch", "entry", "tail"]
    assert discovery.blocks[0].input_shape == (1, 6, 6)


def test_looking_for_blocks_leaves_no_trace() -> None:
    net = nn.Sequential(_conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), BasicBlock(4, 4, 1))
    net[1].eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [part.training for part in net.modules()]
    x_nchw = X_NCHW.clone()
    first = find_blocks(net, BlocksConfig(), x_nchw)
    assert find_blocks(net, BlocksConfig(), x_nchw) == first
    assert torch.equal(x_nchw, X_NCHW)
    assert [part.training for part in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
