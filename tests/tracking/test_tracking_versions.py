"""Versions of a family in a real registry: what their tags say, and that they are made once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pbkd.artifacts import file_digest
from pbkd.errors import TrackingError
from pbkd.tracking.fetch import find_version, open_registry
from pbkd.tracking.mlflow_run import mlflow_client
from pbkd.tracking.versions import present_origin, read_versions
from tests.tracking.registered import Registry, latency_of, new_registry, tags_of


@pytest.fixture(scope="module")
def registry(new_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A teacher and two students in a workspace under git, registered twice."""
    root = tmp_path_factory.mktemp("family") / "workspace"
    registry = new_registry(new_store, root)
    (root / "params.yaml").write_text("seed: 0\n")
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "params.yaml"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    candidates = [
        registry.candidate("small", {"val_accuracy": 0.8}, seed=1, limits={"bytes": 500.0}),
        registry.candidate(
            "large", seed=2, limits={"macs": 5000.0}, latency=latency_of("m", (1, 2.5))
        ),
        registry.candidate("teacher", {"val_accuracy": 0.95}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        first = registry.register(*candidates)
        assert registry.register(*candidates) == first
    return registry


@pytest.fixture
def client(registry: Registry):
    return mlflow_client(registry.workspace)


def test_a_family_registered_twice_adds_no_version(registry, client) -> None:
    assert [v.student for v in read_versions(client, "tiny")] == ["teacher", "small", "large"]


def test_a_version_says_budget_figures_latency_and_lineage(registry, client) -> None:
    teacher, small, large = read_versions(client, "tiny")
    assert (small.limits, large.limits) == ({"bytes": 500.0}, {"macs": 5000.0})
    assert small.figures["val_accuracy"] == 0.8
    assert set(small.figures) == {
        "val_accuracy",
        "test_accuracy",
        "teacher_val_accuracy",
        "file_bytes",
        "num_parameters",
        "macs",
    }
    assert large.latency == {"m": latency_of("m", (1, 2.5))}
    assert small.latency == {}
    assert small.teacher_digest == teacher.model_digest == teacher.teacher_digest
    assert small.teacher_version == str(teacher.number) == "1"
    assert teacher.teacher_version == ""
    assert small.data_digest == "data"
    head = ["git", "-C", str(registry.workspace.root), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    assert (small.commit, small.params_digest) == (commit, "params")
    assert client.get_run(small.run_id).info.run_id == small.run_id
    folder = registry.workspace.root / "models" / "small-1-data"
    assert small.weights_digest == file_digest(folder / "model.safetensors")
    assert present_origin(client, [teacher, small, large]) == small.origin


def test_figures_and_latency_are_metrics_of_the_logged_model(registry, client) -> None:
    (large,) = client.search_logged_models(
        [client.get_experiment_by_name("pbkd").experiment_id],
        filter_string="metrics.latency_batch_1_ms > 2",
    )
    values = {metric.key: metric.value for metric in large.metrics}
    assert values["latency_batch_1_ms"] == 2.5
    assert values["macs"] == 4000


def test_a_known_version_gets_what_it_lacks_and_the_newest_latency(new_store, tmp_path) -> None:
    registry = new_registry(new_store, tmp_path / "w")
    client = mlflow_client(registry.workspace)
    plain = registry.candidate("small", {"val_accuracy": float("nan")}, seed=1)
    registry.register(plain)
    client.delete_model_version_tag("tiny", "1", "pbkd.macs")
    client.delete_model_version_tag("tiny", "1", "pbkd.teacher_val_accuracy")
    first = tags_of(client, "tiny", 1)
    assert "pbkd.commit" not in first  # no repository
    registry.register(
        registry.candidate(
            "small",
            {"val_accuracy": 0.5, "macs": 7.0},
            seed=1,
            limits={"bytes": 9.0},
            latency=latency_of("m", (1, 2.0)),
        )
    )
    measured_again = latency_of("m", (1, 3.0))
    registry.register(registry.candidate("small", seed=1, latency=measured_again))
    elsewhere = latency_of("n", (1, 9.0))
    registry.register(registry.candidate("small", seed=1, latency=elsewhere))
    (version,) = read_versions(client, "tiny")
    assert version.figures["macs"] == 7.0
    assert version.figure("val_accuracy") is None  # what was first registered stays
    assert version.limits == {"bytes": 9.0}
    assert version.latency == {"m": measured_again, "n": elsewhere}
    assert tags_of(client, "tiny", 1)["pbkd.run_id"] == first["pbkd.run_id"]


def test_the_present_origin_is_what_was_registered_last_even_if_nothing_was_new(
    new_store, tmp_path
) -> None:
    registry = new_registry(new_store, tmp_path / "w")
    client = mlflow_client(registry.workspace)
    for data in ("one", "two", "one"):
        registry.register(registry.candidate("s", data=data))
    versions = read_versions(client, "tiny")
    assert [version.data_digest for version in versions] == ["one", "two"]
    assert present_origin(client, versions) == ("one", "")
    client.delete_registered_model_tag("tiny", "pbkd.data_digest")
    assert present_origin(client, versions) == ("two", "")


def test_a_tag_that_cannot_be_read_is_named(new_store, tmp_path) -> None:
    registry = new_registry(new_store, tmp_path / "w")
    client = mlflow_client(registry.workspace)
    client.create_registered_model("tiny")
    for tags in ({"pbkd.macs": "many"}, {"pbkd.limits": "{"}, {"pbkd.latency.m": "[]"}):
        wrong = client.create_model_version(
            "tiny", "file:///nowhere", tags={"pbkd.budget": "s", **tags}
        )
        with pytest.raises(TrackingError, match=f"version {wrong.version} of tiny has a tag"):
            read_versions(client, "tiny")
        client.delete_model_version("tiny", wrong.version)
    client.create_model_version("tiny", "file:///nowhere")  # somebody else's
    assert read_versions(client, "tiny") == []


def test_a_registry_that_is_not_there_is_not_made(tmp_path, monkeypatch) -> None:
    from pbkd.artifacts import Workspace

    workspace = Workspace(tmp_path, tmp_path / ".pbkd")
    with pytest.raises(TrackingError, match=r"there is no registry in .*\.pbkd"):
        open_registry(workspace)
    assert not list(tmp_path.iterdir())


def test_a_registry_elsewhere_leaves_no_trace_here(registry, tmp_path, monkeypatch) -> None:
    from pbkd.artifacts import Workspace

    store = registry.workspace.state / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    client = open_registry(Workspace(tmp_path, tmp_path / ".pbkd"))
    assert find_version(client, "models:/tiny/2").student == "small"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/tinny/1", "no model of the name `tinny`; did you mean `tiny`?"),
        ("models:/else/1", "no model of the name `else`; it has tiny"),
        ("models:/tiny/9", "no version 9 that pbkd registered; such are 1, 2, 3"),
        ("models:/tiny@best", "no alias `best`; it has @best-large, @best-small, @champion"),
    ],
)
def test_what_a_registry_has_not_is_said_with_what_it_has(client, uri, said) -> None:
    client.set_registered_model_alias("tiny", "champion", "3")
    with pytest.raises(TrackingError) as caught:
        find_version(client, uri)
    assert said in str(caught.value)
