"""Stage `evaluate`: the records of a family, and latencies of many models."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from pbkd.artifacts import Workspace, read_json, write_json
from pbkd.config import EvaluateConfig
from pbkd.data import load_prepared
from pbkd.errors import ArtifactError, ExportError
from pbkd.measure import usable_cores
from pbkd.report import METRICS, REPORT, Metrics, read_measured, read_metrics
from pbkd.stages import StageContext, run_stage
from pbkd.stages.evaluate import FinishedStudent, model_folders
from pbkd.stages.runtimes import FEW_PASSES, latencies, measure_runtimes
from pbkd.stages.stitch import Stitched
from pbkd.students import load_model
from tests.report.html_page import Page


@pytest.fixture
def student(finished: Workspace) -> str:
    (name,) = read_metrics(finished.results).students
    return name


def add_baseline(workspace: Workspace, student: str, kind: str, device_s: float = 12.5) -> Path:
    """A baseline with the student's own weights, as `finetune` writes it."""
    folder = workspace.artifacts("finetune") / student
    baseline = folder / f"baseline-{kind}"
    baseline.mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(folder / name, baseline / name)
    record = {"kind": kind, "val_accuracy": 0.5, "epochs": 3}
    write_json(baseline / "baseline.json", record | {"device_s": device_s, "duration_s": 11.5})
    return baseline


def evaluated(workspace: Workspace) -> Metrics:
    run_stage("evaluate", StageContext.load(workspace))
    return read_metrics(workspace.results)


# ---------------------------------------------------------------- records


def test_equal_inputs_give_the_same_metrics_byte_for_byte(finished):
    before = (finished.results / METRICS).read_bytes()
    shutil.rmtree(finished.results)
    evaluated(finished)
    assert (finished.results / METRICS).read_bytes() == before


def test_a_students_figures_are_those_of_the_stages_before(finished, student):
    metrics, measured = read_metrics(finished.results), read_measured(finished.results)
    stitched = Stitched.model_validate(
        read_json(finished.artifacts("stitch") / student / "stitch.json")
    )
    own = metrics.students[student]
    assert own.stitched_val_accuracy == stitched.stitched_val_accuracy
    assert own.recalibrated_val_accuracy == stitched.recalibrated_val_accuracy
    assert own.repaired_val_accuracy == stitched.repaired_val_accuracy
    assert own.limits == stitched.limits
    assert own.predicted == stitched.predicted.model_dump()
    assert own.stitched["parameters"] == own.num_parameters == stitched.predicted.parameters
    assert own.stitched["macs"] == own.macs == stitched.predicted.macs
    assert own.stitched_damage == stitched.damage
    seconds = read_json(finished.artifacts("finetune") / student / "finetune.json")["duration_s"]
    assert measured.device_s[student] > stitched.repair_s + seconds
    assert measured.stitched_latency_ms == {}


def test_what_a_clock_says_is_not_in_the_metrics(finished, student):
    path = finished.artifacts("stitch") / student / "stitch.json"
    record = read_json(path)
    before = read_metrics(finished.results).students[student]
    measured = record["measured"] | {"latency_ms": 2.5}
    write_json(path, record | {"measured": measured, "repair_s": 999.0})
    assert evaluated(finished).students[student] == before
    assert read_measured(finished.results).stitched_latency_ms == {student: 2.5}
    assert read_measured(finished.results).device_s[student] > 999


def test_baselines_are_evaluated_beside_their_student(finished, student):
    for kind in ("distill", "scratch"):
        add_baseline(finished, student, kind)
    metrics, measured = evaluated(finished), read_measured(finished.results)
    own = metrics.students[student]
    assert list(metrics.baselines[student]) == ["scratch", "distill"]
    for figures in metrics.baselines[student].values():
        assert figures.test_accuracy == own.test_accuracy  # it has the same weights
        assert (figures.macs, figures.file_bytes) == (own.macs, own.file_bytes)
    seconds = measured.baselines[student]["scratch"]
    assert (seconds.given_s, seconds.used_s) == (12.5, 11.5)
    assert measured.device_s == {student: 12.5}
    assert set(measured.latency) == {"teacher", student}
    page = Page((finished.results / REPORT).read_text())
    assert any("reach the same test accuracy, for the same seconds" in line for line in page.text)


def test_a_student_without_its_record_is_an_error(finished, student):
    (finished.artifacts("finetune") / student / "finetune.json").unlink()
    with pytest.raises(ArtifactError, match=r"finetune\.json is missing"):
        FinishedStudent.read(finished, student)


# ---------------------------------------------------------------- latency


def loaded(workspace: Workspace, student: str, names: list[str]):
    folders = model_folders(workspace)
    models = {"teacher": load_model(folders["teacher"])}
    return models | {name: load_model(folders[student]) for name in names}


