"""What holds for every kind, on convolutions of odd shapes and on networks with odd blocks."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from pbkd.blocks import (
    CandidateFacts,
    Discovery,
    build_candidate,
    candidate_name,
    find_blocks,
    init_candidate,
    settle_candidate,
)
from pbkd.blocks.inner import randomised
from pbkd.config import (
    BlocksConfig,
    BottleneckConfig,
    CandidateConfig,
    CustomConfig,
    GroupedConfig,
    IdentityConfig,
    LowRankConfig,
    NarrowConfig,
    SeparableConfig,
)
from pbkd.errors import CandidateError
from tests.blocks.library import (
    CONVS,
    OddBlock,
    Squeeze,
    conv_of,
    inputs_for,
    relative_error,
    seen,
    started,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

FOR_CONVS: tuple[CandidateConfig, ...] = (
    SeparableConfig(),
    LowRankConfig(ratio=0.5),
    LowRankConfig(energy=0.7),
    LowRankConfig(form="tucker", ratio=0.5),
    LowRankConfig(form="tucker", energy=0.7),
    BottleneckConfig(ratio=0.5),
    BottleneckConfig(ratio=0.5, batch_norm=True),
    GroupedConfig(groups=4),
    IdentityConfig(),
)
ALL = (*FOR_CONVS, IdentityConfig(adapter="always"), NarrowConfig())
REFUSED = {("one input channel", "grouped-groups.4"): "4 groups do not divide its 1 input channels"}


def _id(value: object) -> str:
    return value if isinstance(value, str) else candidate_name(value)  # type: ignore[arg-type]


# ---------------------------------------------------------------- convolutions of odd shapes


@pytest.mark.parametrize("config", FOR_CONVS, ids=_id)
@pytest.mark.parametrize("name", CONVS)
def test_a_candidate_has_the_shape_of_its_convolution_and_starts_near_to_it(
    name: str, config: CandidateConfig
) -> None:
    conv = conv_of(name)
    x_nchw = inputs_for(conv)
    if said := REFUSED.get((name, candidate_name(config))):
        with pytest.raises(CandidateError, match=said):
            started(config, conv, x_nchw)
        return
    try:
        config = settle_candidate(config, conv, x_nchw)
        torch.manual_seed(1)
        random = build_candidate(config, conv).eval()
    except CandidateError as error:
        assert re.search("as many weights", str(error))  # noqa: PT017  small kernels have low ranks
        assert config.kind == "low_rank"
        return
    candidate = started(config, conv, x_nchw)
    fresh = inputs_for(conv)  # not those of the start
    error = relative_error(candidate, conv, fresh)
    assert error < relative_error(random, conv, fresh)
    assert error < 0.99


@pytest.mark.parametrize("config", FOR_CONVS, ids=_id)
@pytest.mark.parametrize("name", ["plain", "stride 2", "groups"])
def test_its_first_weights_depend_on_no_mode_and_leave_all_as_it_was(
    name: str, config: CandidateConfig
) -> None:
    conv = conv_of(name)
    x_nchw = inputs_for(conv)
    state, x_before = copy.deepcopy(conv.state_dict()), x_nchw.clone()
    config = settle_candidate(config, conv, x_nchw)
    states = []
    for training in (False, True):
        conv.train(training)
        torch.manual_seed(2)
        candidate = build_candidate(config, conv).train(training)
        init_candidate(config, candidate, conv, x_nchw)
        assert all(part.training is training for part in candidate.modules())
        states.append(candidate.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert torch.equal(x_nchw, x_before)
    assert all(torch.equal(value, state[key]) for key, value in conv.state_dict().items())
    with torch.no_grad():
        for parameter in candidate.parameters():
            parameter.fill_(7)
    assert all(torch.equal(value, state[key]) for key, value in conv.state_dict().items())


@pytest.mark.parametrize("config", FOR_CONVS, ids=_id)
def test_the_bias_is_kept(config: CandidateConfig) -> None:
    conv = conv_of("plain")
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.mul_(1e-3)
        conv.bias.add_(5)
    if isinstance(config, IdentityConfig):
        config = IdentityConfig(adapter="always")
    x_nchw = inputs_for(conv)
    assert relative_error(started(config, conv, x_nchw), conv, x_nchw) < 1e-4


@pytest.mark.parametrize("config", [c for c in FOR_CONVS if c.kind != "identity"], ids=_id)
@pytest.mark.parametrize(
    ("block", "said"),
    [
        (nn.ConvTranspose2d(8, 8, 3), "ConvTranspose2d holds no"),
        (nn.Linear(8, 8), "Linear holds no"),
        (nn.Sequential(nn.ReLU()), "Sequential holds no"),
    ],
)
def test_what_is_no_convolution_is_refused_with_the_reason(
    config: CandidateConfig, block: nn.Module, said: str
) -> None:
    with pytest.raises(CandidateError, match=said):
        started(config, block, torch.rand(1, 8, 6, 6))


@pytest.mark.parametrize(
    ("config", "conv", "said"),
    [
        (BottleneckConfig(), nn.Conv2d(8, 8, 1), "is a 1 x 1 convolution: .* `low_rank` fits"),
        (BottleneckConfig(), nn.Conv2d(8, 8, 3, groups=8), "is a depthwise convolution"),
        (GroupedConfig(), nn.Conv2d(8, 8, 1), "is a 1 x 1 convolution"),
        (GroupedConfig(), nn.Conv2d(8, 8, 3, groups=8), "is a depthwise convolution"),
        (GroupedConfig(groups=3), nn.Conv2d(8, 8, 3), "3 groups do not divide its 8 input"),
        (GroupedConfig(groups=2), nn.Conv2d(8, 8, 3, groups=2), "8 input channels in 2 groups"),
        (LowRankConfig(form="tucker", ratio=0.5), nn.Conv2d(8, 8, 1), "1 x 1 .* try `pair`"),
        (LowRankConfig(form="tucker", ratio=0.5), nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
        (LowRankConfig(ratio=0.5), nn.Conv2d(8, 8, 1, groups=8), "depthwise 1 x 1"),
        (LowRankConfig(energy=0.999), nn.Conv2d(8, 8, 3), "as many weights as the convolution"),
        (NarrowConfig(), nn.Conv2d(8, 8, 3), "a single convolution, without inner channels"),
        (NarrowConfig(), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), "no inner channels"),
        (IdentityConfig(adapter="never"), nn.Conv2d(8, 4, 3), "turns 8 channels into 4, stride"),
        (IdentityConfig(), nn.Flatten(), r"gives \(2, 288\), expected \(N, C, H, W\)"),
        (IdentityConfig(), nn.Upsample(scale_factor=2), "enlarges 6 pixels to 12"),
        (IdentityConfig(), nn.Linear(3, 3), "does not run with random weights"),
    ],
)
def test_a_kind_that_does_not_fit_says_why(
    config: CandidateConfig, conv: nn.Module, said: str
) -> None:
    with pytest.raises(CandidateError, match=said):
        started(config, conv, torch.rand(1, 8, 6, 6))


@pytest.mark.parametrize(
    "config", [LowRankConfig(energy=0.9), NarrowConfig(), IdentityConfig()], ids=_id
)
def test_a_config_that_is_not_settled_is_refused(config: CandidateConfig) -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(CandidateError, match=r"pbkd\.blocks\.find_blocks gives them"):
        build_candidate(config, block)


# ---------------------------------------------------------------- whole networks


def _odd_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, (1, 5), stride=(1, 2), padding=(0, 2)),
        OddBlock(),
        nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, stride=2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


NETWORKS = {
    "resnet18": (lambda: models.resnet18(num_classes=3), 3, BlocksConfig(
        select="paths", paths=("layer1.0", "layer2.0", "layer2.1.conv2", "layer3.0.conv1"))),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=3), 3, BlocksConfig(
        select="paths", paths=("features.0.0", "features.2", "features.4", "features.5",
                               "features.6.block.1.0", "features.9.block.0.0"))),
    "odd": (_odd_net, 1, BlocksConfig(select="paths", paths=("0", "1", "2"))),
}  # fmt: skip


@pytest.fixture(scope="module")
def discovered() -> dict[str, tuple[nn.Module, Discovery, dict[str, Tensor]]]:
    """Networks, what they offer for every kind, and the inputs of their blocks."""
    found = {}
    for name, (make, channels, config) in NETWORKS.items():
        net = seen(make(), 32, channels)
        config = config.model_copy(update={"candidates": ALL})
        discovery = find_blocks(net, config, torch.zeros(1, channels, 32, 40))
        inputs: dict[str, Tensor] = {}
        for block in discovery.blocks:
            net.get_submodule(block.path).register_forward_pre_hook(
                lambda _, args, path=block.path, inputs=inputs: inputs.setdefault(
                    path, args[0].clone()
                )
            )
        with torch.no_grad():
            net(torch.randn(8, channels, 32, 40))
        found[name] = net, discovery, inputs
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_finds_its_place_in_a_network(discovered, name: str) -> None:
    _, discovery, _ = discovered[name]
    assert len(discovery.blocks) == len(NETWORKS[name][2].paths)
    offered = {c.config.kind for block in discovery.blocks for c in block.candidates}
    # of MobileNet's convolutions all but the first are depthwise or 1 x 1; that one has 3 inputs
    missing = {"grouped"} if name == "mobilenet_v3_small" else set()
    assert offered == {config.kind for config in ALL} - missing
    for block in discovery.blocks:
        names = [c.name for c in block.candidates] + [r.name for r in block.rejected]
        assert sorted(names) == sorted(map(candidate_name, ALL))
        for candidate in block.candidates:
            assert candidate.num_parameters < block.num_parameters or candidate.macs < block.macs


@pytest.mark.parametrize("name", NETWORKS)
def test_candidates_start_better_than_random_and_load_around_other_weights(
    discovered, name: str
) -> None:
    net, discovery, inputs = discovered[name]
    for facts in discovery.blocks:
        block, x_nchw = net.get_submodule(facts.path), inputs[facts.path]
        for candidate in facts.candidates:
            _check(candidate, block, x_nchw)


def _check(facts: CandidateFacts, block: nn.Module, x_nchw: Tensor) -> None:
    random = [build_candidate(facts.config, block).eval() for _ in range(3)]
    candidate = build_candidate(facts.config, block).eval()
    init_candidate(facts.config, candidate, block, x_nchw)
    error = relative_error(candidate, block, x_nchw)
    if [*candidate.parameters()] and "skip" not in dict(candidate.named_children()):
        mean = sum(relative_error(other, block, x_nchw) for other in random) / 3
        # of a whole block, most of the output is its skip's, whatever the candidate gives
        is_whole = not isinstance(block, nn.Conv2d)
        assert error < mean * (1.3 if is_whole else 1), facts.name
    # a student is built around a teacher whose weights are not there yet, from a card in JSON
    config = CandidateFacts.model_validate_json(facts.model_dump_json()).config
    assert config == facts.config
    other = build_candidate(config, randomised(block)).eval()
    other.load_state_dict(candidate.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x_nchw.clone()), candidate(x_nchw.clone()))


def test_discovery_does_not_depend_on_weights_but_for_the_energy(discovered) -> None:
    make, channels, config = NETWORKS["odd"]
    config = config.model_copy(update={"candidates": ALL})
    facts = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        facts.append(find_blocks(make().eval(), config, torch.zeros(1, channels, 32, 40)))
    for one, other in zip(facts[0].blocks, facts[1].blocks, strict=True):
        kept = [
            [c for c in block.candidates if getattr(c.config, "energy", None) is None]
            for block in (one, other)
        ]
        assert kept[0] == kept[1]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LowRankConfig(ratio=0.25), "low_rank-ratio.0.25"),
        (LowRankConfig(energy=0.9, ranks=((3,),)), "low_rank-energy.0.9"),
        (LowRankConfig(form="tucker", ratio=0.25), "low_rank-form.tucker-ratio.0.25"),
        (NarrowConfig(ratio=0.25), "narrow-ratio.0.25"),
        (NarrowConfig(), "narrow"),
        (BottleneckConfig(batch_norm=True), "bottleneck-batch_norm.true"),
        (GroupedConfig(groups=4), "grouped-groups.4"),
        (IdentityConfig(adapter="never"), "identity-adapter.never"),
        (CustomConfig(kind="a.b:c"), "a.b.c"),
        (CustomConfig(kind="a:b", settings={"y": True, "x": 2}, code="1"), "a.b-x.2-y.true"),
        (CustomConfig(kind="a:b", settings={"x": "relu"}), "a.b-x.relu"),
    ],
)
def test_a_name_is_readable(config: CandidateConfig, name: str) -> None:
    assert candidate_name(config) == name


def test_names_are_legal_and_tell_configs_apart() -> None:
    values = ["1", 1, "true", True, "A", "a", "a-y.1", "ä", "x/../y", "", "b" * 300, 1e-5, -1]
    configs = [CustomConfig(kind="a:b", settings={"x": value}) for value in values]
    configs += [CustomConfig(kind="A:b"), CustomConfig(kind="a:B"), CustomConfig(kind="a:b")]
    configs += [CustomConfig(kind="a:b", settings={"x": "a", "y": 1})]
    names = [candidate_name(config) for config in configs]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,120}", name) for name in names), names
    assert len({name.lower() for name in names}) == len(configs), names


def test_equal_configs_are_listed_once() -> None:
    x_nchw = torch.rand(1, 8, 6, 6)
    twice = (GroupedConfig(), GroupedConfig(groups=8), SeparableConfig())
    config = BlocksConfig(candidates=(SeparableConfig(),), overrides={"0": twice})
    (block,) = find_blocks(nn.Sequential(nn.Conv2d(8, 32, 3)), config, x_nchw).blocks
    assert [c.name for c in block.candidates] == ["grouped", "separable"]


def test_all_configs_can_be_keys() -> None:
    one = CustomConfig(kind="a:b", settings={"x": 1, "y": 2})
    same = CustomConfig(kind="a:b", settings={"y": 2, "x": 1})
    assert len({*ALL, one, same}) == len(ALL) + 1


def test_squeeze_is_what_it_says() -> None:
    x_nchw = torch.randn(2, 6, 4, 4)
    squeeze = Squeeze(6)
    ratio = squeeze(x_nchw) / x_nchw
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio))
