"""Tables and sentences from figures made by hand."""

from __future__ import annotations

import pytest

from pbkd.errors import ArtifactError
from pbkd.plan import Job
from pbkd.report import (
    Measured,
    Metrics,
    Table,
    block_phase_sentence,
    final_table,
    read_measured,
    read_metrics,
    stage_table,
    summary_sentence,
)
from pbkd.report.tables import accuracy_table, plan_tables

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
    "finetuned_val_accuracy": 0.97,
    "blocks_replaced": 3,
    "blocks_total": 5,
}
SMALL = TEACHER | STEPS | {"test_accuracy": 0.937, "num_parameters": 200_000, "macs": 10_000_000}
SMALL |= {"file_bytes": 1_000_000, "bytes_ratio": 4.0}
LARGE = SMALL | {"file_bytes": 2_000_000, "bytes_ratio": 2.0, "test_accuracy": 0.96}
METRICS = Metrics.model_validate({"teacher": TEACHER, "students": {"large": LARGE, "small": SMALL}})


def latency(batch_size: int, median_ms: float) -> dict[str, object]:
    values = {"median_ms": median_ms, "p25_ms": median_ms, "p75_ms": median_ms, "repeats": 9}
    return values | {"batch_size": batch_size, "threads": 2, "device": "cpu"}


def measured(**changes: object) -> Measured:
    machine = {"machine_id": "m", "processor": "cpu", "cores": 2, "gpus": [], "python": "3"}
    return Measured.model_validate(
        {
            "machine": machine | {"torch": "2"},
            "date": "2030-01-02",
            "latency": {
                "teacher": [latency(1, 3.0), latency(8, 12.0)],
                "large": [latency(1, 2.0), latency(8, 6.0)],
                "small": [latency(1, 6.0), latency(8, 4.0)],
            },
            "stages": {},
            "block_phase": None,
            **changes,
        }
    )


def rows(table: Table) -> dict[str, tuple[str, ...]]:
    assert all(len(row) == len(table.heads) for row in table.rows)
    return {row[0]: row[1:] for row in table.rows}


def test_the_final_table_sets_each_student_against_the_teacher():
    table = final_table(METRICS, measured())
    assert table.heads == ("", "teacher", "large", "small")
    assert rows(table) == {
        "accuracy (test)": ("95.00%", "96.00%", "93.70%"),
        "accuracy (validation)": ("98.00%", "98.00%", "98.00%"),
        "parameters": ("1,000,000", "200,000 (5.0x less)", "200,000 (5.0x less)"),
        "MACs per image": ("40,000,000", "10,000,000 (4.0x less)", "10,000,000 (4.0x less)"),
        "file bytes": ("4,000,000", "2,000,000 (2.0x less)", "1,000,000 (4.0x less)"),
        "latency, batch 1 (ms)": ("3.00", "2.00 (1.50x)", "6.00 (0.50x)"),
        "latency, batch 8 (ms)": ("12.00", "6.00 (2.00x)", "4.00 (3.00x)"),
    }


def test_without_latencies_the_final_table_has_no_row_for_them():
    nothing = measured(latency={"teacher": [], "large": [], "small": []})
    assert not any("latency" in row for row in rows(final_table(METRICS, nothing)))


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ((3.0, 2.0), "The teacher at 25% of its bytes, 1.5x faster at batch 1, -1.3 points"),
        ((3.0, 6.0), "The teacher at 25% of its bytes, 2.0x slower at batch 1, -1.3 points"),
        (None, "The teacher at 25% of its bytes, -1.3 points of accuracy."),
    ],
)
def test_the_summary_is_about_the_smallest_student(medians, expected):
    teacher, student = ([], []) if medians is None else ([latency(1, ms)] for ms in medians)
    figures = measured(latency={"teacher": teacher, "large": teacher, "small": student})
    assert summary_sentence(METRICS, figures).startswith(expected)


def test_the_summary_says_nothing_of_batch_1_where_only_another_one_was_measured():
    entries = [latency(8, 3.0)]
    figures = measured(latency={"teacher": entries, "large": entries, "small": entries})
    assert "batch" not in summary_sentence(METRICS, figures)


def test_accuracy_is_shown_step_by_step():
    assert rows(accuracy_table(METRICS))["small"] == (
        "3 of 5",
        "50.00%",
        "75.00%",
        "97.00%",
        "98.00%",
    )


@pytest.mark.parametrize(
    ("energy_j", "expected"),
    [
        ({}, "not measured"),
        ({"gpu 0": None, "package 0": None}, "not measured"),
        ({"gpu 0": 20.4, "package 0": None}, "20"),
        ({"gpu 0": 20.4, "package 0": 10.0}, "30"),
    ],
)
def test_energy_that_was_not_measured_is_never_0(energy_j, expected):
    figures = measured(stages={"teacher": {"duration_s": 1.25, "energy_j": energy_j}})
    assert rows(stage_table(figures)) == {"teacher": ("1.2", expected)}


def test_the_block_phase_is_told_or_said_to_be_not_measured():
    assert "not measured" in block_phase_sentence(measured())
    assert " 0" not in block_phase_sentence(measured())
    phase = {"num_workers": 2, "num_jobs": 5, "wall_s": 10.0, "jobs_s": 18.0, "speedup": 1.8}
    sentence = block_phase_sentence(measured(block_phase=phase | {"energy_j": None}))
    assert sentence == ("Block phase: 5 jobs on 2 workers, 10.0 s; 18.0 s of work, speed-up 1.80.")


def test_the_plan_shows_each_job_and_the_gain_of_each_number_of_workers():
    jobs = [Job("job-000", ("a/x", "a/y"), 3e9), Job("job-001", ("b/x",), 1e9)]
    job_table, gain_table = plan_tables({1: jobs, 2: jobs})
    assert rows(job_table) == {
        "job-000": ("a/x, a/y", "3.0", "75%"),
        "job-001": ("b/x", "1.0", "25%"),
    }
    assert rows(gain_table) == {
        "1": ("2", "4.0", "4.0", "1.00", "100%"),
        "2": ("2", "3.0", "3.0", "1.33", "67%"),
    }


@pytest.mark.parametrize("read", [read_metrics, read_measured])
def test_missing_figures_name_the_stage_that_makes_them(tmp_path, read):
    with pytest.raises(ArtifactError, match="pbkd evaluate"):
        read(tmp_path)
