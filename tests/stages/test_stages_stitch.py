"""Stage `stitch`: students under budgets, made once, with what was predicted and measured."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from pbkd.artifacts import Workspace, file_digest, read_json
from pbkd.data import Stream
from pbkd.distill import damage_kl
from pbkd.errors import ArtifactError, BudgetError
from pbkd.measure import count_macs, num_parameters
from pbkd.models import load_teacher, predict
from pbkd.stages import StageContext, run_stage, stitch
from pbkd.stages.budgets import check_budgets
from pbkd.stages.distill import read_distilled
from pbkd.stages.repair_job import REPAIRED
from pbkd.students import forget_latencies, load_model

PARAMS = """\
seed: 0
prepare: {source: digits, path: data/raw, image_size: 8, limit: 400}
teacher: {model: vgg_small, weights: null, width: 0.25, epochs: 4, batch_size: 64}
blocks:
  select: convs
  candidates: [{kind: separable}, {kind: separable, depth: 2, batch_norm: true}]
activations: {source: cache, views: 1, chunk: 200}
distill: {epochs: 1, score_images: 40}
stitch:
  students: {small: {max_parameters: 0.4}, half: {max_macs: 0.5}}
  max_damage: 100
  recalibrate_batches: 2
  repair: {method: none}
"""
BEFORE = ("prepare", "teacher", "blocks", "activations", "distill")


@pytest.fixture(scope="session")
def _distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distilled")
    (root / "params.yaml").write_text(PARAMS)
    context = StageContext.load(Workspace(root, root / ".pbkd"))
    for name in BEFORE:
        run_stage(name, context)
    return root


@pytest.fixture
def distilled(_distilled: Path, tmp_path: Path) -> Workspace:
    """A copy of a workspace whose candidates are trained."""
    root = tmp_path / "workspace"
    shutil.copytree(_distilled, root)
    return Workspace(root, root / ".pbkd")


def run(workspace: Workspace, **values: object) -> list[str]:
    """Run the stage, with these settings changed; returns the students' names."""
    context = changed(workspace, **values)
    run_stage("stitch", context)
    return sorted(path.name for path in workspace.artifacts("stitch").iterdir())


def changed(workspace: Workspace, **values: object) -> StageContext:
    params = yaml.safe_load(workspace.params.read_text())
    params["stitch"].update(values)
    workspace.params.write_text(yaml.safe_dump(params))
    return StageContext.load(workspace)


def made(workspace: Workspace) -> dict[str, int]:
    """Items of the store that hold students, and when they were written."""
    folder = workspace.store.root / REPAIRED
    return (
        {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} if folder.is_dir() else {}
    )


def test_a_student_per_budget_with_what_was_predicted_and_measured(distilled):
    assert run(distilled) == ["half", "small"]
    teacher, _ = load_teacher(distilled.artifacts("teacher"))
    image = torch.zeros(1, 1, 8, 8)
    for name, figure, limit in (
        ("small", "parameters", 0.4 * num_parameters(teacher)),
        ("half", "macs", 0.5 * count_macs(teacher, image)),
    ):
        folder = distilled.artifacts("stitch") / name
        record = stitch.read_stitched(distilled, name)
        student, card = load_model(folder)
        assert record.limits == {figure: limit}
        assert getattr(record.predicted, figure) <= limit
        measured = record.measured
        assert measured.parameters == record.predicted.parameters == num_parameters(student)
        assert measured.macs == record.predicted.macs == count_macs(student, image)
        assert measured.bytes == (folder / "model.safetensors").stat().st_size
        assert 0 <= record.predicted.bytes - measured.bytes < 600  # a part of the header
        assert measured.latency_ms is None
        assert record.predicted.latency_ms is None
        assert record.teacher.parameters == num_parameters(teacher)
        replaced = {c.block: c.config for c in record.choices if c.candidate is not None}
        assert card.replacements == replaced != {}
        kls = {(d.result.block, d.result.candidate): d.damage.kl for d in read_distilled(distilled)}
        chosen = [(c.block, c.candidate) for c in record.choices if c.candidate is not None]
        assert record.predicted_damage == pytest.approx(sum(kls[each] for each in chosen))
        assert (folder / "repair.jsonl").read_text() == ""


