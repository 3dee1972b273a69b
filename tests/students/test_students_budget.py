"""Named budgets and sweeps: which students are made, and what is said of those that cannot be."""

from __future__ import annotations

import logging

import pytest

from pbkd.config import SeparableConfig, StitchConfig
from pbkd.errors import BudgetError
from pbkd.students import BlockOptions, Figures, Option, check_budgets, choose_students

REST = Figures(parameters=100, macs=1000, bytes=400)


def options(
    path: str, own: tuple[int, int], candidates: list[tuple[float | None, int, int]]
) -> BlockOptions:
    """Own (parameters, MACs), candidates (damage, parameters, MACs); 4 bytes per parameter."""

    def figures(parameters: int, macs: int) -> Figures:
        return Figures(parameters=parameters, macs=macs, bytes=4 * parameters)

    return BlockOptions(
        block=path,
        own=figures(*own),
        candidates=tuple(
            Option(config=SeparableConfig(), name=f"c{i}", damage_kl=kl, figures=figures(*each))
            for i, (kl, *each) in enumerate(candidates)
        ),
    )


# whole: 1900 parameters, 19,000 MACs; smallest: 100 + 100 + 200 parameters, 1000 + 500 + 2500 MACs
BLOCKS = [
    options("a", (900, 9000), [(0.2, 300, 500), (0.9, 100, 4000), (3.0, 10, 100)]),
    options("b", (900, 9000), [(0.1, 500, 6000), (0.4, 200, 2500), (None, 1, 1)]),
]


def config(**values: object) -> StitchConfig:
    return StitchConfig.model_validate(values)


def chosen(**values: object) -> dict[str, tuple]:
    students = choose_students(BLOCKS, REST, config(**values))
    return {student.name: student.selection.names for student in students}


def test_each_budget_gets_the_least_damage_within_its_limits():
    found = chosen(
        students={
            "share": {"max_parameters": 0.8},
            "percent": {"max_macs": "60%"},
            "absolute": {"max_bytes": "2.8kB", "max_macs": "9k"},
        }
    )
    # 1520 parameters: b alone, at 0.1; 11,400 MACs: a at 0.2
    assert found == {"share": (None, "c0"), "percent": ("c0", None), "absolute": ("c0", "c1")}


def test_limits_predicted_figures_and_damage_stand_beside_the_choice():
    (student,) = choose_students(BLOCKS, REST, config(students={"s": {"max_macs": 0.4}}))
    assert student.limits == {"macs": pytest.approx(7600)}
    assert student.selection.names == ("c0", "c0")
    assert student.selection.figures == Figures(parameters=900, macs=7500, bytes=3600)
    assert student.selection.damage == pytest.approx(0.3)


def test_what_max_damage_leaves_out_is_not_chosen_and_the_choice_says_why():
    values = {"students": {"s": {"max_parameters": 0.8}}, "max_damage": 0.15}
    (student,) = choose_students(BLOCKS, REST, config(**values))
    first, second = student.selection.choices
    assert first.candidate is None
    assert first.reason == "damage 0.2 is over stitch.max_damage 0.15"
    assert first.damage_kl == 0.2
    assert second.candidate == "c0"


def test_an_impossible_limit_names_the_student_and_what_can_be_reached():
    with pytest.raises(BudgetError) as raised:
        chosen(students={"tiny": {"max_parameters": 300}, "good": {"max_macs": 0.5}})
    message = str(raised.value)
    assert message.startswith("student tiny: no choice of candidates keeps to 300 parameters")
    assert "the smallest reachable is 400 parameters" in message
    assert "stitch.max_damage 1 leaves out 2 of 6 candidates" in message
    # with c2 of block a: 100 + 10 + 200 is still over 300
    assert "without it the smallest reachable is 310 parameters" in message
    assert "good" not in message


def test_it_says_where_a_larger_max_damage_would_do():
    with pytest.raises(BudgetError, match="without it the limits can be kept"):
        chosen(students={"tiny": {"max_parameters": 310}})


