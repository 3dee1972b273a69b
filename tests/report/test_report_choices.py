"""Baselines, budgets and choices of a family: every figure is the record's, nothing is hidden."""

from __future__ import annotations

import pytest

from pbkd.config import StitchConfig
from pbkd.report import Metrics, Table, render
from pbkd.report.baselines import baseline_sentences, baseline_table
from pbkd.report.budgets import budget_table, damage_table, machine_sentence
from pbkd.report.choices import candidate_table, choice_matrix, choice_table
from tests.report.html_page import Page
from tests.report.made_up import choices, family, inputs, trainees

BOTH = ("scratch", "distill")


def rows(table: Table | None) -> list[tuple[str, ...]]:
    assert table is not None
    assert all(len(row) == len(table.heads) for row in table.rows)
    return list(table.rows)


def with_gains(*gains: float) -> Metrics:
    """Students better than their scratch baselines by so much test accuracy."""
    metrics, _ = family(len(gains), ("scratch",))
    baselines = {
        name: {"scratch": own.model_copy(update={"test_accuracy": own.test_accuracy - gain})}
        for (name, own), gain in zip(metrics.by_size.items(), gains, strict=True)
    }
    return metrics.model_copy(update={"baselines": baselines})


# ---------------------------------------------------------------- baselines


def test_every_baseline_has_a_row_with_its_seconds():
    metrics, measured = family(2, BOTH)
    table = rows(baseline_table(metrics, measured))
    assert [row[0] for row in table[:3]] == [
        "sweep-2",
        "sweep-2, from scratch",
        "sweep-2, distilled whole",
    ]
    own, scratch = metrics.students["sweep-2"], metrics.baselines["sweep-2"]["scratch"]
    assert table[0][1:] == (f"{own.test_accuracy:.2%}", f"{own.val_accuracy:.2%}", "", "812", "812")
    assert table[1][1:] == (
        f"{scratch.test_accuracy:.2%}",
        f"{scratch.val_accuracy:.2%}",
        "-2.10",
        "812",
        "640",
    )


def test_seconds_that_are_not_known_are_said_to_be_so():
    metrics, measured = family(1, BOTH)
    unknown = measured.model_copy(update={"device_s": {}, "baselines": {}})
    table = rows(baseline_table(metrics, unknown))
    assert [row[-2:] for row in table] == [("not measured",) * 2] * 3


def test_without_baselines_there_is_no_table():
    metrics, measured = family(3)
    assert baseline_table(metrics, measured) is None
    assert baseline_sentences(metrics) == []
    page = Page(render(inputs(metrics, measured)))
    assert not any("baseline " in line for line in page.text)
    assert "Students against baselines" not in page.text


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (0.012, "half is better than training from scratch by 1.20 points of test accuracy"),
        (-0.012, "Training from scratch is better than half by 1.20 points of test accuracy"),
        (0.0, "half and training from scratch reach the same test accuracy"),
    ],
)
def test_a_baseline_that_is_better_is_said_to_be(gain, expected):
    (sentence,) = baseline_sentences(with_gains(gain))
    assert sentence == f"{expected}, for the same seconds."


def test_students_that_are_beaten_are_named():
    (sentence,) = baseline_sentences(with_gains(0.02, -0.004, 0.0, 0.01))
    assert sentence == (
        "2 of 4 students are better than training from scratch for the same seconds, by 1.00 to "
        "2.00 points of test accuracy; as good: sweep-2; worse: sweep-3 by 0.40 points."
    )


def test_students_that_are_all_beaten_gain_nothing():
    (sentence,) = baseline_sentences(with_gains(-0.004, -0.01))
    assert sentence.startswith("0 of 2 students are better than training from scratch for the same")
    assert "seconds; worse: sweep-2 by 0.40, sweep-1 by 1.00 points." in sentence


# ---------------------------------------------------------------- budgets


def test_a_limit_stands_beside_its_prediction_and_what_was_measured():
    metrics, measured = family(1, limits=4)
    assert rows(budget_table(metrics, measured)) == [
        ("half", "parameters", "1,919,000 (50%)", "1,900,000", "1,900,000", "99% of the limit"),
        ("half", "MACs", "44,440,000 (56%)", "44,000,000", "44,000,000", "99% of the limit"),
        ("half", "file bytes", "7,685,090 (51%)", "7,609,000", "7,609,000", "99% of the limit"),
        ("half", "latency", "2.500 ms", "2.400 ms", "2.450 ms", "98% of the limit"),
    ]


