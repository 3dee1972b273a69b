"""`pick`, its export, and `pbkd.load`, over a real registry of small untrained models."""

from __future__ import annotations

import shutil

import pytest
import torch

from pbkd.artifacts import Workspace
from pbkd.errors import ArtifactError, ConfigError, PbkdError, TeacherError, TrackingError
from pbkd.exporting import check_free, export
from pbkd.loading import load
from pbkd.measure import this_machine
from pbkd.picking import Answer, check_alias, model_name, move_alias, pick, wanted_from
from pbkd.students import load_model
from pbkd.tracking.mlflow_run import mlflow_client
from pbkd.tracking.versions import ModelVersion, read_versions
from tests.tracking.registered import CLASSES, Registry, latency_of, new_registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Versions: 1 teacher, 2 `small`, 3 `large` (also measured), 4 of other data, but older."""
    root = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        mlflow_client(Workspace(root, root / "empty"))
        registry = new_registry(root / "empty" / "mlflow.db", root / "workspace")
        here = this_machine().machine_id
        family = [
            registry.candidate(
                "teacher",
                {"val_accuracy": 0.95, "file_bytes": 4e6, "macs": 2e6},
                latency=latency_of(here, (1, 8.0)),
            ),
            registry.candidate(
                "small",
                {"val_accuracy": 0.9, "test_accuracy": 0.88, "file_bytes": 5e5},
                seed=1,
                latency=latency_of(here, (1, 2.0)),
                limits={"bytes": 6e5},
            ),
            registry.candidate(
                "large",
                {"val_accuracy": 0.94, "test_accuracy": 0.93, "file_bytes": 2e6, "macs": 1e6},
                seed=2,
                latency=latency_of("elsewhere", (1, 1.0)),
            ),
        ]
        registry.register(*family)
        registry.register(registry.candidate("other", {"val_accuracy": 0.99}, data="other"))
        registry.register(*family)  # the present one again
    return registry


@pytest.fixture
def workspace(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(registry.workspace.root)
    return registry.workspace


def ask(workspace: Workspace, **texts: str) -> Answer:
    accuracy = texts.pop("accuracy", None)
    return pick(workspace, "tiny", wanted_from(dict(texts), accuracy))


def version(workspace: Workspace, number: int) -> ModelVersion:
    return read_versions(mlflow_client(workspace), "tiny")[number - 1]


def answers(model: torch.nn.Module) -> torch.Tensor:
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(images)


def of_folder(registry: Registry, name: str) -> torch.Tensor:
    return answers(load_model(registry.workspace.root / "models" / name)[0])


# ---------------------------------------------------------------- the answer


def test_the_choice_is_explained_with_the_test_accuracy_beside(workspace) -> None:
    answer = ask(workspace, bytes="1MB", accuracy="90%", latency="5ms")
    assert answer.version is not None
    assert answer.version.student == "small"
    assert answer.sentences[0] == (
        "Version 2, `small`, is the only student within the limits (bytes at most 1 MB, latency at "
        "most 5 ms, accuracy at least 90.00%): 90.00% on the validation split, 88.00% on the test "
        "split, 500 kB, 2 ms."
    )
    assert answer.sentences[1] == "Latency is that of PyTorch, batch 1 on cpu, 1 thread."
    assert answer.sentences[2] == (
        "1 of 2 students have no latency of this machine (but on: processor of elsewhere); only "
        "such ones compare: run here `pbkd evaluate --remeasure` and `pbkd register`."
    )
    assert answer.sentences[3] == "Left out: 1 version of other data or of another teacher."
    verdicts = {row[1]: row[-1] for row in answer.table.rows}
    assert verdicts == {
        "teacher": "not a student",
        "small": "chosen",
        "large": "bytes 100.0% over 1 MB; latency not measured here",
    }
    assert "latency, batch 1 on cpu, 1 thread" in answer.table.heads
    assert all(len(row) == len(answer.table.heads) for row in answer.table.rows)


@pytest.mark.parametrize(
    ("texts", "student", "why"),
    [
        ({}, "large", "is the most accurate of the 2 students: 94.00%"),
        ({"accuracy": "0.9"}, "small", "the smallest file of the 2 students with at least 90.00%"),
        ({"accuracy": "0.92"}, "large", "the only student with at least 92.00%"),
        ({"bytes": "50%"}, "large", "of the 2 students within the limits (bytes at most 2 MB)"),
        ({"macs": "10M"}, "large", "(MACs at most 10M)"),
    ],
)
def test_the_rule_is_said(workspace, texts, student, why) -> None:
    answer = ask(workspace, **texts)
    assert answer.version is not None
    assert answer.version.student == student
    assert why in answer.sentences[0]


def test_a_teacher_within_the_limits_is_told(workspace) -> None:
    assert "The teacher itself is within the limits." in ask(workspace, bytes="5MB").sentences
    assert "The teacher itself is within the limits." not in ask(workspace, bytes="3MB").sentences


def test_where_nothing_fits_the_nearest_are_named(workspace) -> None:
    answer = ask(workspace, bytes="400kB", accuracy="0.92")
    assert answer.version is None
    assert answer.sentences[0].startswith(
        "no version is within the limits (bytes at most 400 kB, accuracy at least 92.00%); nearest:"
        " version 2 `small` (accuracy 2.00 points too low; bytes 25.0% over 400 kB), version 3 "
        "`large` (bytes 400.0% over 400 kB); relax a limit"
    )


def test_a_registry_of_an_older_pbkd_is_compared_by_what_it_has(workspace) -> None:
    client = mlflow_client(workspace)
    client.create_registered_model("older")
    for number, accuracy in (("1", "0.8"), ("2", "nan"), ("3", "0.7")):
        tags = {"model_digest": number, "budget": "default", "data_digest": "d"}
        tags |= {"val_accuracy": accuracy, "file_bytes": f"{number}00"}
        tags = {f"pbkd.{key}": value for key, value in tags.items()}
        client.create_model_version("older", "file:///nowhere", tags=tags)
    client.create_model_version("older", "file:///nowhere")  # nothing of pbkd's
    answer = pick(workspace, "older", wanted_from({}, None))
    assert answer.version is not None
    assert answer.version.number == 1
    assert "not recorded on the test split" in answer.sentences[0]
    assert [row[-1] for row in answer.table.rows] == [
        "chosen",
        "accuracy not recorded",
        "within all limits",
    ]
    refused = pick(workspace, "older", wanted_from({"macs": "1M"}, None))
    assert "(MACs not recorded)" in refused.sentences[0]


@pytest.mark.parametrize(
    ("limits", "accuracy", "said"),
    [
        ({"bytes": "5ms"}, None, "--max-bytes: got `5ms`, expected a limit of bytes"),
        ({"latency": "5"}, None, "--max-latency: got `5`"),
        ({"macs": "-1"}, None, "--max-macs"),
        ({}, "90", "--min-accuracy: got `90`"),
        ({}, "nan", "--min-accuracy: got `nan`"),
        ({}, "high", "--min-accuracy: got `high`"),
    ],
)
def test_limits_that_cannot_be_read(limits, accuracy, said) -> None:
    with pytest.raises(ConfigError) as caught:
        wanted_from(limits, accuracy)
    assert said in str(caught.value)


def test_the_name_comes_from_params_yaml_or_is_asked_for(tmp_path) -> None:
    workspace = Workspace(tmp_path, tmp_path / ".pbkd")
    with pytest.raises(ConfigError, match="give --name MODEL"):
        model_name(workspace, None)
    workspace.params.write_text("register: {name: mine}\n")
    assert model_name(workspace, None) == "mine"
    assert model_name(workspace, "given") == "given"


# ---------------------------------------------------------------- alias, export, load


def test_an_alias_moves_to_the_choice_and_is_loaded_by_it(registry, workspace) -> None:
    move_alias(workspace, version(workspace, 3), "device")
    move_alias(workspace, version(workspace, 2), "device")
    model = load("models:/tiny@device")
    assert torch.equal(answers(model), of_folder(registry, "small-1-data"))
    with pytest.raises(ConfigError, match="moves this one by its own rule"):
        check_alias("champion")
    with pytest.raises(TrackingError, match="does not take alias `v1`"):
        move_alias(workspace, version(workspace, 2), "v1")


def test_a_version_is_exported_and_loaded_with_equal_logits(registry, workspace, tmp_path) -> None:
    folder = tmp_path / "new" / "exported"
    export(workspace, version(workspace, 2), folder)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "model.json",
        "model.safetensors",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["exported"]
    model = load(folder)
    assert torch.equal(answers(model), of_folder(registry, "small-1-data"))
    assert not model.training
    assert model.class_names == CLASSES
    assert model.card.digest == version(workspace, 2).model_digest
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    text = (folder / "README.md").read_text()
    for part in ("tiny, version 2: small", "| 90.00% |", "500 kB", "bytes <= 600,000", "batch 1"):
        assert part in text
    assert str(registry.workspace.root) not in text
    with pytest.raises(ArtifactError, match="exists and is not empty"):
        export(workspace, version(workspace, 3), folder)
    (tmp_path / "empty").mkdir()
    export(workspace, version(workspace, 3), tmp_path / "empty")
    check_free(tmp_path / "not there")


def test_a_model_of_a_registry_elsewhere_is_loaded_by_its_uri(
    registry, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError, match="there is no registry in"):
        load("models:/tiny/3")
    store = registry.workspace.state / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    assert torch.equal(answers(load("models:/tiny/3")), of_folder(registry, "large-2-data"))
    assert not list(tmp_path.iterdir())


def test_loading_unpickles_nothing(workspace, monkeypatch) -> None:
    import pickle

    import mlflow

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    mlflow_client(workspace)
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(mlflow.pytorch, "load_model", refuse)
    load("models:/tiny/2")


def test_students_of_the_workspace_are_loaded_by_name(registry, workspace, tmp_path) -> None:
    shutil.copytree(workspace.root / "models/small-1-data", workspace.root / "artifacts/shrink/one")
    assert torch.equal(answers(load("one")), of_folder(registry, "small-1-data"))
    with pytest.raises(ArtifactError, match=r"neither a folder nor a student of .*`one`"):
        load("ones")


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        (None, ConfigError, "got None, expected a path, a name or models:/"),
        ("models:/tiny", ConfigError, "expected models:/NAME/VERSION or models:/NAME@ALIAS"),
        ("models:/tiny/latest", ConfigError, "got `models:/tiny/latest`"),
        ("models:/tiny/77", TrackingError, "no version 77"),
        ("models:/tinny/1", TrackingError, "did you mean `tiny`"),
        ("models", ArtifactError, r"models has no model\.json"),
        ("not/there", ArtifactError, "not/there is missing; expected a folder"),
        ("models/teacher-0-data/model.json", ArtifactError, "is a file; give its folder"),
    ],
)
def test_what_cannot_be_loaded_is_told(workspace, source, kind, said) -> None:
    with pytest.raises(kind, match=said) as caught:
        load(source)
    assert isinstance(caught.value, PbkdError)


def test_a_network_of_the_users_own_needs_consent(workspace, tmp_path) -> None:
    shutil.copytree(workspace.root / "models/small-1-data", tmp_path / "own")
    card = tmp_path / "own" / "model.json"
    card.write_text(card.read_text().replace("vgg_small", "os:getcwd").replace("0.05", "1.0"))
    with pytest.raises(TeacherError, match="allow_code=True"):
        load(tmp_path / "own")


# ---------------------------------------------------------------- damage; these change a copy


@pytest.fixture
def stored(registry: Registry, workspace: Workspace):
    """The folder in which the registry keeps version 3's files; it is mended afterwards."""
    (folder,) = (
        path.parent
        for path in workspace.state.rglob("extra_files/model.json")
        if version(workspace, 3).model_digest in path.read_text()
    )
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    yield folder
    folder.mkdir(exist_ok=True)
    for path, content in kept.items():
        path.write_bytes(content)


