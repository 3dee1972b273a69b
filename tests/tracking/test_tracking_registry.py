"""Versions, the champion, and a registered model in the hands of somebody without pbkd's files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pbkd.artifacts import Workspace, read_json, write_json
from pbkd.models import ModelCard, read_card
from pbkd.report import REGISTERED, read_measured, read_metrics
from pbkd.stages import StageContext, run_stage
from pbkd.stages.register import is_registered
from pbkd.students import load_model
from pbkd.tracking import PipelineRun, Registered, register_models, still_registered
from pbkd.tracking.fetch import fetch_version, find_version, open_registry
from pbkd.tracking.mlflow_run import mlflow_client, tracking_uri
from pbkd.tracking.registry import Candidate
from pbkd.tracking.versions import read_versions
from tests.tracking.registered import Registry


def receipt_of(workspace: Workspace) -> Registered:
    return Registered.model_validate_json((workspace.results / REGISTERED).read_text())


def register(workspace: Workspace) -> Registered:
    run_stage("register", StageContext.load(workspace))
    return receipt_of(workspace)


@pytest.fixture(scope="module")
def workspace(_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A registered workspace; its champion may lose any accuracy, its student lacked labels."""
    root = tmp_path_factory.mktemp("registered") / "workspace"
    shutil.copytree(_finished, root)
    shutil.rmtree(root / "data")  # not among the stage's dependencies
    params = (root / "params.yaml").read_text()
    relaxed = params.replace("name: tiny", "name: tiny, max_accuracy_drop: 1.0")
    (root / "params.yaml").write_text(relaxed)
    workspace = Workspace(root, root / ".pbkd")
    record = workspace.artifacts("finetune") / "half" / "finetune.json"
    write_json(record, read_json(record) | {"num_lacking": 7})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        register(workspace)
    return workspace


@pytest.fixture
def client(workspace: Workspace):
    return mlflow_client(workspace)


def test_teacher_and_student_are_versions_and_the_student_is_champion(workspace, client):
    receipt = receipt_of(workspace)
    assert set(receipt.versions) == {"teacher", "half"}
    champion = client.get_model_version_by_alias("tiny", "champion")
    assert receipt.champion == str(champion.version) == receipt.versions["half"].version
    for budget, entry in receipt.versions.items():
        tags = client.get_model_version("tiny", entry.version).tags
        assert tags["pbkd.budget"] == budget
        assert tags["pbkd.model_digest"] == entry.model_digest
    figures = read_metrics(workspace.results).students["half"].model_dump()
    for key in ("val_accuracy", "file_bytes"):
        assert float(champion.tags[f"pbkd.{key}"]) == pytest.approx(figures[key], rel=1e-9)
    assert f"| accuracy, test split | {figures['test_accuracy']:.2%} |" in champion.description


def test_the_stage_puts_limits_latency_and_lineage_on_the_version(workspace, client):
    teacher, student = read_versions(client, "tiny")
    measured = read_measured(workspace.results)
    assert student.limits == read_metrics(workspace.results).students["half"].limits
    assert list(student.limits) == ["macs"]
    latency = student.latency[measured.machine.machine_id]
    assert [e.median_ms for e in latency.entries] == [e.median_ms for e in measured.latency["half"]]
    assert (student.teacher_digest, student.teacher_version) == (teacher.model_digest, "1")
    assert student.params_digest
    assert student.weights_digest


def test_the_receipt_has_no_path_of_this_machine(workspace):
    text = (workspace.results / REGISTERED).read_text()
    assert str(workspace.root) not in text
    assert json.loads(text)["tracking_uri"] == "sqlite:///.pbkd/mlflow.db"


def test_registering_again_gives_the_same_versions_and_receipt(workspace, client):
    before = (workspace.results / REGISTERED).read_bytes()
    register(workspace)
    assert (workspace.results / REGISTERED).read_bytes() == before
    assert len(client.search_model_versions("name = 'tiny'")) == 2


