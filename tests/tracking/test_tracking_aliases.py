"""Aliases per student, model cards, and versions that may go."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pbkd.cli import app
from pbkd.config import load_params
from pbkd.errors import ConfigError, TrackingError
from pbkd.picking import check_alias
from pbkd.tracking.aliases import alias_of
from pbkd.tracking.card import model_card
from pbkd.tracking.mlflow_run import mlflow_client
from pbkd.tracking.old_versions import delete_versions, logged_model, old_versions
from pbkd.tracking.registry import MODEL_CARD
from pbkd.tracking.versions import read_versions
from tests.tracking.registered import FIGURES, Registry, latency_of, new_registry, tags_of

SMALL = {"parameters": 250.0}


@pytest.fixture
def registry(new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return new_registry(new_store, tmp_path / "workspace")


def accurate(registry: Registry, accuracy: float, seed: int, **more):
    figures = {"val_accuracy": accuracy, **more.pop("figures", {})}
    return registry.candidate("half", figures, seed=seed, **({"limits": SMALL} | more))


def aliases(registry: Registry) -> dict[str, str]:
    client = mlflow_client(registry.workspace)
    return {k: str(v) for k, v in client.get_registered_model(registry.name).aliases.items()}


def git(root: Path, *arguments: str) -> str:
    name = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(root), *name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---------------------------------------------------------------- an alias per student


def test_the_alias_moves_only_to_a_better_version(registry):
    registry.register(accurate(registry, 0.8, 0))
    assert aliases(registry)["best-half"] == "1"
    registry.register(accurate(registry, 0.7, 1))
    assert aliases(registry)["best-half"] == "1"
    registry.register(accurate(registry, 0.9, 2))
    assert aliases(registry)["best-half"] == "3"
    registry.register(accurate(registry, 0.9, 3))  # as good: the first stays
    assert aliases(registry)["best-half"] == "3"
    registry.register(accurate(registry, 0.9, 4, figures={"file_bytes": 999.0}))
    assert aliases(registry)["best-half"] == "5"


def test_test_accuracy_has_no_say(registry):
    registry.register(accurate(registry, 0.9, 0, figures={"test_accuracy": 0.1}))
    registry.register(accurate(registry, 0.8, 1, figures={"test_accuracy": 1.0}))
    assert aliases(registry)["best-half"] == "1"


@pytest.mark.parametrize("change", [{"data": "other"}, {"limits": {"parameters": 100.0}}])
def test_other_data_or_limits_begin_anew(registry, change):
    registry.register(accurate(registry, 0.9, 0))
    registry.register(accurate(registry, 0.5, 1, **change))
    assert aliases(registry)["best-half"] == "2"
    registry.register(accurate(registry, 0.8, 2))  # back: the old ones count again
    assert aliases(registry)["best-half"] == "1"


def test_each_student_has_its_own_and_the_teacher_none(registry):
    registry.register(
        registry.candidate("teacher", seed=0),
        registry.candidate("half", seed=1),
        registry.candidate("v1.5", seed=2),
    )
    found = aliases(registry)
    assert found["best-half"] == "2"
    assert found["best-v1_5"] == "3"
    assert set(found) <= {"best-half", "best-v1_5", "champion"}


@pytest.mark.parametrize("alias", ["champion", "best-half"])
def test_nobody_else_moves_them(alias):
    with pytest.raises(ConfigError, match="moves this one"):
        check_alias(alias)
    check_alias("production")


def test_aliases_are_names_that_mlflow_takes():
    from mlflow.utils.validation import _validate_model_alias_name

    for student in ("latest", "v1", "a.b-c_d", "champion"):
        _validate_model_alias_name(alias_of(student))


# ---------------------------------------------------------------- cards


def test_a_version_has_its_card_and_the_run_has_it_as_a_file(registry, tmp_path):
    latency = latency_of("m1", (1, 3.5))
    registry.register(
        registry.candidate("teacher", seed=0),
        registry.candidate("half", seed=1, limits={"bytes": 5e5}, latency=latency),
    )
    client = mlflow_client(registry.workspace)
    version = client.get_model_version(registry.name, "2")
    text = version.description
    for part in (
        "**Student `half`** of vgg_small",
        "at most 500,000 bytes",
        "| accuracy, validation split | 90.00% (teacher 95.00%) |",
        "| file | 1,000 bytes |",
        "| latency, batch 1 on cpu, 1 thread | 3.5 ms |",
        "(N, 1, 8, 8) in [0, 1]",
        "ant, bee, cat",
        'pbkd.load("models:/tiny/2")',
        "**From** data `data`",
    ):
        assert part in text
    run_id = client.get_logged_model(logged_model(version.source)).source_run_id
    copied = client.download_artifacts(run_id, MODEL_CARD, str(tmp_path))
    assert Path(copied).read_text() == text
    assert tags_of(client, registry.name, 2)["pbkd.version"]


def test_a_version_that_lost_its_card_gets_it_when_registered_again(registry):
    candidate = registry.candidate("half", limits={"parameters": 99.5})
    registry.register(candidate)
    client = mlflow_client(registry.workspace)
    card = client.get_model_version(registry.name, "1").description
    assert "at most 99 parameters" in card
    client.update_model_version(registry.name, "1", description="")
    registry.register(candidate)
    assert len(client.search_model_versions(f"name = '{registry.name}'")) == 1
    assert client.get_model_version(registry.name, "1").description == card


def test_a_version_leads_back_to_its_commit_and_dvcs_record(registry):
    root = registry.workspace.root
    (root / "params.yaml").write_text("seed: 0\n")
    (root / "dvc.lock").write_text("schema: '2.0'\n")
    git(root, "init", "-q")
    git(root, "add", "params.yaml")
    git(root, "commit", "-q", "-m", "first")
    commit = git(root, "rev-parse", "HEAD").strip()
    registry.register(registry.candidate("a", seed=1))
    (root / "params.yaml").write_text("seed: 1\n")
    registry.register(registry.candidate("b", seed=2))
    client = mlflow_client(registry.workspace)
    clean, dirty = (tags_of(client, registry.name, number) for number in (1, 2))
    assert clean["pbkd.commit"] == commit
    assert dirty["pbkd.commit"] == f"{commit}-dirty"
    assert clean["pbkd.dvc_lock_md5"] == "8bf2a4444c7ae2c16f126761249fdf06"
    card = client.get_model_version(registry.name, "2").description
    assert f"commit `{commit[:12]}-dirty`" in card


def test_a_card_with_many_classes_fits_into_mlflows_column(registry):
    candidate = registry.candidate("half")
    card = candidate.card.model_copy(
        update={"class_names": tuple(f"class {i}" for i in range(999))}
    )
    text = model_card("tiny", 1, "half", card, FIGURES, {}, None, {})
    assert len(text) < 5000
    assert "class 19 and 979 more" in text


# ---------------------------------------------------------------- versions that may go


def filled(registry: Registry) -> Registry:
    """Version 1 is the teacher of 2, the best; 3 to 6 are worse students; 4 has an alias."""
    registry.register(registry.candidate("teacher", seed=9), accurate(registry, 0.9, 0))
    for seed in range(1, 5):
        registry.register(accurate(registry, 0.5, seed))
    client = mlflow_client(registry.workspace)
    client.set_registered_model_alias(registry.name, "mine", "4")
    return registry


def test_versions_without_an_alias_go_but_the_newest(registry):
    client = mlflow_client(filled(registry).workspace)
    assert [v.number for v in old_versions(client, registry.name, keep=1)] == [3, 5]
    assert [v.number for v in old_versions(client, registry.name, keep=2)] == [3]
    assert [v.number for v in old_versions(client, registry.name, keep=1, in_use=["3"])] == [5]
    assert old_versions(client, registry.name, keep=4) == []


def test_the_teacher_of_a_student_that_stays_stays(registry):
    filled(registry).register(registry.candidate("teacher", seed=10))
    client = mlflow_client(registry.workspace)
    assert 1 not in [v.number for v in old_versions(client, registry.name, keep=1)]


def test_deleted_versions_and_their_models_are_gone(registry):
    client = mlflow_client(filled(registry).workspace)
    old = old_versions(client, registry.name, keep=1)
    model_id = logged_model(client.get_model_version(registry.name, "3").source)
    assert client.get_logged_model(model_id).model_id == model_id
    delete_versions(client, old)
    assert [v.number for v in read_versions(client, registry.name)] == [1, 2, 4, 6]
    with pytest.raises(Exception, match=model_id):
        client.get_logged_model(model_id)
    with pytest.raises(TrackingError, match="cannot be deleted"):
        delete_versions(client, old)
    assert old_versions(client, registry.name, keep=1) == []


def test_the_verb_says_what_would_go_and_deletes_it(registry, monkeypatch):
    client = mlflow_client(filled(registry).workspace)
    root = registry.workspace.root
    (root / "params.yaml").write_text("register: {name: tiny}\n")
    (root / ".dvc").mkdir()
    assert load_params(root / "params.yaml").register_.name == "tiny"
    monkeypatch.chdir(root)
    monkeypatch.setenv("PBKD_STATE_DIR", str(registry.workspace.state))
    runner = CliRunner()
    dry = runner.invoke(app, ["gc", "--versions", "--keep", "1", "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "would delete models:/tiny/3 (half)" in dry.output
    assert len(read_versions(client, "tiny")) == 6
    done = runner.invoke(app, ["gc", "--versions", "--keep", "1"])
    assert "deleted 2" in done.output
    assert [v.number for v in read_versions(client, "tiny")] == [1, 2, 4, 6]