def test_accuracies_and_damage_are_those_of_the_steps(distilled):
    run(distilled, recalibrate_batches=0)
    record = stitch.read_stitched(distilled, "small")
    student, card = load_model(distilled.artifacts("stitch") / "small")
    teacher, _ = load_teacher(distilled.artifacts("teacher"))
    prepared = stitch.read_teacher(distilled)[2]
    val = Stream(prepared.split("val"), seed=0, augment=card.augment)
    expected, found = (predict(model, val, batch_size=256) for model in (teacher, student))
    assert record.teacher_val_accuracy == expected.accuracy
    assert record.stitched_val_accuracy == found.accuracy
    assert record.recalibrated_val_accuracy == record.repaired_val_accuracy == found.accuracy
    kl = damage_kl(expected.logits_nk[:40], found.logits_nk[:40])
    assert record.damage == pytest.approx(float(kl), rel=1e-4)
    run(distilled, recalibrate_batches=2)
    again = stitch.read_stitched(distilled, "small")
    assert again.stitched_val_accuracy == record.stitched_val_accuracy
    assert again.damage == record.damage
    recalibrated, _ = load_model(distilled.artifacts("stitch") / "small")
    assert again.recalibrated_val_accuracy == predict(recalibrated, val, batch_size=256).accuracy


def test_a_repaired_student_is_closer_to_the_teacher(distilled):
    run(distilled, repair={"method": "joint", "epochs": 8, "lr": 0.001})
    record = stitch.read_stitched(distilled, "small")
    assert record.repair_s > 0
    history = (distilled.artifacts("stitch") / "small" / "repair.jsonl").read_text()
    kls = [json.loads(line)["kl"] for line in history.splitlines()]
    assert len(kls) == 9
    assert min(kls) < 0.9 * kls[0]


def test_the_teachers_own_bytes_are_predicted_exactly(distilled):
    run(distilled, students={"same": {"max_parameters": "100%"}})
    record = stitch.read_stitched(distilled, "same")
    assert record.predicted == record.measured == record.teacher
    assert record.damage == 0
    assert record.stitched_val_accuracy == record.repaired_val_accuracy


def test_new_budgets_train_nothing_that_exists(distilled):
    run(distilled)
    before = made(distilled)
    shutil.rmtree(distilled.store.root / "trainees")  # nothing of the block phase is looked for
    smaller = {"small": {"max_parameters": 0.4}, "other": {"max_bytes": 0.7}}
    assert run(distilled, students=smaller) == ["other", "small"]
    after = made(distilled)
    assert before.items() <= after.items()
    assert len(after) <= len(before) + 1


def test_equal_choices_share_an_item_but_each_student_has_its_own_limits(distilled):
    context = changed(
        distilled, students={"one": {"max_parameters": 0.4}, "two": {"max_parameters": 0.4001}}
    )
    (job,) = stitch.start(context)
    assert [student.name for student in job.students] == ["one", "two"]
    stitch.run_repair(job)
    stitch.finish(context, [job])
    one, two = (stitch.read_stitched(distilled, name) for name in ("one", "two"))
    assert one.limits != two.limits
    assert one.model_copy(update={"limits": two.limits}) == two
    assert len(made(distilled)) == 1
    (item,) = (distilled.store.root / REPAIRED).iterdir()
    assert not (item / stitch.STITCH).exists()


def test_the_key_knows_neither_name_nor_budget_but_what_changes_the_model(distilled):
    def key(**values: object) -> str:
        context = changed(distilled, students={"a": {"max_parameters": 0.4}}, **values)
        (job,) = stitch.start(context)
        return job.key

    first = key()
    context = changed(distilled, students={"b": {"max_parameters": 0.4001}}, max_damage=99)
    (job,) = stitch.start(context)
    assert job.key == first
    assert key(recalibrate_batches=1) != first
    assert key(recalibrate_batches=2, repair={"method": "joint"}) != first


def test_no_limit_of_damage_is_null_in_the_file(distilled):
    run(distilled, students={"a": {"max_parameters": 0.4}}, max_damage=math.inf)
    file = distilled.artifacts("stitch") / "a" / stitch.STITCH
    assert '"max_damage": null' in file.read_text()
    assert stitch.read_stitched(distilled, "a").max_damage == math.inf


