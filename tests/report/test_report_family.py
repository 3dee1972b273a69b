"""Teacher and students side by side: sentences and tables from figures made by hand."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.table import Table as RichTable

from pbkd.report import Measured, Metrics, Table, final_table, summary_sentence
from pbkd.report.family import MAX_COLUMNS, accuracy_table
from pbkd.report.numbers import count_text, share_text, size_text
from tests.report.made_up import family, latency

TEACHER = {
    "val_accuracy": 0.98,
    "test_accuracy": 0.95,
    "num_parameters": 1_000_000,
    "macs": 40_000_000,
    "file_bytes": 4_000_000,
}
STEPS = {
    "stitched_val_accuracy": 0.5,
    "recalibrated_val_accuracy": 0.75,
    "repaired_val_accuracy": 0.875,
    "finetuned_val_accuracy": 0.97,
    "limits": {},
    "predicted": {},
    "stitched": {},
    "predicted_damage": 0.25,
    "stitched_damage": None,
    "blocks_replaced": 3,
    "blocks_total": 5,
}
SMALL = TEACHER | STEPS | {"test_accuracy": 0.937, "num_parameters": 200_000, "macs": 10_000_000}
SMALL |= {"file_bytes": 1_000_000, "bytes_ratio": 4.0}
LARGE = SMALL | {"file_bytes": 2_000_000, "bytes_ratio": 2.0, "test_accuracy": 0.96}
LARGE |= {"num_parameters": 2_000_000, "macs": 40_000_001}
LATENCY = {
    "teacher": [latency(1, 3.0), latency(8, 12.0)],
    "large": [latency(1, 2.0), latency(8, 6.0)],
    "small": [latency(1, 6.0), latency(8, 4.0)],
}


def metrics_of(**students: dict[str, object]) -> Metrics:
    return Metrics.model_validate({"teacher": TEACHER, "students": students})


def measured(**changes: object) -> Measured:
    return family(1)[1].model_validate(
        family(1)[1].model_dump() | {"latency": LATENCY, "device_s": {"small": 99.96}} | changes
    )


def rows(table: Table) -> dict[str, tuple[str, ...]]:
    assert all(len(row) == len(table.heads) for row in table.rows)
    return {row[0]: row[1:] for row in table.rows}


# ---------------------------------------------------------------- the final table


def test_a_few_students_are_columns_against_the_teacher_largest_first():
    table = final_table(metrics_of(small=SMALL, large=LARGE), measured())
    assert table.heads == ("", "teacher", "large", "small")
    assert rows(table) == {
        "accuracy (test)": ("95.00%", "96.00%", "93.70%"),
        "accuracy (validation)": ("98.00%", "98.00%", "98.00%"),
        "parameters": ("1,000,000", "2,000,000 (2.0x more)", "200,000 (5.0x less)"),
        "MACs per image": ("40,000,000", "40,000,001 (the same)", "10,000,000 (4.0x less)"),
        "file bytes": ("4,000,000", "2,000,000 (2.0x less)", "1,000,000 (4.0x less)"),
        "latency, batch 1 (ms)": ("3.00", "2.00 (1.50x faster)", "6.00 (2.00x slower)"),
        "latency, batch 8 (ms)": ("12.00", "6.00 (2.00x faster)", "4.00 (3.00x faster)"),
    }


def test_without_latencies_the_final_table_has_no_row_for_them():
    nothing = measured(latency={"teacher": [], "large": [], "small": []})
    table = final_table(metrics_of(small=SMALL, large=LARGE), nothing)
    assert not any("latency" in row for row in rows(table))


@pytest.mark.parametrize("num_students", [MAX_COLUMNS + 1, 20])
def test_many_students_are_rows_with_their_own_figures(num_students):
    metrics, figures = family(num_students)
    table = final_table(metrics, figures)
    assert table.heads[1:3] == ("accuracy (test)", "accuracy (validation)")
    assert table.heads[-2:] == ("ms at batch 1 (speed)", "ms at batch 256 (speed)")
    assert [row[0] for row in table.rows] == ["teacher", *metrics.by_size]
    teacher = metrics.teacher
    for name, student in metrics.students.items():
        speeds = [
            f"{own.median_ms:.2f} ({whole.median_ms / own.median_ms:.2f}x)"
            for own, whole in zip(figures.latency[name], figures.latency["teacher"], strict=True)
        ]
        share = share_text(student.num_parameters / teacher.num_parameters)
        assert rows(table)[name] == (
            f"{student.test_accuracy:.2%}",
            f"{student.val_accuracy:.2%}",
            f"{count_text(student.num_parameters)} ({share})",
            f"{count_text(student.macs)} ({share_text(student.macs / teacher.macs)})",
            f"{size_text(student.file_bytes)} "
            f"({share_text(student.file_bytes / teacher.file_bytes)})",
            *speeds,
        )


def test_the_final_table_of_10_students_fits_a_terminal_of_140_columns():
    table = final_table(*family(10))
    shown = RichTable()
    for index, head in enumerate(table.heads):
        shown.add_column(head, justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*row)
    console = Console(width=140)
    lines = console.render_lines(shown)
    text = ["".join(segment.text for segment in line) for line in lines]
    for row in table.rows:
        whole = [line for line in text if all(cell in line for cell in row)]
        assert whole, f"{row} is broken over lines"


@pytest.mark.parametrize(
    ("value", "expected"), [(0.125, "12%"), (0.0837, "8.4%"), (0.0049, "0.49%"), (1.5, "150%")]
)
def test_small_shares_keep_two_digits(value, expected):
    assert share_text(value) == expected


@pytest.mark.parametrize(
    ("value", "count", "size"),
    [
        (999, "999", "999 B"),
        (39_123_456, "39.1M", "39.1 MB"),
        (999_700, "1000k", "1000 kB"),
        (15.5e9, "15.5G", "15.5 GB"),
    ],
)
def test_counts_and_sizes_have_the_unit_that_reads_best(value, count, size):
    assert count_text(value) == count
    assert size_text(value) == size


# ---------------------------------------------------------------- the summary


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ({1: (3.0, 2.0)}, "1.50x faster at batch 1, "),
        ({1: (3.0, 6.0)}, "2.00x slower at batch 1, "),
        ({8: (3.0, 3.001)}, "as fast at batch 8, "),
        (
            {1: (3.0, 6.0), 8: (9.0, 9.0), 64: (9.0, 6.0)},
            "2.00x slower at batch 1 and 1.50x faster at batch 64, ",
        ),
        ({64: (9.0, 6.0), 1: (3.0, 6.0)}, "2.00x slower at batch 1 and 1.50x faster at batch 64, "),
        ({}, ""),
    ],
)
def test_the_summary_of_one_student_does_not_name_it(medians, expected):
    teacher = [latency(batch, pair[0]) for batch, pair in medians.items()]
    own = [latency(batch, pair[1]) for batch, pair in medians.items()]
    figures = measured(latency={"teacher": teacher, "small": own})
    sentence = f"at 25% of its bytes, {expected}-1.3 points of test accuracy."
    metrics = metrics_of(small=SMALL)
    assert summary_sentence(metrics, figures) == f"The teacher {sentence}"
    assert summary_sentence(metrics, figures, "vgg_small") == f"vgg_small {sentence}"


def val(student: dict[str, object], accuracy: float) -> dict[str, object]:
    return student | {"val_accuracy": accuracy}


@pytest.mark.parametrize(
    ("large", "small", "name", "why"),
    [
        (0.98, 0.97, "small", "the smallest of 2 within 1 point of the teacher"),
        (0.98, 0.9699, "large", "the smallest of 2 within 1 point of the teacher"),
        (0.95, 0.96, "small", "the most accurate of 2 on the validation images, where none"),
        (0.95, 0.95, "small", "the most accurate of 2"),
    ],
    ids=["both within", "one within", "none within", "none within, equal"],
)
def test_the_summary_is_about_the_smallest_student_near_the_teacher(large, small, name, why):
    metrics = metrics_of(small=val(SMALL, small), large=val(LARGE, large))
    sentence = summary_sentence(metrics, measured())
    assert f"(student {name}: {why}" in sentence
    assert sentence.startswith(f"The teacher at {'25%' if name == 'small' else '50%'} of its")


def test_test_accuracy_has_no_say_in_the_summary():
    metrics = metrics_of(small=SMALL, large=LARGE)
    worse = metrics_of(small=SMALL | {"test_accuracy": 0.1}, large=LARGE)
    assert "student small" in summary_sentence(metrics, measured())
    assert "student small" in summary_sentence(worse, measured())


# ---------------------------------------------------------------- how accuracy came about


def test_accuracy_is_shown_step_by_step():
    table = accuracy_table(metrics_of(small=SMALL, large=LARGE), measured())
    steps = ("50.00%", "75.00%", "87.50%", "97.00%")
    assert rows(table)["small"] == ("3 of 5", *steps, "100", "98.00%")
    assert rows(table)["large"] == ("3 of 5", *steps, "not measured", "98.00%")


def test_baselines_stand_beside_their_students():
    metrics, figures = family(2, ("scratch", "distill"))
    table = accuracy_table(metrics, figures)
    at = table.heads.index("baseline from scratch")
    assert table.heads[at + 1] == "baseline distilled whole"
    for name, own in metrics.baselines.items():
        cells = (name, *rows(table)[name])
        assert cells[at] == f"{own['scratch'].val_accuracy:.2%}"
        assert cells[at + 1] == f"{own['distill'].val_accuracy:.2%}"
        assert cells[at + 2] == "812"