def test_a_student_over_its_limit_is_said_to_be():
    metrics, measured = family(1, limits=4)
    over = measured.model_copy(update={"stitched_latency_ms": {"half": 2.6}})
    assert rows(budget_table(metrics, over))[-1][-2:] == ("2.600 ms", "over by 4%")
    unknown = measured.model_copy(update={"stitched_latency_ms": {}})
    assert rows(budget_table(metrics, unknown))[-1][-2:] == ("not measured",) * 2


def test_the_latency_table_is_named_as_the_machines_only_say():
    limited, free = family(2, limits=4)[0], family(2, limits=3)[0]
    sentence = machine_sentence(limited, StitchConfig())
    assert "Limited in latency: sweep-2, sweep-1." in sentence
    assert "only machine-dependent input" in sentence
    assert "at batch 1, CPU threads: 1" in sentence
    assert "all 5 students" in machine_sentence(family(5, limits=4)[0], StitchConfig())
    assert "depends on no machine" in machine_sentence(free, StitchConfig())


def test_no_limit_is_said_to_be_none():
    metrics, measured = family(2)
    assert budget_table(metrics, measured) is None
    assert "No student has a limit." in Page(render(inputs(metrics, measured))).text


def test_the_damage_of_a_whole_student_stands_beside_the_sum_of_its_blocks():
    metrics = family(2)[0]
    assert rows(damage_table(metrics))[1] == ("sweep-1", "0.2100", "0.5200")
    own = metrics.students["sweep-1"].model_copy(update={"stitched_damage": None})
    diverged = metrics.model_copy(update={"students": {"sweep-1": own}})
    assert rows(damage_table(diverged))[0][-1] == "not finite"


# ---------------------------------------------------------------- choices


def test_one_student_has_a_table_with_reasons():
    own = choices(["half"], ["a", "b", "c", "d"])["half"]
    table = rows(choice_table(own, trainees(["a", "b", "c", "d"])))
    assert table[0] == ("a", "separable", "0.0011", "0.00", "least damage within the limits")
    assert table[1][:4] == ("b", "low_rank-ratio.0.25", "0.0088", "1.00")
    assert table[3] == ("d", "teacher's own", "2.0000", "", "too much")


def test_every_candidate_is_listed_with_its_damage():
    own = trainees(["a", "b"])
    diverged = own[0].model_copy(update={"damage": own[0].damage.model_copy(update={"kl": None})})
    table = rows(candidate_table([diverged, *own[1:]]))
    assert len(table) == 6
    assert table[0] == ("a", "separable", "not finite", "0.00")
    assert table[4] == ("b", "low_rank-ratio.0.25", "0.0088", "1.00")


def test_a_family_has_a_matrix_of_blocks_and_students():
    names, blocks = ["large", "small"], [f"b{index}" for index in range(9)]
    chosen = choices(names, blocks)
    matrix = choice_matrix(chosen)
    assert matrix.students == ("large", "small")
    assert [block for block, _ in matrix.rows] == blocks
    for row, (_, cells) in enumerate(matrix.rows):
        for column, name in enumerate(names):
            cell, choice = cells[column], chosen[name][row]
            assert cell is not None
            assert cell.candidate == choice.candidate
            assert cell.reason == choice.reason
            assert cell.damage == (f"{choice.damage_kl:.4f}" if choice.candidate else "")
    shades = [c.shade for _, cells in matrix.rows for c in cells if c and c.candidate]
    assert min(shades) == 6
    assert max(shades) == 40


def test_a_block_of_one_student_alone_leaves_the_others_empty():
    chosen = choices(["a"], ["x"]) | choices(["b"], ["x", "y"])
    assert choice_matrix(chosen).rows[1][1][0] is None


def test_the_page_of_20_students_and_200_blocks_scrolls_inside_its_matrix():
    metrics, measured = family(20, BOTH, limits=4)
    given = inputs(metrics, measured, num_blocks=200)
    text = render(
        type(given)(**{**vars(given), "trainees": given.trainees[:6]})  # pictures are not asked
    )
    page = Page(text)
    assert text.count('<table class="matrix">') == 1
    start = text.index('<table class="matrix">')
    matrix = Page(text[start : text.index("</table>", start)] + "</table>")
    assert len(matrix.all("tr")) == 201
    assert len(matrix.all("td")) == 200 * 20
    assert len([cell for cell in matrix.all("td") if cell.get("class") == "own"]) == 200 * 20 // 4
    scrolling = [div["class"] for div in page.all("div") if div.get("role") == "region"]
    assert len(scrolling) >= len(page.all("table"))
    assert any("all 20 students" in line for line in page.text)
