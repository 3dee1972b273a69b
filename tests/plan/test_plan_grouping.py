"""The cheapest cut of the line under a cap, against all cuts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pbkd.plan import BlockCost, Limits, TraineeCost
from pbkd.plan.grouping import cheapest_groups, price
from pbkd.plan.line import SIDES, make_line

SECONDS = st.integers(1, 20).map(float)


@settings(max_examples=100, deadline=None)
@given(
    teacher=st.lists(SECONDS, min_size=3, max_size=3),
    own=st.lists(st.tuples(st.integers(0, 2), SECONDS), min_size=1, max_size=7),
    cap_s=st.floats(10, 150),
)
def test_the_cheapest_cut_that_keeps_to_a_cap(
    teacher: list[float], own: list[tuple[int, float]], cap_s: float
) -> None:
    blocks = [BlockCost(f"b{n}", t, read_input_s=15, is_cut=n == 1) for n, t in enumerate(teacher)]
    trainees = [TraineeCost(f"t{n}", f"b{block}", cost) for n, (block, cost) in enumerate(own)]
    line = make_line(blocks, trainees, Limits(job_s=1))
    prices = price(line, (0, SIDES, 0), "auto")
    totals = []
    for mask in range(2 ** (line.size - 1)):
        ends = [end for end in range(1, line.size) if mask >> (end - 1) & 1]
        cut = [prices.group(a, b).cost_s for a, b in itertools.pairwise([0, *ends, line.size])]
        totals += [sum(cut)] if max(cut) <= cap_s else []
    found = [group.cost_s for group in cheapest_groups(prices, cap_s)]
    if totals:
        assert max(found) <= cap_s
        assert sum(found) == pytest.approx(min(totals))