def test_figures_of_a_model_are_found_by_one_name_for_all_models(workspace, client):
    metrics = read_metrics(workspace.results)
    student, teacher = metrics.students["half"], metrics.teacher
    assert student.val_accuracy < teacher.val_accuracy
    experiment = client.get_experiment_by_name("pbkd").experiment_id

    def found(condition: str) -> set[str]:
        models = client.search_logged_models([experiment], filter_string=condition)
        return {model.name for model in models}

    assert found("metrics.val_accuracy >= 0") == {"teacher", "half"}
    assert found(f"metrics.val_accuracy > {student.val_accuracy + 1e-6}") == {"teacher"}
    assert found(f"metrics.file_bytes < {teacher.file_bytes}") == {"half"}
    assert found(f"metrics.file_bytes < {teacher.file_bytes} AND metrics.macs < 1") == set()


def test_the_pipeline_run_shows_figures_and_series_under_names_of_their_own(workspace, client):
    experiment = client.get_experiment_by_name("pbkd").experiment_id
    runs = client.search_runs([experiment], order_by=["attributes.start_time ASC"])
    run = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    metrics = read_metrics(workspace.results)
    assert run.data.metrics["teacher/val_accuracy"] == metrics.teacher.val_accuracy
    student = metrics.students["half"]
    assert run.data.metrics["half/test_accuracy"] == student.test_accuracy
    assert run.data.metrics["finetune/half/images_without_soft_label"] == 7
    assert len(client.get_metric_history(run.info.run_id, "teacher/val_accuracy")) == 1
    assert len(client.get_metric_history(run.info.run_id, "teacher/training/val_accuracy")) == 3
    assert run.info.status == "FINISHED"
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files == {"metrics.json", "measured.json", "report.html", "pictures"}
    models = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == run.info.run_id]
    assert {r.data.tags["pbkd.model"]: r.info.status for r in models} == {
        "teacher": "FINISHED",
        "half": "FINISHED",
    }


def test_the_run_s_page_says_what_came_out_of_what(workspace, client, tmp_path):
    experiment = client.get_experiment_by_name("pbkd").experiment_id
    runs = client.search_runs([experiment])
    run = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    number = receipt_of(workspace).versions["half"].version
    text = run.data.tags["mlflow.note.content"]
    assert f"[version {number}](#/models/tiny/versions/{number}), champion" in text
    student = read_metrics(workspace.results).students["half"]
    assert f"- half: {student.val_accuracy:.2%} on the validation split" in text
    (data,) = run.inputs.dataset_inputs
    card = read_card(workspace.artifacts("teacher"))
    assert (data.dataset.name, data.dataset.digest) == ("digits", card.data_digest)
    series = {key: value for key, value in run.data.tags.items() if key.startswith("pbkd.series")}
    assert series["pbkd.series.teacher"] == "training"
    folder = Path(client.download_artifacts(run.info.run_id, "pictures", str(tmp_path)))
    pictures = {path.name: ElementTree.parse(path).getroot() for path in folder.glob("*.svg")}
    assert "accuracy_against_file_size.svg" in pictures
    for picture in pictures.values():
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(picture.attrib["width"].removesuffix("pt")) > 0


LOAD = """
import sys, numpy as np, torch, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pytorch.load_model("models:/tiny@champion")
for split in ("val", "test"):
    images = np.load(f"{sys.argv[2]}/{split}_images.npy").astype(np.float32) / 255
    labels = np.load(f"{sys.argv[2]}/{split}_labels.npy")
    with torch.no_grad():
        whole = model(torch.from_numpy(images)).argmax(1).numpy()
        odd = model(torch.from_numpy(images[:7])).argmax(1).numpy()
    assert (whole[:7] == odd).all()
    print(float((whole == labels).mean()))
assert not [name for name in sys.modules if name.split(".")[0] == "pbkd"]
info = mlflow.models.get_model_info("models:/tiny@champion")
print(info.signature.inputs.to_dict(), info.signature.outputs.to_dict())
print(info.metadata["class_names"])
print(info._saved_input_example_info is not None)
"""


