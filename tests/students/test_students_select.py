"""Which candidate a block gets."""

from __future__ import annotations

import pytest

from pbkd.blocks import BlockFacts, CandidateFacts, candidate_name
from pbkd.config import SeparableConfig
from pbkd.distill import Damage
from pbkd.students import Choice, choose

CONFIGS = [
    SeparableConfig(),
    SeparableConfig(depth=2),
    SeparableConfig(batch_norm=True),
]
PLAIN, DEEP, NORMED = map(candidate_name, CONFIGS)


def block(costs: list[tuple[int, int]], path: str = "b") -> BlockFacts:
    """A block whose candidates have these MACs and parameters."""
    candidates = tuple(
        CandidateFacts(name=candidate_name(config), config=config, macs=macs, num_parameters=num)
        for config, (macs, num) in zip(CONFIGS, costs, strict=False)
    )
    return BlockFacts(
        path=path,
        module="Conv2d",
        input_shape=(1, 2, 2),
        output_shape=(1, 2, 2),
        num_parameters=999,
        macs=999,
        share_of_parameters=0.5,
        share_of_macs=0.5,
        candidates=candidates,
        rejected=(),
    )


def chosen(facts: BlockFacts, kls: list[float | None], max_damage: float) -> Choice:
    damages = {
        (facts.path, candidate.name): Damage(kl=kl, accuracy_drop=0.0, num_images=1)
        for candidate, kl in zip(facts.candidates, kls, strict=True)
    }
    (choice,) = choose((facts,), damages, max_damage)
    return choice


@pytest.mark.parametrize(
    ("costs", "kls", "expected"),
    [
        pytest.param([(10, 1), (20, 1)], [0.9, 0.1], PLAIN, id="fewest MACs, not least damage"),
        pytest.param([(10, 1), (20, 1)], [1.1, 0.1], DEEP, id="over the limit does not count"),
        pytest.param([(10, 1), (20, 1)], [1.0, 0.1], PLAIN, id="at the limit is allowed"),
        pytest.param([(10, 1), (20, 1)], [None, 0.1], DEEP, id="not finite does not count"),
        pytest.param([(10, 2), (10, 1)], [0.1, 0.9], DEEP, id="equal MACs: fewer parameters"),
        pytest.param([(10, 1), (10, 1)], [0.9, 0.1], DEEP, id="equal costs: less damage"),
        pytest.param([(10, 1)] * 3, [0.5, 0.5, 0.5], PLAIN, id="all equal: the first listed"),
    ],
)
def test_the_cheapest_candidate_within_the_limit_is_chosen(costs, kls, expected):
    choice = chosen(block(costs), kls, max_damage=1.0)
    assert choice.candidate == expected
    assert candidate_name(choice.config) == expected
    assert choice.damage_kl == kls[[PLAIN, DEEP, NORMED].index(expected)]
    assert "fewest MACs" in choice.reason


@pytest.mark.parametrize(
    ("kls", "least", "reason"),
    [
        ([2.0, 1.25], 1.25, "damage 1.25 is over stitch.max_damage 1"),
        ([None, 3.0], 3.0, "damage 3 is over"),
        ([None, None], None, "not finite"),
    ],
)
def test_the_teachers_module_stays_where_every_candidate_does_too_much(kls, least, reason):
    choice = chosen(block([(10, 1), (20, 1)]), kls, max_damage=1.0)
    assert choice.candidate is None
    assert choice.config is None
    assert choice.damage_kl == least
    assert reason in choice.reason


def test_a_limit_of_0_lets_harmless_candidates_in():
    assert chosen(block([(10, 1)]), [0.0], max_damage=0.0).candidate == PLAIN
    assert chosen(block([(10, 1)]), [1e-9], max_damage=0.0).candidate is None


def test_every_block_is_chosen_for_by_itself_in_order():
    blocks = (block([(10, 1)], "z"), block([(10, 1)], "a"))
    damages = {
        ("z", PLAIN): Damage(kl=0.1, accuracy_drop=0.0, num_images=1),
        ("a", PLAIN): Damage(kl=9.0, accuracy_drop=0.0, num_images=1),
    }
    choices = choose(blocks, damages, 1.0)
    assert [(c.block, c.candidate) for c in choices] == [("z", PLAIN), ("a", None)]
