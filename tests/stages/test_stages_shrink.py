"""The stage `shrink`: recipes per student, steps done once, files as they are said to be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import pbkd
from pbkd.artifacts import Workspace
from pbkd.errors import ConfigError
from pbkd.report import read_measured, read_metrics, shrink_table
from pbkd.shrink import SHRUNK, read_record, structures
from pbkd.stages import StageContext, run_stage
from pbkd.students import load_model

TUNE = "tune: {epochs: 1, batch_size: 64}"
RECIPE = (
    f"[{{method: prune, sparsity: 0.5, {TUNE}}}, {{method: quantize, bits: 4, {TUNE}}}, "
    "{method: code}]"
)


def with_recipe(workspace: Workspace, text: str) -> StageContext:
    path = workspace.params
    lines = [line for line in path.read_text().splitlines() if not line.startswith("shrink:")]
    path.write_text("\n".join([*lines, f"shrink: {text}"]) + "\n")
    return StageContext.load(workspace)


def only_student(workspace: Workspace):
    return next(workspace.artifacts("shrink").iterdir())


@pytest.fixture(scope="module")
def _coded(_finished, tmp_path_factory):
    root = tmp_path_factory.mktemp("coded") / "workspace"
    shutil.copytree(_finished, root)
    workspace = Workspace(root, root / ".pbkd")
    run_stage("shrink", with_recipe(workspace, f"{{recipe: {RECIPE}}}"))
    return workspace


@pytest.fixture
def coded(_coded, tmp_path) -> Workspace:
    root = tmp_path / "workspace"
    shutil.copytree(_coded.root, root)
    return Workspace(root, root / ".pbkd")


def test_the_file_is_as_large_as_the_record_says_and_decodes_to_the_student(coded):
    folder = only_student(coded)
    steps = read_record(folder).steps
    assert [step.method for step in steps] == ["start", "prune", "quantize", "code"]
    assert steps[-1].file_bytes == (folder / "model.pbkd").stat().st_size
    assert steps[-1].file_bytes < steps[0].file_bytes / 4
    model, card = load_model(folder)
    loaded = pbkd.load(folder / "model.pbkd")
    images = torch.rand(4, 1, *card.image_size)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.class_names == card.class_names


def test_what_is_pruned_stays_0_to_the_end(coded):
    steps = read_record(only_student(coded)).steps
    model, _ = load_model(only_student(coded))
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert zeros / weights >= 0.5 - 1e-3
    assert steps[2].num_nonzero <= steps[1].num_nonzero
    assert steps[1].num_parameters == steps[0].num_parameters


def test_a_rerun_takes_no_step_again(coded, monkeypatch):
    from pbkd.shrink import prune, quantize

    def never(*_):
        raise AssertionError("a finished step was taken again")

    before = json.loads((only_student(coded) / "shrink.json").read_text())
    shutil.rmtree(coded.artifacts("shrink"))
    for module in (prune, quantize):
        monkeypatch.setattr(module, "apply", never)
    run_stage("shrink", StageContext.load(coded))
    assert json.loads((only_student(coded) / "shrink.json").read_text()) == before


def test_another_last_step_leaves_the_first_alone(coded, monkeypatch):
    from pbkd.shrink import prune

    monkeypatch.setattr(prune, "apply", lambda *_: pytest.fail("pruned again"))
    context = with_recipe(coded, f"{{recipe: {RECIPE.replace('bits: 4', 'bits: 6')}}}")
    before = read_record(only_student(coded)).steps
    run_stage("shrink", context)
    after = read_record(only_student(coded)).steps
    assert after[:2] == before[:2]
    assert "bits 6" in after[2].settings


def test_an_output_without_its_store_is_taken_over(coded, monkeypatch):
    shutil.rmtree(coded.store.root / SHRUNK)
    from pbkd.shrink import prune

    monkeypatch.setattr(prune, "apply", lambda *_: pytest.fail("pruned again"))
    run_stage("shrink", StageContext.load(coded))
    assert read_record(only_student(coded)).steps


def test_an_override_is_for_its_student_alone(finished):
    name = next(finished.artifacts("finetune").iterdir()).name
    context = with_recipe(finished, f"{{recipe: {RECIPE}, overrides: {{'{name[:2]}*': []}}}}")
    run_stage("shrink", context)
    folder = only_student(finished)
    assert read_record(folder).steps == ()
    assert not (folder / "model.pbkd").exists()
    source, _ = load_model(finished.artifacts("finetune") / name)
    model, _ = load_model(folder)
    for key, tensor in source.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


def test_metrics_count_the_bytes_of_the_coded_file(coded):
    run_stage("evaluate", StageContext.load(coded))
    metrics = json.loads((coded.results / "metrics.json").read_text())
    ((name, student),) = metrics["students"].items()
    assert student["file_bytes"] == (only_student(coded) / "model.pbkd").stat().st_size
    assert student["is_coded"] is True
    assert student["bytes_ratio"] == metrics["teacher"]["file_bytes"] / student["file_bytes"]
    assert [step["method"] for step in student["steps"]][-1] == "code"
    page = (coded.results / "report.html").read_text()
    assert "Shrinking, step by step" in page
    assert f"{student['file_bytes']:,}" in page
    assert name in page


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{recipe: [{method: code}, {method: prune, sparsity: 0.5}]}", "come last"),
        ("{recipe: [{method: code}, {method: code}]}", "stands twice"),
        ("{recipe: [{method: prune}]}", "sparsity"),
        ("{recipe: [{method: melt}]}", "melt"),
        ("{recipe: [{method: low_rank}]}", "one of `ratio` and `energy`"),
        ("{recipe: [{method: prune_channels, ratio: 0.5, max_macs: 0.5}]}", "one of `ratio`"),
        ("{recipe: [{method: prune_channels, max_macs: 5 bananas}]}", "limit of macs|limit such"),
    ],
)
def test_a_wrong_recipe_is_told_before_any_work(finished, recipe, message):
    with pytest.raises(ConfigError, match=message):
        with_recipe(finished, recipe)


def test_the_trainings_of_all_steps_lie_beside_the_record(coded):
    names = sorted(path.name for path in only_student(coded).glob("*.jsonl"))
    assert names == ["1-prune-ramp.jsonl", "2-quantize-tune.jsonl"]
    line = json.loads((only_student(coded) / names[1]).read_text().splitlines()[-1])
    assert line["val_accuracy"] > 0.5
    assert not list((coded.state / "checkpoints" / "shrink").glob("*"))


def fewest(entries):
    return min(entries, key=lambda entry: (entry.batch_size, entry.threads))


def test_every_structure_on_the_way_has_its_latency(coded):
    """Steps that leave the structure as it is share the time of the one that has been measured."""
    recipe = (
        "[{method: prune, sparsity: 0.3, tune: {epochs: 0}}, "
        "{method: prune_channels, ratio: 0.5, tune: {epochs: 0}}, "
        "{method: quantize, bits: 8, tune: {epochs: 0}}, {method: code}]"
    )
    context = with_recipe(coded, f"{{recipe: {recipe}}}")
    run_stage("shrink", context)
    folder = only_student(coded)
    found = structures(folder)
    assert sorted(found) == [1]  # after `prune`, before the channels went
    before, _ = load_model(found[1])
    after, _ = load_model(folder)
    steps = read_record(folder).steps
    assert sum(p.numel() for p in before.parameters()) == steps[1].num_parameters
    assert sum(p.numel() for p in after.parameters()) == steps[2].num_parameters
    assert steps[2].num_parameters < steps[1].num_parameters

    run_stage("evaluate", context)

    measured = read_measured(coded.results)
    name = folder.name
    own = measured.step_latency[name][1]
    assert {entry.batch_size for entry in own} == {1, 8}
    assert measured.latency_after(name, 0) == measured.latency_after(name, 1) == own
    for step in (2, 3, 4):
        assert measured.latency_after(name, step) == measured.latency[name]
    assert set(measured.latency) == {"teacher", name}
    table = shrink_table(read_metrics(coded.results), measured)
    times = [row[table.heads.index("ms, PyTorch")] for row in table.rows]
    assert times[0] == times[1] == f"{fewest(own).median_ms:.2f}"
    assert times[2] == times[4] == f"{fewest(measured.latency[name]).median_ms:.2f}"
    assert {row[table.heads.index("ms, onnxruntime")] for row in table.rows} == {"not measured"}
