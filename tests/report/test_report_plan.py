"""Tables, sentences and the page of plans from costs made by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pbkd.distill import Profile
from pbkd.plan import BlockCost, Limits, Plan, TraineeCost, plan_block_phase
from pbkd.report.plan import (
    Plans,
    basis_sentences,
    bottleneck_sentences,
    plan_sentence,
    planned_jobs_table,
    render_plan,
    source_of,
    workers_table,
)
from pbkd.report.plan_plots import durations_s, planned_jobs, speedups
from pbkd.report.tables import Table, duration_text
from tests.report.html_page import Page

PROFILE = Profile.model_validate(
    {
        "device": "cpu",
        "threads": 1,
        "num_workers": 2,
        "memory_bytes": 1 << 30,
        "batch_size": 64,
        "setup_s": 0.0,
        "teacher_s": {},
        "whole_teacher_s": 0.0,
        "capture_batch": 64,
        "capture_gain": 1.0,
        "cuts": {},
        "trainees": {},
        "disk": {"write": 1.0, "verify": 1.0, "read": 1.0},
        "duration_s": 3.25,
    }
)


def block(
    path: str, teacher_s: float = 0.0, read_s: float = 0.0, write_s: float = 0.0
) -> BlockCost:
    return BlockCost(
        path,
        teacher_s,
        read_input_s=read_s,
        read_output_s=read_s,
        write_input_s=write_s,
        write_output_s=write_s,
        input_bytes=3_000_000,
        output_bytes=2_000_000,
    )


def plans_of(
    names: dict[str, float], *numbers: int, here: int = 2, source: str = "relay", **cost: float
) -> Plans:
    """Plans for trainees of one block each: its name to the seconds of its own."""
    blocks = [block(name.split("/")[0], **cost) for name in names]
    trainees = [TraineeCost(n, n.split("/")[0], s, 4_000_000) for n, s in names.items()]

    def planned(number: int) -> Plan:
        return plan_block_phase(blocks, trainees, (1.0,) * number, Limits(), source)  # type: ignore[arg-type]

    return Plans("net", {n: planned(n) for n in sorted({*numbers, 1, here})}, here, PROFILE)


def rows(table: Table) -> dict[str, tuple[str, ...]]:
    assert all(len(row) == len(table.heads) for row in table.rows)
    return {row[0]: row[1:] for row in table.rows}


THREE = {"a/x": 60.0, "b/x": 60.0, "c/x": 120.0}


# ---------------------------------------------------------------- tables


def test_each_number_of_workers_is_set_against_the_best_plan_of_one():
    memory = ("12 MB", "8 MB", "8 MB", "8 MB")
    table = rows(workers_table(plans_of(THREE, 4, 1024)))
    assert table == {
        "1": ("1", "relay", "4.0 min", "1.00", "100%", "4.0 min", "none", memory[0]),
        "2 (here)": ("2", "relay", "2.0 min", "2.00", "100%", "2.0 min", "none", memory[1]),
        "4": ("2", "relay", "2.0 min", "2.00", "50%", "2.0 min", "none", memory[2]),
        "1024": ("2", "relay", "2.0 min", "2.00", "0.2%", "2.0 min", "none", memory[3]),
    }


def test_a_cache_is_in_the_time_and_on_the_disk():
    plans = plans_of({"a/x": 60.0, "b/x": 60.0}, source="cache", read_s=1.0, write_s=3.0)
    one, two = workers_table(plans).rows
    assert one[2:4] == two[2:4][:1] + one[3:4] == ("cache", "2.3 min")
    assert two[7] == "10 MB"
    assert plans.own.fill_s == 6.0
    assert rows(planned_jobs_table(plans))["job-000"] == ("cache", "6.0 s", "62 s", "a/x")


def test_a_relay_that_goes_on_from_the_cache_makes_a_plan_mixed():
    plan = plans_of(THREE).own
    assert source_of(plan) == "relay"
    later = replace(plan.jobs[0], start="b")
    assert source_of(replace(plan, jobs=(later, *plan.jobs[1:]))) == "mixed"
    cached = replace(plan.jobs[0], source="cache")
    assert source_of(replace(plan, jobs=(cached, *plan.jobs[1:]))) == "mixed"
    assert source_of(replace(plan, jobs=(cached,))) == "cache"


def test_a_job_says_from_where_its_relay_goes_on():
    plans = plans_of(THREE)
    own = replace(plans.own, jobs=tuple(replace(job, start="b") for job in plans.own.jobs))
    table = planned_jobs_table(replace(plans, by_workers=plans.by_workers | {2: own}))
    assert {row[1] for row in table.rows} == {"relay from b"}


def test_many_jobs_and_many_trainees_are_shortened_and_counted():
    plans = plans_of({f"b{i}/x": 60.0 for i in range(25)}, here=25)
    assert len(planned_jobs_table(plans).rows) == 25
    short = planned_jobs_table(plans, max_rows=20).rows
    assert len(short) == 21
    assert short[-1][0] == "... and 5 more"
    assert len(planned_jobs_table(plans, max_rows=25).rows) == 25
    alone = replace(plans, here=1)
    assert planned_jobs_table(alone).rows[0][4] == "b0/x, b1/x, b2/x and 22 more"


def test_a_job_takes_longer_on_a_slow_worker():
    plan = plans_of(THREE).own
    assert sorted(durations_s(plan, (1.0, 1.0))) == [120.0, 120.0]
    (first,), (second,) = plan.placement.workers
    durations = durations_s(plan, (2.0, 0.5))
    assert (durations[first], durations[second]) == (60.0, 240.0)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0 s"),
        (0.0123, "0.012 s"),
        (0.32, "0.32 s"),
        (3.24, "3.2 s"),
        (9.96, "10 s"),
        (119.0, "119 s"),
        (840.0, "14 min"),
        (7560.0, "2.1 h"),
        (40 * 3600.0, "40 h"),
        (3.5 * 86400, "3.5 days"),
    ],
)
def test_a_duration_has_the_unit_that_reads_best(seconds, expected):
    assert duration_text(seconds) == expected


# ---------------------------------------------------------------- sentences


def test_the_sentence_names_the_most_useful_number_of_workers():
    text = plan_sentence(plans_of({f"b{i}/x": 60.0 for i in range(4)}, 4, 8, 64))
    assert text == (
        "Predicted: 4 candidates in 2.0 min on the 2 workers of this machine, 2x faster than on "
        "one; 60 s on 4 workers like these, 4x faster."
    )
    alone = plan_sentence(plans_of({"a/x": 60.0, "b/x": 60.0}, 2, here=1))
    assert alone == (
        "Predicted: 2 candidates in 2.0 min on one worker; 60 s on 2 workers like these, 2x "
        "faster than on one."
    )


def test_workers_that_gain_nothing_are_not_recommended():
    text = plan_sentence(plans_of(THREE, 4, 8))
    assert text.endswith("on the 2 workers of this machine, 2x faster than on one.")


def test_every_number_of_workers_says_what_limits_it():
    plans = plans_of(THREE, 8)
    texts = bottleneck_sentences(plans)
    assert [text.split(":")[0] for text in texts] == ["1 worker", "2 workers", "8 workers"]
    assert plans.by_workers[8].bottleneck in texts[2]
    own = replace(plans.own, too_large=("a/x",))
    large = replace(plans, by_workers=plans.by_workers | {2: own})
    assert bottleneck_sentences(large)[-1].startswith("Memory: a/x need more")


def test_the_basis_of_the_times_is_told():
    text = basis_sentences(plans_of(THREE))
    assert "what 2 workers with 1 CPU thread each measured at the same time" in text
    assert "(cpu) in 3.2 s" in text
    assert "All epochs are counted" in text


# ---------------------------------------------------------------- the page


def test_the_page_is_whole_by_itself_and_shows_charts_and_tables():
    plans = plans_of(THREE, 4, 64, teacher_s=5.0)
    text = render_plan(plans)
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert not re.search(r"@import|@font-face|url\((?!#)|https?:|src=", text)
    assert page.text.count("net, planned") == 2
    for table in (workers_table(plans), planned_jobs_table(plans)):
        assert all(cell in page.text for row in table.rows for cell in row)
    assert plan_sentence(plans) in page.text
    labels = [str(picture["aria-label"]) for picture in page.all("svg")]
    assert any(
        label.startswith("Predicted speed-up by number of workers: 1 with 1") for label in labels
    )
    assert f"{len(plans.own.jobs)} planned jobs on 2 workers over time: relay" in labels
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert render_plan(plans) == text


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$x_{$"])
def test_names_are_shown_as_they_are_and_never_run(name):
    page = Page(render_plan(plans_of({f"{name}b": 1.0})))
    assert page.all("script") == [{}]  # the page's own
    assert f"{name}b" in page.text


def test_a_plan_of_nothing_has_no_charts():
    plans = plans_of({}, 4)
    assert plan_sentence(plans) == "There is nothing to train."
    assert Page(render_plan(plans)).all("svg") == []


def test_one_number_of_workers_is_drawn_too():
    assert "1 with 1" in speedups({1: 1.0}, {}, 1)


@pytest.mark.parametrize(
    ("own_s", "unit"), [(20.0, "seconds"), (1000.0, "minutes"), (40_000.0, "hours")]
)
def test_the_time_axis_has_a_unit_that_fits(own_s, unit):
    text = planned_jobs(plans_of({"a/x": own_s, "b/x": own_s}).own, (1.0, 1.0))
    assert f">{unit}, predicted</text>" in text


def test_filling_the_cache_is_drawn_before_the_jobs():
    plans = plans_of({"a/x": 9.0, "b/x": 9.0}, source="cache", write_s=3.0)
    assert planned_jobs(plans.own, (1.0, 1.0)).count(">fill</text>") == 2
    assert "filling the cache" in render_plan(plans)
    assert "filling the cache" not in render_plan(plans_of(THREE))