def test_the_old_output_is_imported_where_the_store_is_new(distilled):
    run(distilled)
    weights = file_digest(distilled.artifacts("stitch") / "small" / "model.safetensors")
    shutil.rmtree(distilled.state)
    context = changed(distilled, students={"renamed": {"max_parameters": 0.4}})
    (job,) = stitch.start(context)
    assert distilled.store.has(REPAIRED, job.key)
    assert run(distilled) == ["renamed"]
    folder = distilled.artifacts("stitch") / "renamed"
    assert file_digest(folder / "model.safetensors") == weights
    assert set(read_json(folder / stitch.STITCH)["limits"]) == {"parameters"}


def test_jobs_and_contexts_pickle_and_a_damaged_item_is_told(distilled):
    context = pickle.loads(pickle.dumps(changed(distilled)))
    jobs = pickle.loads(pickle.dumps(stitch.start(context)))
    for job in jobs:
        stitch.run_repair(job)
        assert job.heartbeat.is_file()
    with (distilled.store.path(REPAIRED, jobs[0].key) / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    with pytest.raises(ArtifactError, match="is damaged and was removed"):
        stitch.finish(context, jobs)
    assert not distilled.artifacts("stitch").exists()


def test_an_impossible_budget_is_told_before_any_training(distilled):
    context = changed(distilled, students={"ok": {"max_macs": 0.5}, "tiny": {"max_parameters": 9}})
    with pytest.raises(BudgetError, match=r"student tiny: .* the smallest reachable is"):
        stitch.start(context)
    with pytest.raises(BudgetError, match=r"student tiny: .* the smallest reachable is"):
        check_budgets(context)
    assert made(distilled) == {}
    shutil.rmtree(distilled.artifacts("distill"))
    check_budgets(changed(distilled, students={"ok": {"max_macs": 0.5}}))


def test_a_sweep_makes_its_students(distilled):
    names = run(distilled, students={}, sweep={"points": 4, "along": "macs"})
    assert names[0] == "sweep-1"
    macs = [stitch.read_stitched(distilled, name).measured.macs for name in names]
    assert macs == sorted(set(macs))


# ---------------------------------------------------------------- latency


def test_latency_is_measured_once_and_stands_beside_the_teachers(distilled):
    students = {"fast": {"max_latency": "1000%", "max_macs": 0.6}, "plain": {"max_macs": 0.5}}
    run(distilled, students=students)
    fast, plain = (stitch.read_stitched(distilled, name) for name in ("fast", "plain"))
    kept = sorted((distilled.state / "latency").rglob("*.json"))
    assert len(kept) == 2  # the table, and the whole students
    assert fast.measured.latency_ms > 0
    assert fast.teacher.latency_ms > 0
    assert fast.predicted.latency_ms <= fast.limits["latency"]
    assert plain.measured.latency_ms is None
    times = [path.stat().st_mtime_ns for path in kept]
    run(distilled, students=students)
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert stitch.read_stitched(distilled, "fast") == fast
    forget_latencies(distilled)
    assert not kept[0].exists()
    run(distilled, students=students)
    assert stitch.read_stitched(distilled, "fast").teacher != fast.teacher


def test_without_a_limit_on_latency_nothing_is_measured(distilled):
    run(distilled)
    assert not (distilled.state / "latency").exists()


def test_the_table_adds_up_to_the_teacher(distilled):
    stitch.start(changed(distilled, students={"fast": {"max_latency": "1000%", "max_macs": 0.6}}))
    tables = [read_json(path) for path in (distilled.state / "latency").rglob("*.json")]
    (table,) = [each for each in tables if isinstance(each, dict)]
    own = sum(names[""] for names in table["blocks"].values())
    assert table["rest_ms"] + own == pytest.approx(table["teacher_ms"])
    assert all(len(names) == 3 for names in table["blocks"].values())
    assert all(ms > 0 for names in table["blocks"].values() for ms in names.values())


def test_what_a_file_manager_leaves_is_no_student(distilled):
    run(distilled)
    (distilled.artifacts("stitch") / ".DS_Store").touch()
    assert run(distilled) == ["half", "small"]