def test_a_limit_below_what_no_block_holds_asks_for_other_blocks():
    with pytest.raises(BudgetError, match="outside of the blocks has 100 parameters alone: raise"):
        chosen(students={"tiny": {"max_parameters": 99}})
    with pytest.raises(BudgetError, match="Raise the limits, or add smaller candidates"):
        chosen(students={"tiny": {"max_parameters": 101}})


def test_of_a_mix_the_point_of_the_smallest_common_relaxation_is_named():
    """Parameters alone reach 400, MACs alone 4000; together no choice keeps to 405 and 4050."""
    with pytest.raises(BudgetError) as raised:
        chosen(students={"mix": {"max_parameters": 405, "max_macs": 4050}})
    message = str(raised.value)
    assert "keeps to 405 parameters and 4,050 MACs" in message
    assert "each alone, 400 parameters, 4,000 MACs" in message
    # a's c0 and b's c1: 600 parameters (48.1 % over), 4000 MACs; with c1: 400 and 7500 (85.2 %)
    assert "nearest to all together is 600 parameters, 4,000 MACs (at most 48.1% over)" in message


def test_all_impossible_budgets_are_in_one_error():
    with pytest.raises(BudgetError) as raised:
        chosen(students={"x": {"max_parameters": 10}, "y": {"max_macs": 10}})
    assert "student x: " in str(raised.value)
    assert "student y: " in str(raised.value)


def test_budgets_are_checked_before_anything_is_trained():
    good = config(students={"s": {"max_parameters": 310}})
    check_budgets(BLOCKS, REST, good)  # c2 may train better than its damage says
    with pytest.raises(BudgetError) as raised:
        check_budgets(BLOCKS, REST, config(students={"s": {"max_parameters": 110}}))
    # 100 + 10 + 1
    assert "the smallest reachable is 111 parameters" in str(raised.value)
    assert "max_damage" not in str(raised.value)
    check_budgets(BLOCKS, REST, config(students={"s": {"max_latency": "1us"}}))  # not known yet


# ---------------------------------------------------------------- the sweep


@pytest.mark.parametrize("along", ["parameters", "macs", "bytes"])
def test_a_sweep_goes_from_the_smallest_student_up_with_falling_damage(along):
    values = {"students": {}, "sweep": {"points": 12, "along": along}}
    students = choose_students(BLOCKS, REST, config(**values))
    assert students[0].name == "sweep-1"
    figures = [student.selection.figures.of(along) for student in students]
    limits = [student.limits[along] for student in students]
    assert figures[0] == limits[0] == {"parameters": 400, "macs": 4000, "bytes": 1600}[along]
    assert figures == sorted(set(figures))
    damages = [student.selection.damage for student in students]
    assert damages == sorted(set(damages), reverse=True)
    assert all(figure <= limit for figure, limit in zip(figures, limits, strict=True))
    assert not any(student.selection.is_teacher for student in students)


def test_limits_of_a_sweep_are_evenly_apart_on_a_logarithmic_scale():
    values = {"students": {}, "sweep": {"points": 2, "along": "parameters"}}
    first, second = choose_students(BLOCKS, REST, config(**values))
    assert first.limits["parameters"] == 400
    assert second.limits["parameters"] == pytest.approx((400 * 1900) ** 0.5)


def test_equal_students_of_a_sweep_are_dropped_and_named(caplog):
    values = {
        "students": {"mine": {"max_parameters": 400}},
        "sweep": {"points": 20, "along": "parameters"},
    }
    with caplog.at_level(logging.INFO):
        found = chosen(**values)
    assert next(iter(found)) == "mine"
    assert "sweep-1" not in found
    assert len(set(found.values())) == len(found)
    assert "sweep-1 (400 parameters): the same as mine, dropped" in caplog.text


def test_a_sweep_without_candidates_has_nothing_to_make():
    with pytest.raises(BudgetError, match="leaves out 6 of 6 candidates"):
        chosen(students={}, sweep={"points": 3}, max_damage=0.05)


def test_named_students_may_not_take_the_sweeps_names():
    with pytest.raises(ValueError, match="`sweep-2` is the name of a student of `sweep`"):
        config(students={"sweep-2": {"max_macs": 0.5}}, sweep={"points": 3})
