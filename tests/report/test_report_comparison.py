"""Two runs side by side, wherever they lie."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pbkd.artifacts import write_json
from pbkd.config import Params
from pbkd.errors import ArtifactError, ConfigError
from pbkd.report.comparison import (
    comparison_table,
    latency_is_comparable,
    notes,
    render_comparison,
    settings_table,
)
from pbkd.report.results import MEASURED, METRICS
from pbkd.report.runs import Run, read_run
from tests.report.html_page import Page
from tests.report.made_up import family


def run_of(name: str, num_students: int = 2, seed: int = 0, **params: object) -> Run:
    metrics, measured = family(num_students, seed=seed)
    return Run(name, metrics, measured, Params.model_validate(params))


def write(run: Run, root: Path, params: str = "seed: 1\n") -> None:
    for name, content in ((METRICS, run.metrics), (MEASURED, run.measured)):
        write_json(root / "results" / name, content)
    (root / "params.yaml").write_text(params)


def cells(before: Run, after: Run) -> dict[str, dict[str, str]]:
    table = comparison_table(before, after)
    return {row[0]: dict(zip(table.heads[1:], row[1:], strict=True)) for row in table.rows}


def test_each_figure_stands_beside_the_other_with_its_change():
    before, after = run_of("a"), run_of("b", seed=1)
    student = after.metrics.students["sweep-1"]
    smaller = student.model_copy(update={"file_bytes": student.file_bytes // 4})
    students = after.metrics.students | {"sweep-1": smaller}
    after = replace(after, metrics=after.metrics.model_copy(update={"students": students}))
    shown = cells(before, after)
    assert shown["teacher"]["file"] == "15.2 MB (equal)"
    assert shown["sweep-1"]["file"] == "6.24 MB -> 1.56 MB (0.25x)"
    old, new = (run.metrics.students["sweep-1"].test_accuracy for run in (before, after))
    points = 100 * (new - old)
    assert shown["sweep-1"]["accuracy (test)"] == f"{old:.2%} -> {new:.2%} ({points:+.2f})"
    assert shown["sweep-1"]["speed, batch 1"] == "1.16x (equal)"


def test_a_student_of_one_run_alone_is_shown_without_a_change():
    shown = cells(run_of("a", 1), run_of("b", 2))
    assert shown["half"]["file"] == "7.61 MB -> -"
    assert shown["sweep-2"]["file"] == "- -> 7.61 MB"
    assert shown["sweep-2"]["speed, batch 1"] == "- -> 1.08x"


def test_latency_of_another_machine_is_left_out_and_said():
    before, after = run_of("a"), run_of("b")
    assert latency_is_comparable(before, after)
    machine = after.measured.machine.model_copy(update={"machine_id": "other"})
    after = replace(after, measured=after.measured.model_copy(update={"machine": machine}))
    assert not latency_is_comparable(before, after)
    assert not any("speed" in head for head in comparison_table(before, after).heads)
    assert "other machines" in notes(before, after)[0]


def test_settings_that_differ_and_no_others_are_listed():
    before = run_of("a", distill={"epochs": 5}, stitch={"students": {"half": {"max_macs": 0.5}}})
    after = run_of("b", distill={"epochs": 9}, stitch={"students": {"tiny": {"max_macs": 0.1}}})
    table = settings_table(before, after)
    assert table is not None
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["distill.epochs"] == ("5", "9")
    assert all(name.startswith(("distill.epochs", "stitch.students.")) for name in rows)
    assert settings_table(before, replace(after, params=None)) is None
    same = settings_table(before, before)
    assert same is not None
    assert same.rows == ()


def test_the_page_has_both_runs_in_one_picture():
    page = Page(render_comparison(run_of("a<b>"), run_of("other", 3)))
    assert page.all("h1")
    assert "a<b> and other, compared" in page.text
    (picture,) = [svg for svg in page.all("svg") if svg["role"] == "group"]
    assert "sweep-1 (a<b>)" in picture["aria-label"]
    marks = [group["aria-label"] for group in page.all("g") if group.get("class") == "mark"]
    assert len(marks) == 3 + 4
    assert sum("(other)" in mark for mark in marks) == 4


# ---------------------------------------------------------------- where runs lie


def test_a_workspace_and_its_results_are_the_same_run(tmp_path):
    write(run_of("a"), tmp_path)
    one, two = (read_run(str(path), tmp_path) for path in (tmp_path, tmp_path / "results"))
    assert one.metrics == two.metrics
    assert one.params == two.params == Params(seed=1)


def git(root: Path, *command: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, "-C", root, *command], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git on this machine")
def test_revisions_and_experiments_are_read_from_git(tmp_path):
    root = tmp_path / "repository" / "workspace"  # not the repository's top
    root.mkdir(parents=True)
    git(root.parent, "init", "--quiet")
    for number in (1, 2):
        write(run_of("a", number), root, f"seed: {number}\n")
        git(root, "add", ".")
        git(root, "commit", "--quiet", "-m", str(number))
    git(root, "update-ref", "refs/exps/ab/cdef/bold-fox", "HEAD~1")
    assert len(read_run("HEAD", root).metrics.students) == 2
    for name in ("HEAD~1", "bold-fox"):
        read = read_run(name, root)
        assert list(read.metrics.students) == ["half"]
        assert read.params == Params(seed=1)
    with pytest.raises(ConfigError, match="run nonsense: neither a folder, nor a revision"):
        read_run("nonsense", root)


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder"):
        read_run("--help", tmp_path)
    with pytest.raises(ArtifactError, match=r"run .*metrics\.json is missing"):
        read_run(str(tmp_path), tmp_path)
    write(run_of("a"), tmp_path, "not: ours\n")
    assert read_run(str(tmp_path), tmp_path).params is None
    (tmp_path / "results" / METRICS).write_text('{"teacher": 5}')
    with pytest.raises(ArtifactError, match="not written by pbkd"):
        read_run(str(tmp_path), tmp_path)
