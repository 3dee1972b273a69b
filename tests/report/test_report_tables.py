"""Tables and sentences from figures made by hand."""

from __future__ import annotations

import pytest

from pbkd.errors import ArtifactError
from pbkd.report import (
    BlockPhase,
    Measured,
    Table,
    block_phase_sentence,
    read_measured,
    read_metrics,
    stage_table,
)
from pbkd.report.tables import energy_sentences, job_table


def measured(**changes: object) -> Measured:
    machine = {"machine_id": "m", "processor": "cpu", "cores": 2, "gpus": [], "python": "3"}
    return Measured.model_validate(
        {
            "machine": machine | {"torch": "2"},
            "date": "2030-01-02",
            "latency": {"teacher": []},
            "stages": {},
            "block_phase": None,
            **changes,
        }
    )


def rows(table: Table) -> dict[str, tuple[str, ...]]:
    assert all(len(row) == len(table.heads) for row in table.rows)
    return {row[0]: row[1:] for row in table.rows}


@pytest.mark.parametrize(
    ("energy_j", "expected"),
    [
        ({}, "not measured"),
        ({"gpu 0": None, "package 0": None}, "not measured"),
        ({"gpu 0": 20.4, "package 0": None}, "20.4 without package 0"),
        ({"gpu 0": 20.4, "package 0": 10.0}, "30.4"),
        ({"gpu 0": 0.012}, "0.012"),
        ({"gpu 0": 1234.5}, "1,234"),
    ],
)
def test_energy_that_was_not_measured_is_never_0(energy_j, expected):
    figures = measured(stages={"teacher": {"duration_s": 1.25, "energy_j": energy_j}})
    assert rows(stage_table(figures)) == {"teacher": ("1.2", expected)}


def test_a_short_time_is_not_0():
    figures = measured(stages={"blocks": {"duration_s": 0.0123, "energy_j": {}}})
    assert rows(stage_table(figures)) == {"blocks": ("0.012", "not measured")}


def test_energy_names_what_it_counts_or_why_it_is_not_there():
    def sentences(**energy_j: float | None) -> str:
        devices = {name.replace("_", "-"): value for name, value in energy_j.items()}
        return energy_sentences(
            measured(stages={"teacher": {"duration_s": 1.0, "energy_j": devices}})
        )

    both = sentences(gpu_0=20.0, cpu_package_0=3.0)
    assert "gpu-0 (the whole GPU, by NVML's energy counter or power samples), cpu-pack" in both
    assert "idle power is in it" in both
    assert "failed" not in both
    assert "its counter failed" in sentences(gpu_0=20.0, cpu_package_0=None)
    assert "gpu" not in sentences(cpu_package_0=3.0)
    assert "Energy: not measured. This machine has no counter" in sentences()
    assert "Energy: not measured (no stage ran" in energy_sentences(measured())


PHASE = {"num_workers": 2, "num_jobs": 5, "wall_s": 10.0, "jobs_s": 18.0, "speedup": 1.8}


@pytest.mark.parametrize(
    ("energy_j", "expected"), [(None, "energy not measured."), (1234.5, "energy 1,234 J.")]
)
def test_the_block_phase_is_told_or_said_to_be_not_measured(energy_j, expected):
    assert "not measured" in block_phase_sentence(measured())
    assert " 0" not in block_phase_sentence(measured())
    sentence = block_phase_sentence(measured(block_phase=PHASE | {"energy_j": energy_j}))
    assert sentence == (
        f"Block phase: 5 jobs on 2 workers, 10.0 s; 18.0 s of work, speed-up 1.80; {expected}"
    )


def test_jobs_are_numbered_by_their_start():
    job = {"worker": "gpu-0", "duration_s": 2.0, "trained": ["a/x", "a/y"], "energy_j": 7.0}
    jobs = [
        job | {"job_id": "job-001", "started_s": 4.0},
        job | {"job_id": "job-000", "started_s": 0.0, "energy_j": None, "trained": []},
    ]
    phase = BlockPhase.model_validate(PHASE | {"energy_j": None, "jobs": jobs})
    assert rows(job_table(phase)) == {
        "1": ("gpu-0", "0.0", "2.0", "not measured", "nothing: all was in the store"),
        "2": ("gpu-0", "4.0", "2.0", "7", "a/x, a/y"),
    }


def test_a_prediction_stands_beside_what_a_job_took():
    job = {"worker": "gpu-0", "duration_s": 2.0, "trained": ["a/x"], "energy_j": None}
    jobs = [
        job | {"job_id": "job-000", "started_s": 0.0, "predicted_s": 1.5},
        job | {"job_id": "job-001", "started_s": 4.0},
    ]
    table = job_table(BlockPhase.model_validate(PHASE | {"energy_j": None, "jobs": jobs}))
    assert table.heads[3:5] == ("duration (s)", "predicted (s)")
    assert {number: row[2:4] for number, row in rows(table).items()} == {
        "1": ("2.0", "1.5"),
        "2": ("2.0", "not predicted"),
    }


@pytest.mark.parametrize(
    ("predicted_s", "expected"),
    [
        (None, "10.0 s; "),
        (10.6, "10.0 s, predicted 10.6 s (6 % more than it took); "),
        (7.5, "10.0 s, predicted 7.5 s (25 % less than it took); "),
        (10.01, "10.0 s, predicted 10.0 s (as it took); "),
    ],
)
def test_the_block_phase_is_set_against_its_prediction(predicted_s, expected):
    phase = PHASE | {"energy_j": None, "predicted_s": predicted_s}
    sentence = block_phase_sentence(measured(block_phase=phase))
    assert sentence.startswith(f"Block phase: 5 jobs on 2 workers, {expected}18.0 s of work")


@pytest.mark.parametrize(
    ("score_s", "expected"), [(None, "18.0 s of work, "), (1.8, "work (10.0% of it scored the c")]
)
def test_what_scoring_took_is_a_share_of_the_work(score_s, expected):
    phase = PHASE | {"energy_j": None, "score_s": score_s}
    assert expected in block_phase_sentence(measured(block_phase=phase))


@pytest.mark.parametrize("read", [read_metrics, read_measured])
def test_missing_figures_name_the_stage_that_makes_them(tmp_path, read):
    with pytest.raises(ArtifactError, match="pbkd evaluate"):
        read(tmp_path)