def test_damaged_weights_are_neither_loaded_nor_exported(stored, workspace, tmp_path) -> None:
    weights = stored / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for action in (
        lambda: load("models:/tiny/3"),
        lambda: export(workspace, version(workspace, 3), tmp_path / "out"),
    ):
        with pytest.raises(ArtifactError, match="not what was registered"):
            action()
    assert not list(tmp_path.iterdir())


def test_files_of_another_model_are_told(stored, workspace, registry, tmp_path) -> None:
    client = mlflow_client(workspace)
    digest = version(workspace, 3).weights_digest
    client.delete_model_version_tag("tiny", "3", "pbkd.weights_digest")  # as of an older pbkd
    for path in (registry.workspace.root / "models" / "small-1-data").iterdir():
        shutil.copy(path, stored)
    for action in (
        lambda: load("models:/tiny/3"),
        lambda: export(workspace, version(workspace, 3), tmp_path / "out"),
    ):
        with pytest.raises(ArtifactError, match="another model than the one that was registered"):
            action()
    client.set_model_version_tag("tiny", "3", "pbkd.weights_digest", digest)


def test_files_that_are_gone_are_told(stored, workspace) -> None:
    shutil.rmtree(stored)
    with pytest.raises(TrackingError, match="the files of models:/tiny/3 cannot be read"):
        load("models:/tiny/3")


def test_an_unknown_runtime_is_refused_and_int8_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--runtime: got `tflite`, expected one of pytorch,"):
        wanted_from({}, runtime="tflite")
    wanted = wanted_from({}, threads=2, runtime="onnxruntime-int8")
    assert (wanted.threads, wanted.runtime) == (2, "onnxruntime-int8")
