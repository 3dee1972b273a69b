"""Stages on a finished workspace: what they need, what they write, and that it is repeatable."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from pbkd.activations.shards import KIND
from pbkd.artifacts import Workspace, file_digest, read_json
from pbkd.config import ActivationsConfig
from pbkd.distill import TRAINEES
from pbkd.errors import ArtifactError, TeacherError
from pbkd.models import read_card
from pbkd.report import METRICS, read_measured
from pbkd.stages import STAGES, StageContext, run_stage
from pbkd.stages.activations import allowed_bytes, read_settled
from pbkd.stages.context import stage_records
from pbkd.stages.distill import plan_here, read_distilled
from pbkd.stages.evaluate import forget_measurements

ROOT = Path(__file__).parents[2]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
WITHOUT_TRACKING = STAGES[1:-1]


def run(name: str, workspace: Workspace) -> None:
    run_stage(name, StageContext.load(workspace))


def change(workspace: Workspace, section: str, **values: object) -> None:
    params = yaml.safe_load(workspace.params.read_text())
    params[section].update(values)
    workspace.params.write_text(yaml.safe_dump(params))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def keep_only_dependencies(workspace: Workspace, name: str) -> None:
    """What is left is what ``dvc.yaml`` declares for the stage; the state folder is new, too."""
    declared = {workspace.root / dep for dep in DVC[name]["deps"]}
    others = [*workspace.artifacts("").iterdir(), workspace.prepared, workspace.state]
    for path in others:
        if path not in declared:
            shutil.rmtree(path)
    shutil.rmtree(workspace.results)


# ---------------------------------------------------------------- what a stage needs


@pytest.mark.parametrize("name", WITHOUT_TRACKING)
def test_a_stage_runs_with_its_declared_dependencies_alone_and_gives_the_same(finished, name):
    before = {
        "artifacts": digests(finished.artifacts("")),
        "metrics": (finished.results / METRICS).read_bytes(),
    }
    keep_only_dependencies(finished, name)
    run(name, finished)
    if name == "evaluate":
        assert (finished.results / METRICS).read_bytes() == before["metrics"]
        return
    expected = {k: v for k, v in before["artifacts"].items() if k.startswith(f"{name}/")}
    got = {f"{name}/{k}": v for k, v in digests(finished.artifacts(name)).items()}
    timed = {"stitch.json", "repaired.json", "finetune.json", "item.json"}  # and digests of these
    expected = {k: v for k, v in expected.items() if Path(k).name not in timed}
    got = {k: v for k, v in got.items() if Path(k).name not in timed}
    if name == "distill":  # results and histories hold times
        assert {k for k in got if "weights" in k} == {k for k in expected if "weights" in k}
        expected = {k: v for k, v in expected.items() if "weights" in k or "score.json" in k}
        got = {k: v for k, v in got.items() if "weights" in k or "score.json" in k}
    assert got == expected


@pytest.mark.parametrize("name", WITHOUT_TRACKING)
def test_the_test_split_is_opened_by_evaluate_alone(finished, name):
    for path in finished.prepared.glob("test_*.npy"):
        path.unlink()
    if name != "evaluate":
        run(name, finished)
        return
    with pytest.raises(ArtifactError, match=r"split test cannot be read.*pbkd prepare"):
        run(name, finished)


@pytest.mark.parametrize(
    ("name", "missing", "named"),
    [
        ("teacher", "data/prepared", "data/prepared"),
        ("blocks", "artifacts/teacher", "artifacts/teacher"),
        ("activations", "artifacts/blocks", "artifacts/blocks"),
        ("distill", "artifacts/activations", "artifacts/activations"),
        ("stitch", "artifacts/distill", "artifacts/distill"),
        ("finetune", "artifacts/stitch", "pbkd stitch"),
        ("shrink", "artifacts/finetune", "pbkd finetune"),
        ("evaluate", "artifacts/shrink", "pbkd shrink"),
        ("register", "results", "pbkd evaluate"),
    ],
)
def test_a_missing_earlier_stage_is_named(finished, name, missing, named):
    shutil.rmtree(finished.root / missing)
    before = digests(finished.root / "artifacts")
    with pytest.raises(ArtifactError, match=r"is missing; run") as raised:
        run(name, finished)
    assert named in str(raised.value)
    assert digests(finished.root / "artifacts") == before


@pytest.mark.parametrize("old", [True, False])
def test_a_teacher_below_its_floor_writes_nothing(finished, old):
    if not old:
        shutil.rmtree(finished.artifacts("teacher"))
    before = digests(finished.root / "artifacts")
    change(finished, "teacher", epochs=1, min_accuracy=1.0)
    with pytest.raises(TeacherError, match=r"expected at least 1 \(teacher.min_accuracy\)"):
        run("teacher", finished)
    assert digests(finished.root / "artifacts") == before
    assert finished.artifacts("teacher").exists() == old
    assert [path.name for path in finished.artifacts("").glob(".*")] == []


# ---------------------------------------------------------------- repeatable


def test_teacher_and_students_do_not_depend_on_the_global_random_state(finished):
    before = {name: digests(finished.artifacts(name)) for name in ("teacher", "finetune")}
    torch.manual_seed(4711)
    for name in before:
        run(name, finished)
        assert digests(finished.artifacts(name)) == before[name]


def test_another_seed_gives_another_teacher(finished):
    before = read_card(finished.artifacts("teacher")).digest
    params = yaml.safe_load(finished.params.read_text())
    finished.params.write_text(yaml.safe_dump(params | {"seed": 1}))
    run("teacher", finished)
    assert read_card(finished.artifacts("teacher")).digest != before


def test_a_stages_time_goes_on_record_only_if_it_ends_well(finished):
    before = stage_records(finished)
    assert list(before) == list(STAGES[:-1])
    assert all(record.duration_s > 0 for record in before.values())
    run("shrink", finished)
    change(finished, "teacher", epochs=1, min_accuracy=1.0)
    with pytest.raises(TeacherError):
        run("teacher", finished)
    after = stage_records(finished)
    assert after["shrink"] != before["shrink"]
    assert after["teacher"] == before["teacher"]


# ---------------------------------------------------------------- the store and the outputs


def keys_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_changed_parameter_leaves_only_its_items_in_the_output_and_the_old_ones_in_the_store(
    finished,
):
    old = keys_in(finished.artifacts("distill") / TRAINEES)
    change(finished, "distill", epochs=1)
    run("distill", finished)
    new = {item.key for item in read_distilled(finished)}
    assert keys_in(finished.artifacts("distill") / TRAINEES) == new
    assert not new & old
    assert keys_in(finished.store.root / TRAINEES) >= new | old

    change(finished, "distill", epochs=2)  # back again: nothing to train
    started = {path: path.stat().st_mtime_ns for path in finished.store.root.rglob("*.json")}
    run("distill", finished)
    assert keys_in(finished.artifacts("distill") / TRAINEES) == old
    assert {p: p.stat().st_mtime_ns for p in finished.store.root.rglob("*.json")} == started


def test_a_rerun_trains_nothing_and_writes_the_same(finished):
    before = digests(finished.artifacts("distill"))
    assert plan_here(StageContext.load(finished)).jobs == ()
    run("distill", finished)
    assert digests(finished.artifacts("distill")) == before


def test_an_emptied_store_is_filled_again_from_the_outputs(finished):
    before = digests(finished.artifacts("distill"))
    shutil.rmtree(finished.state)
    assert plan_here(StageContext.load(finished)).jobs == ()
    run("distill", finished)
    assert digests(finished.artifacts("distill")) == before


def test_after_the_store_is_emptied_new_trainees_read_the_activations_from_the_output(finished):
    shutil.rmtree(finished.store.root)
    change(finished, "distill", epochs=1)
    run("distill", finished)
    assert {item.result.num_epochs for item in read_distilled(finished)} == {1}


def test_a_damaged_item_of_the_output_is_not_taken_for_good(finished):
    shutil.rmtree(finished.state)
    items = sorted((finished.artifacts("distill") / TRAINEES).iterdir())
    weights = items[0] / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    jobs = plan_here(StageContext.load(finished)).jobs
    assert [t.key for job in jobs for t in job.trainees] == [items[0].name]


def views_of(workspace: Workspace) -> set[tuple[str, str, str]]:
    folder = workspace.artifacts("activations")
    return {path.relative_to(folder).parts for path in folder.glob("*/*/*")}


def test_the_cache_holds_exactly_the_views_of_the_present_parameters(finished):
    blocks = {block for block, _, _ in views_of(finished)}
    assert len(blocks) == 5
    old = keys_in(finished.store.root / KIND)
    change(finished, "activations", views=1, chunk=400)
    run("activations", finished)
    assert views_of(finished) == {
        (block, side, view)
        for block in blocks
        for side in ("input", "output")
        for view in ("view-0", "view-val")
    }
    assert keys_in(finished.store.root / KIND) > old


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ({"source": "relay"}, "relay"),
        ({"source": "cache", "max_cache_gb": 0.0}, "cache"),
    ],
)
def test_the_source_is_what_the_parameters_say(finished, settings, source):
    change(finished, "activations", **settings)
    run("activations", finished)
    settled = read_json(finished.artifacts("activations") / "activations.json")
    assert settled["source"] == source
    assert bool(views_of(finished)) == (source == "cache")
    assert (settled["size_bytes"] > 1e6) == (source == "cache")


def test_auto_caches_what_measured_costs_say_and_no_more_than_it_may(finished):
    shutil.rmtree(finished.store.root)
    shutil.rmtree(finished.artifacts("activations"))
    change(finished, "activations", source="auto", max_cache_gb=0.002)
    run("activations", finished)
    settled = read_settled(finished)
    assert settled.size_bytes <= 2e6
    stored = {(block, side) for block, side, _ in views_of(finished)}
    assert stored == set(settled.sides)
    assert len(list((finished.state / "profiles").glob("*.json"))) == 1


@pytest.mark.parametrize(("store_gb", "workspace_gb"), [(1, 500), (500, 1)])
def test_the_cache_must_fit_on_the_disk_of_the_store_and_on_that_of_the_copies(
    finished, monkeypatch, store_gb, workspace_gb
):
    def usage(folder: Path) -> SimpleNamespace:
        in_store = Path(folder).is_relative_to(finished.store.root)
        return SimpleNamespace(free=(store_gb if in_store else workspace_gb) * 10**9)

    config = ActivationsConfig(max_cache_gb=4)
    assert allowed_bytes(finished, config) == 4e9
    monkeypatch.setattr("pbkd.stages.activations.shutil.disk_usage", usage)
    monkeypatch.setattr("pbkd.stages.activations._is_copied", lambda workspace: True)
    assert allowed_bytes(finished, config) == 0.8e9


# ---------------------------------------------------------------- measurements


def test_latencies_are_kept_until_they_are_forgotten(finished):
    before = read_measured(finished.results)
    run("evaluate", finished)
    again = read_measured(finished.results)
    assert again.latency == before.latency
    assert again.date == before.date
    forget_measurements(finished)
    run("evaluate", finished)
    anew = read_measured(finished.results)
    assert anew.latency != before.latency
    assert anew.latency.keys() == before.latency.keys()


def test_what_this_machine_did_not_measure_is_null(finished):
    shutil.rmtree(finished.state)
    run("evaluate", finished)
    measured = read_json(finished.results / "measured.json")
    assert measured["block_phase"] is None
    assert measured["stages"] == {}