def test_equal_models_are_measured_once_and_every_model_often_enough(finished, student):
    models = loaded(finished, student, ["one", "two"])
    config = EvaluateConfig(
        latency_batch_sizes=(1, 4), latency_threads=(1, 3), latency_seconds=0.02
    )
    figures = latencies(config, models)
    assert list(figures) == ["teacher", "one", "two"]
    assert figures["one"] == figures["two"] != figures["teacher"]
    for entries in figures.values():
        settings = [(entry.batch_size, entry.threads) for entry in entries]
        assert settings == [(1, 1), (1, 3), (4, 1), (4, 3)]
        assert all(entry.repeats >= 20 for entry in entries)


def test_a_median_of_few_passes_is_told(finished, student, caplog):
    models = loaded(finished, student, ["one"])
    config = EvaluateConfig(latency_batch_sizes=(512,), latency_max_seconds=1e-4)
    with caplog.at_level(logging.WARNING):
        figures = latencies(config, models)
    fewest = min(entries[0].repeats for entries in figures.values())
    assert fewest >= 1
    assert (fewest < FEW_PASSES) == ("latency_max_seconds" in caplog.text)


def test_equal_numbers_of_threads_are_measured_once(finished, student):
    models = loaded(finished, student, ["one"])
    config = EvaluateConfig(
        latency_batch_sizes=(1,), latency_threads=(usable_cores(), None), latency_seconds=0.02
    )
    for entries in latencies(config, models).values():
        assert [entry.threads for entry in entries] == [usable_cores()]


# ---------------------------------------------------------------- other runtimes


RUNTIMES = {"latency_batch_sizes": (1,), "latency_threads": (1,), "latency_seconds": 0.02}


def test_models_are_exported_compared_and_measured_in_every_runtime(finished, student):
    models = loaded(finished, student, ["one", "two"])
    prepared = load_prepared(finished.prepared)
    config = EvaluateConfig(
        **RUNTIMES, runtimes=("pytorch", "onnxruntime", "onnxruntime-int8"), calibration_images=64
    )
    found = measure_runtimes(config, models, prepared)
    assert found.exports["one"] == found.exports["two"] != found.exports["teacher"]
    metrics = read_metrics(finished.results)
    for name in models:
        assert [entry.runtime for entry in found.latency[name]] == list(config.runtimes)
        plain, small = found.exports[name]["onnxruntime"], found.exports[name]["onnxruntime-int8"]
        assert plain.max_difference <= 1e-4 * plain.max_logit
        assert plain.same_predictions == 1
        assert plain.val_accuracy is None
        assert small.file_bytes < plain.file_bytes
        own = metrics.teacher if name == "teacher" else metrics.students[student]
        assert abs(small.val_accuracy - own.val_accuracy) < 0.05
        assert abs(small.test_accuracy - own.test_accuracy) < 0.05


def test_a_model_that_cannot_be_exported_has_no_figures_there(
    finished, student, monkeypatch, caplog
):
    def refuse(*_: object) -> None:
        raise ExportError("it is too wild")

    monkeypatch.setattr("pbkd.stages.runtimes.to_onnx", refuse)
    models = loaded(finished, student, [])
    found = measure_runtimes(EvaluateConfig(**RUNTIMES), models, load_prepared(finished.prepared))
    assert found.exports == {}
    assert [entry.runtime for entry in found.latency["teacher"]] == ["pytorch"]
    assert "teacher: not measured in onnxruntime: it is too wild" in caplog.text


def test_without_onnxruntime_pytorch_is_measured_alone(finished, student, monkeypatch, caplog):
    monkeypatch.setattr("pbkd.stages.runtimes.onnx_is_installed", lambda: False)
    models = loaded(finished, student, [])
    with caplog.at_level(logging.INFO):
        found = measure_runtimes(
            EvaluateConfig(**RUNTIMES), models, load_prepared(finished.prepared)
        )
    assert found.exports == {}
    assert [entry.runtime for entry in found.latency["teacher"]] == ["pytorch"]
    assert "pip install 'pbkd[export]'" in caplog.text


def test_the_stage_writes_runtimes_to_measured_and_to_the_page(finished, student):
    text = finished.params.read_text()
    assert "runtimes: [pytorch]" in text
    finished.params.write_text(
        text.replace("[pytorch]", "[pytorch, onnxruntime]").replace("[1, 8]", "[1]")
    )
    evaluated(finished)
    measured = read_measured(finished.results)
    assert set(measured.exports) == {"teacher", student}
    assert {entry.runtime for entry in measured.latency[student]} == {"pytorch", "onnxruntime"}
    (headline,) = measured.headline[student]
    own = [entry for entry in measured.latency[student] if entry.runtime == "pytorch"]
    assert {entry.threads for entry in own} == {1, usable_cores()}
    assert headline == min(own, key=lambda entry: entry.median_ms)
    assert measured.machine.onnxruntime
    page = Page((finished.results / REPORT).read_text())
    assert any("Latency by runtime" in line for line in page.text)
