"""The MLflow record of a pipeline run, in a real store."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from pbkd.artifacts import Workspace, digest_of, read_json, write_json
from pbkd.config import Params
from pbkd.errors import TrackingError
from pbkd.tracking import PipelineRun
from pbkd.tracking.mlflow_run import mlflow_client, tracking_uri


@pytest.fixture
def workspace(new_store: Path, tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path, tmp_path / ".pbkd")
    workspace.state.mkdir()
    shutil.copy(new_store, workspace.state / "mlflow.db")
    return workspace


PARAMS = Params.model_validate({"distill": {"lr": 0.125}, "register": {"name": "tiny"}})


def begin(workspace: Workspace) -> PipelineRun:
    return PipelineRun.current(workspace, PARAMS)


def runs_of(run: PipelineRun):
    return run.client.search_runs([run.experiment_id])


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path, tmp_path / ".pbkd")

    def upgrade(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("alembic.command.upgrade", upgrade)
        with pytest.raises(KeyboardInterrupt):
            mlflow_client(workspace)
    assert list(workspace.state.iterdir()) == []
    assert mlflow_client(workspace).search_runs(["0"]) == []
    assert [path.name for path in workspace.state.iterdir()] == ["mlflow.db"]


def test_a_database_that_a_kill_left_half_made_is_told(tmp_path):
    workspace = Workspace(tmp_path, tmp_path / ".pbkd")
    workspace.state.mkdir()
    with closing(sqlite3.connect(workspace.state / "mlflow.db")) as database:
        database.execute("create table _alembic_tmp_experiment_tags (key text)")
    with pytest.raises(TrackingError, match=r"already exists; if a kill met its making, delete it"):
        mlflow_client(workspace)


@pytest.mark.parametrize("name", ["50%20x", "q?1"])
def test_a_path_that_mlflow_would_misread_is_refused_at_once(tmp_path, name):
    root = tmp_path / name
    with pytest.raises(TrackingError, match=r"misreads `(%20|\?)`; move the workspace"):
        begin(Workspace(root, root / ".pbkd"))
    assert list((root / ".pbkd").iterdir()) == []
    assert list(tmp_path.iterdir()) == [root]


def test_artifacts_of_a_database_elsewhere_are_not_kept_where_nobody_finds_them(
    tmp_path, new_store, monkeypatch
):
    database = shutil.copy(new_store, tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    root = tmp_path / "50%20x"
    with pytest.raises(TrackingError, match=r"mlartifacts: it misreads `%20`"):
        begin(Workspace(root, root / ".pbkd"))


@pytest.mark.parametrize("name", ["a b", "ü", "x#y", "a&b", "a;b", "100% y"])
def test_other_paths_of_workspaces_are_taken(new_store, tmp_path, name):
    workspace = Workspace(tmp_path / name, tmp_path / name / ".pbkd")
    workspace.state.mkdir(parents=True)
    shutil.copy(new_store, workspace.state / "mlflow.db")
    run = begin(workspace)
    run.log_text("kept", "a.txt")
    assert Path(run.client.download_artifacts(run.run_id, "a.txt")).read_text() == "kept"
    assert len(list(workspace.state.glob("mlartifacts/*/artifacts/a.txt"))) == 1


def test_a_driver_has_one_run_however_often_it_asks(workspace):
    first, second = begin(workspace), begin(workspace)
    assert first.run_id == second.run_id
    assert len(runs_of(first)) == 1
    assert first.client.get_run(first.run_id).info.status == "RUNNING"


def test_a_run_holds_every_parameter_by_its_name_in_the_file(workspace):
    run = begin(workspace)
    params = run.client.get_run(run.run_id).data.params
    assert params["seed"] == "0"
    assert params["distill.lr"] == "0.125"
    assert params["register.name"] == "tiny"
    assert params["teacher.augment.pad"] == "0"


def test_globs_of_overrides_are_in_the_value_of_one_parameter(workspace):
    blocks = {"layer3.*": [{"kind": "identity"}], "layer3[01].conv?": [{"kind": "separable"}]}
    shrink = {"plain-*": [{"method": "prune", "sparsity": 0.5}]}
    stitch = {"students": {"plain-half": {"max_macs": 0.5}}}
    given = {"blocks": {"overrides": blocks}, "stitch": stitch, "shrink": {"overrides": shrink}}
    run = PipelineRun.current(workspace, Params.model_validate(given))
    params = run.client.get_run(run.run_id).data.params
    logged = json.loads(params["blocks.overrides"])
    assert list(logged) == list(blocks)
    assert [candidate["kind"] for (candidate,) in logged.values()] == ["identity", "separable"]
    (step,) = json.loads(params["shrink.overrides"])["plain-*"]
    assert (step["method"], step["sparsity"]) == ("prune", 0.5)


def test_many_students_are_one_parameter_with_the_limits_that_are_set(workspace):
    students = {f"s{number}": {"max_macs": number / 10} for number in range(1, 10)}
    run = PipelineRun.current(workspace, Params.model_validate({"stitch": {"students": students}}))
    params = run.client.get_run(run.run_id).data.params
    assert json.loads(params["stitch.students"]) == students


def test_parameters_that_mlflow_refuses_leave_no_open_run(workspace, monkeypatch):
    from mlflow import MlflowClient, MlflowException

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("no")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", refuse)
        with pytest.raises(TrackingError, match=r"MLflow takes no parameters of run \w+: no"):
            begin(workspace)
    assert sorted(r.info.status for r in runs_of(begin(workspace))) == ["FAILED", "RUNNING"]


def test_a_run_whose_file_cannot_be_written_is_not_left_open(workspace):
    path = workspace.state / "pipeline_run.json"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        begin(workspace)
    path.rmdir()
    assert sorted(r.info.status for r in runs_of(begin(workspace))) == ["FAILED", "RUNNING"]


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_that_ended_is_not_taken_up_again(workspace, failed):
    run = begin(workspace)
    run.end(failed=failed)
    assert begin(workspace).run_id != run.run_id
    status = run.client.get_run(run.run_id).info.status
    assert status == ("FAILED" if failed else "FINISHED")


def test_an_open_run_of_another_driver_is_ended_as_killed(workspace):
    abandoned = begin(workspace)
    path = workspace.state / "pipeline_run.json"
    write_json(path, read_json(path) | {"driver": "1-0"})
    run = begin(workspace)
    assert run.run_id != abandoned.run_id
    assert run.client.get_run(abandoned.run_id).info.status == "KILLED"
    assert run.client.get_run(run.run_id).info.status == "RUNNING"


def test_an_ended_run_of_another_driver_keeps_its_status(workspace):
    ended = begin(workspace)
    ended.end()
    path = workspace.state / "pipeline_run.json"
    write_json(path, read_json(path) | {"driver": "1-0"})
    run = begin(workspace)
    assert run.client.get_run(ended.run_id).info.status == "FINISHED"


def test_another_process_is_another_driver(workspace):
    run = begin(workspace)
    code = (
        "import sys; from pathlib import Path; from pbkd.artifacts import Workspace\n"
        "from pbkd.config import Params; from pbkd.tracking import PipelineRun\n"
        "root = Path(sys.argv[1]); print(PipelineRun.current(\n"
        "    Workspace(root, root / '.pbkd'), Params()).run_id)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(workspace.root)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() != run.run_id
    assert run.client.get_run(run.run_id).info.status == "KILLED"


def test_a_store_that_was_deleted_gets_a_new_run(workspace, new_store):
    run = begin(workspace)
    other = Workspace(workspace.root, workspace.root / "other")
    other.state.mkdir()
    shutil.copy(new_store, other.state / "mlflow.db")
    known = read_json(workspace.state / "pipeline_run.json")
    uri = f"sqlite:///{other.state / 'mlflow.db'}"
    write_json(other.state / "pipeline_run.json", known | {"store": digest_of(uri)})
    assert begin(other).run_id != run.run_id


def test_workspaces_of_one_process_keep_their_own_stores(workspace, new_store, tmp_path):
    other = Workspace(tmp_path / "b", tmp_path / "b" / ".pbkd")
    other.state.mkdir(parents=True)
    shutil.copy(new_store, other.state / "mlflow.db")
    first, second = begin(workspace), begin(other)
    assert [run.info.run_id for run in runs_of(second)] == [second.run_id]
    assert [run.info.run_id for run in runs_of(first)] == [first.run_id]
    assert tracking_uri(other) == f"sqlite:///{other.state / 'mlflow.db'}"


def test_series_are_logged_once(workspace):
    run = begin(workspace)
    history = [{"epoch": epoch, "loss": 1.0 / (epoch + 1)} for epoch in range(3)]
    for _ in range(2):
        begin(workspace).log_history("teacher/training", history)
    points = run.client.get_metric_history(run.run_id, "teacher/training/loss")
    assert [(point.step, point.value) for point in points] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]


def test_logged_series_are_kept_apart_by_their_whole_names(workspace):
    run = begin(workspace)
    names = ("finetune/a", "finetune/b", "shrink/a/1-prune", "shrink/b/1-prune")
    for name in names:
        run.log_history(name, [{"epoch": 0, "loss": 1.0}])
    data = run.client.get_run(run.run_id).data
    assert set(data.metrics) == {f"{name}/loss" for name in names}
    assert data.tags["pbkd.series.shrink"] == "a/1-prune, b/1-prune"


def test_a_data_set_is_logged_once(workspace):
    run = begin(workspace)
    for _ in range(2):
        run.log_data("d" * 32)
    assert len(run.client.get_run(run.run_id).inputs.dataset_inputs) == 1


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "SystemMetricsMonitor"]


def test_the_parent_run_has_system_metrics_until_it_ends(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    run = begin(workspace)
    child = run.model_run("half")
    (thread,) = threads()
    name = "system/system_memory_usage_percentage"
    until = time.monotonic() + 60
    while name not in run.client.get_run(run.run_id).data.metrics:
        assert time.monotonic() < until
        time.sleep(0.05)
    begin(workspace)
    assert threads() == [thread]
    run.end()
    thread.join(60)
    assert not threads()
    assert not run.client.get_run(child).data.metrics


def test_system_metrics_can_be_switched_off(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    begin(workspace)
    assert not threads()


def test_what_was_not_measured_is_left_out(workspace):
    run = begin(workspace)
    run.log_metrics({"a": 1.5, "b": None, "c": 0.0})
    assert run.client.get_run(run.run_id).data.metrics == {"a": 1.5, "c": 0.0}


def test_more_points_than_mlflow_takes_at_once(workspace):
    run = begin(workspace)
    run.log_history("s", [{"epoch": epoch, "x": float(epoch)} for epoch in range(1001)])
    assert len(run.client.get_metric_history(run.run_id, "s/x")) == 1001


def test_a_block_has_one_child_run_with_a_series_per_candidate(workspace):
    run = begin(workspace)
    for epoch in (-1, 0):
        block = run.block_run("layer1.0")  # found again
        block.log_loss("separable", epoch, {"train_loss": None, "val_loss": 0.5 + epoch})
    run.block_run("layer2.0")
    block.end({"separable/damage_kl": 0.25, "separable/best_val_loss": None})

    children = {r.data.tags["pbkd.block"]: r for r in runs_of(run) if r.info.run_id != run.run_id}
    assert set(children) == {"layer1.0", "layer2.0"}
    child = children["layer1.0"]
    assert child.data.tags["mlflow.parentRunId"] == run.run_id
    assert child.info.run_name == "layer1.0"
    assert child.info.status == "FINISHED"
    assert child.data.metrics == {"separable/val_loss": 0.5, "separable/damage_kl": 0.25}
    points = run.client.get_metric_history(child.info.run_id, "separable/val_loss")
    assert [(point.step, point.value) for point in points] == [(0, -0.5), (1, 0.5)]


def test_a_block_that_failed_shows_as_failed(workspace):
    run = begin(workspace)
    run.block_run("layer1.0").end({}, failed=True)
    (child,) = (r for r in runs_of(run) if r.info.run_id != run.run_id)
    assert child.info.status == "FAILED"


def test_a_deleted_experiment_is_told_with_what_restores_it(workspace):
    run = begin(workspace)
    run.end()
    run.client.delete_experiment(run.experiment_id)
    with pytest.raises(TrackingError, match=f"restore --experiment-id {run.experiment_id}`"):
        begin(workspace)
    run.client.restore_experiment(run.experiment_id)
    assert begin(workspace).run_id != run.run_id


def test_an_experiment_that_another_workspace_just_made_is_taken(workspace, monkeypatch):
    client = mlflow_client(workspace)
    create = type(client).create_experiment

    def slow(*args: object, **options: object) -> str:
        create(*args, **options)  # another one is faster
        return create(*args, **options)

    monkeypatch.setattr(type(client), "create_experiment", slow)
    run = begin(workspace)
    assert [found.info.run_id for found in runs_of(run)] == [run.run_id]


def test_a_store_that_does_not_answer_is_named(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"MLflow at http://127.0.0.1:9 does not answer"):
        mlflow_client(workspace)


def test_another_store_gets_another_run(workspace, tmp_path, new_store, monkeypatch):
    run = begin(workspace)
    other = tmp_path / "other.db"
    shutil.copy(new_store, other)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    assert begin(workspace).run_id != run.run_id