def test_the_champion_gives_the_evaluated_accuracy_in_a_process_without_pbkd(
    workspace, finished, tmp_path
):
    uri = f"sqlite:///{workspace.state / 'mlflow.db'}"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, uri, str(finished.prepared)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    val, test, signature, class_names, has_example = done.stdout.splitlines()
    student = read_metrics(workspace.results).students["half"]
    assert float(val) == pytest.approx(student.val_accuracy, abs=1e-6)
    assert float(test) == pytest.approx(student.test_accuracy, abs=1e-6)
    assert "float32" in signature
    assert "(-1, 1, 8, 8)" in signature
    assert "(-1, 10)" in signature
    assert class_names == str([str(digit) for digit in range(10)])
    assert has_example == "True"


def test_pbkds_own_files_travel_with_the_version(workspace, client, tmp_path):
    import mlflow

    source = client.get_model_version_by_alias("tiny", "champion").source
    folder = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path)))
    (card,) = folder.rglob("model.json")
    _, loaded = load_model(card.parent)
    assert loaded.digest == receipt_of(workspace).versions["half"].model_digest


def test_a_receipt_is_compared_with_the_registry(workspace, client):
    receipt = receipt_of(workspace)
    assert is_registered(workspace)
    assert still_registered(workspace, receipt)
    entry = receipt.versions["half"]
    other = entry.model_copy(update={"model_digest": "other"})
    missing = entry.model_copy(update={"version": "99"})
    for wrong in (other, missing):
        versions = receipt.versions | {"half": wrong}
        assert not still_registered(workspace, receipt.model_copy(update={"versions": versions}))
    assert not still_registered(workspace, receipt.model_copy(update={"name": "unheard-of"}))


# ---------------------------------------------------------------- the champion


@pytest.fixture
def card(workspace) -> ModelCard:
    return load_model(workspace.artifacts("shrink") / "half")[1]


def put(client, name, card, digest, val_accuracy, file_bytes, data="d", budget="half") -> str:
    """A version as `register_models` makes it, without a model behind it."""
    tags = {
        "pbkd.model_digest": digest,
        "pbkd.budget": budget,
        "pbkd.data_digest": data,
        "pbkd.val_accuracy": str(val_accuracy),
        "pbkd.teacher_val_accuracy": "0.9",
        "pbkd.file_bytes": str(file_bytes),
    }
    version = client.create_model_version(name, "file:///nowhere", tags=tags, description="card")
    return str(version.version)


def champion_among(workspace, client, card, name, versions, max_accuracy_drop) -> str | None:
    """Register a run whose student is already version 1, and ask who is champion now."""
    client.create_registered_model(name)
    numbers = [put(client, name, card, f"digest-{i}", *v) for i, v in enumerate(versions)]
    assert numbers == [str(i + 1) for i in range(len(versions))]
    params = StageContext.load(workspace).params
    known = card.model_copy(update={"digest": "digest-0", "data_digest": "d"})
    model, _ = load_model(workspace.artifacts("shrink") / "half")
    candidate = Candidate(budget="half", folder=workspace.root, model=model, card=known, figures={})
    run = PipelineRun.current(workspace, params)
    receipt = register_models(workspace, run, name, [candidate], max_accuracy_drop)
    assert receipt.versions["half"].version == "1"
    champion = client.get_registered_model(name).aliases.get("champion")
    assert receipt.champion == (None if champion is None else str(champion))
    return receipt.champion


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        pytest.param([(0.9, 200), (0.89, 100)], "2", id="the smaller file"),
        pytest.param([(0.88, 200), (0.87, 100)], "1", id="not the too inaccurate one"),
        pytest.param([(0.87, 200), (0.86, 100)], None, id="none is accurate enough"),
        pytest.param([(0.89, 100), (0.9, 100)], "2", id="of equal files the more accurate"),
        pytest.param([(0.9, 100), (0.9, 100)], "1", id="of equal ones the first"),
        pytest.param([(0.9, 200), (0.9, 100, "e")], "1", id="not one of other data"),
        pytest.param([(0.9, 200), (0.9, 100, "d", "teacher")], "1", id="never a teacher"),
        pytest.param([(0.9, 1234568), (0.89, 1234567)], "2", id="by the byte"),
    ],
)
def test_the_champion_is_the_smallest_accurate_enough_student(
    workspace, client, card, request, versions, expected
):
    name = f"rule-{request.node.callspec.indices['versions']}"
    assert champion_among(workspace, client, card, name, versions, 0.02) == expected


