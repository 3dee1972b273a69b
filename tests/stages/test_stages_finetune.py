"""Stage `finetune`: jobs, the store, and baselines with the seconds of their students."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pbkd.artifacts import Workspace, load_tensors, read_json
from pbkd.models import read_card, save_model
from pbkd.stages import StageContext, finetune
from pbkd.stages.device_time import block_phase_s, covered_s, student_device_s
from pbkd.students import load_model
from pbkd.students.finetune import Finetuned

KINDS = ("scratch", "distill")


def context(workspace: Workspace, baselines: tuple[str, ...] = ()) -> StageContext:
    text = workspace.params.read_text()
    if baselines:
        text = text.replace("finetune: {", f"finetune: {{baselines: [{', '.join(baselines)}], ")
    workspace.params.write_text(text)
    return StageContext.load(workspace)


def students(workspace: Workspace) -> list[Path]:
    return sorted(workspace.artifacts("finetune").iterdir())


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def trained(workspace: Workspace) -> list[str]:
    """What was trained since the last call: the keys of histories that grew."""
    progress = workspace.state / "progress"
    found = [path for path in progress.glob("*.jsonl") if path.stem in _keys(workspace)]
    for path in found:
        path.unlink()
    return [path.stem for path in found]


def _keys(workspace: Workspace) -> set[str]:
    root = workspace.store.root
    folders = [*root.glob("finetuned/*"), *root.glob("baselines/*")]
    return {read_json(folder / "item.json")["key"] for folder in folders}


def test_the_output_says_how_it_ended(finished: Workspace) -> None:
    (folder,) = students(finished)
    record = read_json(folder / "finetune.json")
    assert record.keys() == set(Finetuned.model_fields)
    assert record["num_lacking"] == 0
    assert (record["epochs"], record["stopped"], record["restarts"]) == (1, "epochs", 0)
    (line,) = (folder / "history.jsonl").read_text().splitlines()
    assert json.loads(line)["epoch"] == 0
    assert not list((finished.state / "checkpoints" / "finetune").glob("*"))


def test_what_the_store_holds_is_not_trained_again(finished: Workspace) -> None:
    trained(finished)
    before = files(finished.artifacts("finetune"))
    finetune.run(context(finished))
    assert trained(finished) == []
    assert files(finished.artifacts("finetune")) == before


def test_what_the_output_holds_is_imported(finished: Workspace) -> None:
    finetune.run(context(finished, KINDS))
    trained(finished)
    before = files(finished.artifacts("finetune"))
    for kind in ("finetuned", "baselines"):
        shutil.rmtree(finished.store.root / kind)
    finetune.run(context(finished))
    assert trained(finished) == []
    assert files(finished.artifacts("finetune")) == before


def test_students_that_are_equal_are_trained_once(finished: Workspace) -> None:
    (source,) = finished.artifacts("stitch").iterdir()
    shutil.copytree(source, source.with_name("twin"))
    shutil.rmtree(finished.store.root / "finetuned")
    shutil.rmtree(finished.artifacts("finetune"))
    trained(finished)
    (job,) = finetune.start(context(finished))
    assert job.names == (source.name, "twin")
    finetune.run(context(finished))
    assert trained(finished) == [job.key]
    one, other = students(finished)
    assert files(one) == files(other)


@pytest.mark.parametrize("change", ["epochs: 2", "label_weight: 0.5, epochs: 1"])
def test_other_settings_train_again(finished: Workspace, change: str) -> None:
    trained(finished)
    text = finished.params.read_text().replace("finetune: {epochs: 1}", f"finetune: {{{change}}}")
    finished.params.write_text(text)
    finetune.run(context(finished))
    assert len(trained(finished)) == 1


def test_baselines_get_their_students_seconds(finished: Workspace) -> None:
    trained(finished)
    finetune.run(context(finished, KINDS))
    assert len(trained(finished)) == 2  # and not the student
    (folder,) = students(finished)
    finetune_s = read_json(folder / "finetune.json")["duration_s"]
    repair_s = read_json(finished.artifacts("stitch") / folder.name / "stitch.json")["repair_s"]
    device_s = block_phase_s(finished) + repair_s + finetune_s  # of one student
    assert student_device_s(finished, folder.name, finetune_s) == pytest.approx(device_s)
    assert device_s > finetune_s > 0
    weights = {"student": load_tensors(folder / "model.safetensors")}
    for kind in KINDS:
        baseline = read_json(folder / f"baseline-{kind}" / "baseline.json")
        assert baseline["kind"] == kind
        assert device_s <= baseline["device_s"] <= 1.1 * device_s
        assert baseline["duration_s"] > 0
        card = read_card(folder / f"baseline-{kind}")
        assert card.replacements == read_card(folder).replacements
        weights[kind] = load_tensors(folder / f"baseline-{kind}" / "model.safetensors")
    shapes = [{n: t.shape for n, t in tensors.items()} for tensors in weights.values()]
    assert shapes[0] == shapes[1] == shapes[2]
    for name, tensor in weights["student"].items():
        if tensor.dim() > 1 and tensor.numel() > 9:
            assert not any(torch.allclose(tensor, weights[kind][name], atol=1e-3) for kind in KINDS)


def test_the_union_of_spans() -> None:
    assert covered_s([]) == 0
    assert covered_s([(3.0, 5.0), (0.0, 1.0), (4.0, 7.0), (4.5, 4.6)]) == 5


def test_the_jobs_of_a_block_phase_count_by_their_own_seconds(finished: Workspace) -> None:
    alone = block_phase_s(finished)
    assert alone > 0
    results = read_json(finished.artifacts("distill") / "distill.json")
    first = results[0]["result"]
    name = f"{first['block']}/{first['candidate']}"
    spans = [(r["result"]["started_at"], r["result"]["finished_at"]) for r in results[1:]]
    job = {"job_id": "a", "worker": "w", "started_s": 0.0, "duration_s": 100.0, "energy_j": None}
    phase = {"num_workers": 1, "num_jobs": 2, "wall_s": 1.0, "jobs_s": 1.0, "speedup": 1.0}
    jobs = [{**job, "trained": [name]}, {**job, "trained": ["gone/separable"]}]
    (finished.state / "block_phase.json").write_text(
        json.dumps({**phase, "energy_j": None, "jobs": jobs})
    )
    assert block_phase_s(finished) == pytest.approx(100.0 + covered_s(spans))


CACHED = "finetune: {teachers: cached, views: 2, epochs: 3}"


def cached(workspace: Workspace, text: str = CACHED) -> StageContext:
    workspace.params.write_text(workspace.params.read_text().replace("finetune: {epochs: 1}", text))
    return StageContext.load(workspace)


def labels(workspace: Workspace) -> dict[str, int]:
    """Key of each item of labels to the time of its last change."""
    folders = (workspace.store.root / "labels").glob("*")
    return {folder.name: folder.stat().st_mtime_ns for folder in folders}


def test_kept_labels_are_made_once_and_read_by_all(finished: Workspace) -> None:
    (source,) = finished.artifacts("stitch").iterdir()
    other = source.with_name("other")
    shutil.copytree(source, other)
    model, card = load_model(other)
    with torch.no_grad():
        model.net.classifier.bias.add_(0.01)
    save_model(other, model, card)
    finetune.run(cached(finished))
    before = labels(finished)
    assert len(before) == 2  # views, for two students
    assert [len((f / "history.jsonl").read_text().splitlines()) for f in students(finished)] == [
        3,
        3,
    ]
    # other settings of the student, other students, more epochs: no view is labelled again
    text = finished.params.read_text()
    finished.params.write_text(text.replace("epochs: 3}", "epochs: 4, lr: 0.01}"))
    finetune.run(StageContext.load(finished))
    assert labels(finished) == before
    finished.params.write_text(text.replace("views: 2", "views: 3"))
    finetune.run(StageContext.load(finished))
    assert labels(finished).items() > before.items()
    assert len(labels(finished)) == 3


def test_where_students_are_there_nothing_is_labelled(finished: Workspace) -> None:
    finetune.run(cached(finished))
    shutil.rmtree(finished.store.root / "labels")
    finetune.run(StageContext.load(finished))
    assert labels(finished) == {}


def test_no_view_is_labelled_that_is_not_shown(finished: Workspace) -> None:
    finetune.run(cached(finished, "finetune: {teachers: cached, views: 8, epochs: 1}"))
    assert len(labels(finished)) == 1


def test_the_labelling_counts_as_the_students_time(finished: Workspace) -> None:
    finetune.run(cached(finished))
    (folder,) = students(finished)
    records = [read_json(path) for path in finished.store.root.glob("labels/*/labels.json")]
    labelling_s = sum(record["duration_s"] for record in records)
    assert read_json(folder / "finetune.json")["duration_s"] > labelling_s > 0


def test_settings_of_kept_labels_change_nothing_where_none_are_kept(finished: Workspace) -> None:
    trained(finished)
    text = finished.params.read_text()
    finished.params.write_text(text.replace("finetune: {", "finetune: {views: 3, top_labels: 2, "))
    finetune.run(StageContext.load(finished))
    assert trained(finished) == []
    assert labels(finished) == {}