def test_the_alias_stays_where_no_version_of_the_new_data_is_good_enough(workspace, client, card):
    name = "stays"
    assert champion_among(workspace, client, card, name, [(0.9, 100)], 0.02) == "1"
    put(client, name, card, "new", 0.5, 50, "other data")
    model, _ = load_model(workspace.artifacts("shrink") / "half")
    known = card.model_copy(update={"digest": "new", "data_digest": "other data"})
    candidate = Candidate(budget="half", folder=Path(), model=model, card=known, figures={})
    run = PipelineRun.current(workspace, StageContext.load(workspace).params)
    assert register_models(workspace, run, name, [candidate], 0.02).champion is None
    assert str(client.get_model_version_by_alias(name, "champion").version) == "1"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://user:secret@host:5000/path", "http://host:5000/path"),
        ("postgresql://user:secret@db/mlflow", "postgresql://db/mlflow"),
        ("sqlite:////home/somebody/tracking.db", "sqlite:tracking.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_neither_passwords_nor_paths_get_into_a_receipt(workspace, uri, expected):
    from pbkd.tracking.registry import _public

    assert _public(uri, workspace) == expected


@pytest.mark.parametrize(
    ("state", "environment", "expected"),
    [
        (".pbkd", "", "sqlite:///.pbkd/mlflow.db"),
        ("/big/state", "", "sqlite:////big/state/mlflow.db"),
        ("/a/.pbkd", "", "sqlite:////a/.pbkd/mlflow.db"),
        (".pbkd", "sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        (".pbkd", "/srv/mlruns", "/srv/mlruns"),
        (".pbkd", "http://user:secret@host:5000", "http://host:5000"),
        (".pbkd", "postgresql://db/x?password=secret", "postgresql://db/x?password=***"),
    ],
)
def test_commands_get_the_address_of_the_store_in_use(
    tmp_path, monkeypatch, state, environment, expected
):
    from pbkd.tracking.registry import _public, reachable_uri

    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    workspace = Workspace(tmp_path, tmp_path / state)
    receipt = _public(tracking_uri(workspace), workspace)
    assert reachable_uri(receipt, workspace) == expected


@pytest.mark.parametrize(
    ("receipt", "expected"),
    [
        ("http://host:5000", "http://host:5000"),
        ("sqlite:///.pbkd/mlflow.db", "sqlite:///.pbkd/mlflow.db"),
        ("sqlite:other.db", None),
    ],
)
def test_a_receipt_of_another_store_is_not_taken_for_the_one_in_use(
    tmp_path, monkeypatch, receipt, expected
):
    from pbkd.tracking.registry import reachable_uri

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////srv/mlflow.db")
    assert reachable_uri(receipt, Workspace(tmp_path, tmp_path / ".pbkd")) == expected


def test_a_workspace_whose_path_reads_like_a_uri_is_registered_elsewhere(tmp_path, new_store):
    state = tmp_path / "state"
    state.mkdir()
    shutil.copy(new_store, state / "mlflow.db")
    registry = Registry(Workspace(tmp_path / "50%20x", state), "tiny")
    registry.register(registry.candidate("teacher"))
    version = find_version(open_registry(registry.workspace), "models:/tiny/1")
    folder = tmp_path / "out"
    folder.mkdir()
    fetch_version(version, folder)
    assert {path.name for path in folder.iterdir()} == {"model.json", "model.safetensors"}


def test_a_deleted_version_is_registered_anew(workspace, client):
    """The last test: it changes the shared workspace."""
    receipt = receipt_of(workspace)
    client.delete_model_version("tiny", receipt.versions["half"].version)
    assert not is_registered(workspace)
    again = register(workspace)
    assert again.versions["half"].version == "3"
    assert again.versions["teacher"] == receipt.versions["teacher"]
    assert again.champion == "3"
    assert is_registered(workspace)
