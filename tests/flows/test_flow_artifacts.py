"""What Prefect shows of a run: sent seldom, never at the run's cost, and readable."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from types import SimpleNamespace, TracebackType
from typing import Any, Self
from uuid import UUID, uuid4

import pytest

from flows import artifacts
from flows.artifacts import (
    Artifact,
    Bar,
    Feed,
    blocks_table,
    gantt_text,
    markdown_table,
    mlflow_line,
    plan_markdown,
    progress_of,
    publish_results,
    results_markdown,
)
from flows.status import CandidateStatus, RunStatus
from pbkd.artifacts import Workspace
from pbkd.plan import Plan, PlannedJob
from pbkd.plan.placement import place_jobs
from pbkd.plan.planned import Work
from pbkd.report import Table
from pbkd.tracking import PipelineRun
from tests.flows.project import Project
from tests.flows.test_drivers import api

FLOW_RUN = uuid4()


class Client:
    """Prefect's client: keeps what it is sent, with the time, and does what ``then`` says."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, str, Any, str | None]] = []
        self.keys: dict[UUID, str] = {}
        self.then: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def create_artifact(self, artifact: Any) -> Any:
        assert artifact.flow_run_id == FLOW_RUN
        made = SimpleNamespace(id=uuid4())
        self.keys[made.id] = artifact.key
        self._take(f"create {artifact.key}", artifact)
        return made

    def update_artifact(self, artifact_id: UUID, artifact: Any) -> None:
        self._take(f"update {self.keys[artifact_id]}", artifact)

    def _take(self, what: str, artifact: Any) -> None:
        self.calls.append((time.monotonic(), what, artifact.data, artifact.description))
        self.then()

    @property
    def told(self) -> list[tuple[str, Any]]:
        return [(what, data) for _, what, data, _ in self.calls]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setattr(artifacts, "get_client", lambda sync_client: client)
    context = SimpleNamespace(flow_run=SimpleNamespace(id=FLOW_RUN))
    monkeypatch.setattr(artifacts.FlowRunContext, "get", lambda: context)
    return client


def shown(data: float) -> Artifact:
    return Artifact("progress", data)


def wait_for_calls(client: Client, number: int) -> None:
    deadline = time.monotonic() + 10
    while len(client.calls) < number:
        assert time.monotonic() < deadline, client.calls
        time.sleep(0.005)


# ---------------------------------------------------------------- the feed


def test_the_latest_state_is_sent_and_the_last_one_always(client: Client) -> None:
    with Feed(period_s=60) as feed:
        feed.show("share", shown(1))
        wait_for_calls(client, 1)
        for number in range(2, 50):
            feed.show("share", shown(number))
            feed.show("other", shown(number))
    assert client.told[0] == ("create share", 1)
    assert sorted(client.told[1:]) == [("create other", 49), ("update share", 49)]


def test_calls_are_a_period_apart_and_every_key_has_its_turn(client: Client) -> None:
    with Feed(period_s=0.1) as feed:
        while len(client.calls) < 6:
            feed.show("a", shown(0))
            feed.show("b", shown(0))
            time.sleep(0.005)
        times = [call[0] for call in client.calls[:6]]
    gaps = [after - before for before, after in pairwise(times)]
    assert min(gaps) > 0.095
    assert {key.split()[1] for key, _ in client.told[:3]} == {"a", "b"}


def test_a_failing_server_costs_one_warning(
    client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ConnectionError("no server")

    client.then = fail
    monkeypatch.setattr(artifacts, "_AFTER_FAILURE_S", 0.01)
    monkeypatch.setattr(artifacts.log, "disabled", False)
    artifacts.log.addHandler(caplog.handler)
    try:
        with Feed(period_s=0.01) as feed:
            for number in range(3):
                feed.show("share", shown(number))
                wait_for_calls(client, number + 1)
    finally:
        artifacts.log.removeHandler(caplog.handler)
    told = {record.getMessage() for record in caplog.records}
    assert told == {"Prefect does not take artifact share: no server"}
    assert [what for what, _ in client.told] == ["create share"] * 3


def test_after_a_failure_the_end_does_not_try_again(client: Client) -> None:
    def fail() -> None:
        raise ConnectionError("no server")

    client.then = fail
    began = time.monotonic()
    with Feed(period_s=0.01) as feed:
        feed.show("share", shown(1))
        wait_for_calls(client, 1)
        feed.show("share", shown(2))
    assert time.monotonic() - began < 3
    assert len(client.calls) == 1


def test_a_server_that_hangs_does_not_hold_up_the_run(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.then = lambda: time.sleep(2)
    monkeypatch.setattr(artifacts, "_PATIENCE_S", 0.2)
    began = time.monotonic()
    with Feed() as feed:
        feed.show("share", shown(1))
    assert time.monotonic() - began < 1.5


def test_ctrl_c_is_not_kept_waiting(client: Client) -> None:
    client.then = lambda: time.sleep(2)
    began = time.monotonic()
    feed = Feed()
    with suppress(KeyboardInterrupt), feed:
        feed.show("share", shown(1))
        wait_for_calls(client, 1)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 1.5


def test_outside_of_a_flow_run_nothing_is_sent() -> None:
    with Feed() as feed:
        feed.show("share", shown(1))
        assert feed._thread is None


# ---------------------------------------------------------------- contents


def test_a_chart_of_jobs() -> None:
    rows = {
        "worker 1": [Bar("0", 0.0, 4.0), Bar("12", 4.0, 2.0)],
        "w 2": [Bar("3", 1.0, 3.0), Bar("14", 4.0, 0.1), Bar("5", 6.0, 4.0)],
    }
    assert gantt_text(rows, last_s=10.0, width=20).split("\n") == [
        "worker 1 |0====== 12=         |",
        "w 2      |  3==== =   5====== |",
        "          0 s             10 s",
    ]


def test_a_chart_of_nothing() -> None:
    assert gantt_text({"worker 1": []}, last_s=0.0, width=10).startswith("worker 1 |          |")


def plan() -> Plan:
    jobs = tuple(
        PlannedJob(f"job-00{n}", (f"b{n}/x", f"b{n}/y"), (f"b{n}",), "relay", None, cost, 1)
        for n, cost in enumerate([4.0, 2.0, 2.0])
    )
    placement = place_jobs([job.cost_s for job in jobs], [1.0, 1.0])
    return Plan(
        jobs=jobs, cached=(), disk_bytes=0, memory_bytes=1, fill_s=0.0, placement=placement,
        wall_s=4.0, work_s=8.0, bound_s=4.0, work=Work(8.0, 0.0, 0.0, 0.0, 0.0),
        bottleneck="all workers are busy", too_large=(),
    )  # fmt: skip


def test_a_plan_as_markdown_before_and_after_it_ran() -> None:
    before = str(plan_markdown(plan(), [1.0, 1.0], wall_s=4.5).data)
    assert before.startswith("**3 jobs on 2 workers in 4.5 s, predicted.** All workers are busy.")
    assert before.count("```text") == 1
    assert "| 0 | relay | 4.0 s | 2 | b0 |" in before
    ran = {"cpu-1": [Bar("0", 0.0, 5.0)], "cpu-0": [Bar("1", 0.0, 2.5), Bar("2", 2.5, 2.0)]}
    after = str(plan_markdown(plan(), [1.0, 1.0], 4.5, ran).data)
    assert after.count("```text") == 2
    assert after.index("cpu-0") < after.index("cpu-1")
    assert "**As it ran**, 5.0 s:" in after
    assert "| 0 | relay | 4.0 s | 5.0 s | 2 | b0 |" in after


def test_the_table_of_blocks_has_a_row_per_candidate() -> None:
    status = RunStatus(lambda: 50.0)
    candidates = [CandidateStatus("a", "x"), CandidateStatus("a", "y", state="stored")]
    status.begin_phase([*candidates, CandidateStatus("b", "x")], max_epochs=4, planned_s=None)
    status.start_job(["a/x"], "cpu-0")
    status.advance("a/x", 3, 0.12345)
    status.finish("a/x", 4, 0.1, 0.25, 0.0125, training_s=2.0)
    assert status.phase is not None
    table = blocks_table(status.phase, now_s=50.0)
    rows = json.loads(str(table.data))
    assert [row["state"] for row in rows] == ["done", "from the store", "waiting"]
    assert rows[0] == {
        "block": "a", "candidate": "x", "state": "done", "worker": "cpu-0", "epochs": "4 of 4",
        "loss": "0.1", "damage": "0.25", "accuracy drop": "1.25", "time": "2.0 s",
    }  # fmt: skip
    assert table.description is not None
    assert table.description.startswith("2 blocks: 1 done, 1 waiting.")
    assert progress_of(status.phase).data == pytest.approx(50.0)


def test_a_table_in_markdown_keeps_its_cells_apart() -> None:
    table = Table("", ("", "teacher"), (("a|b", "1"),))
    assert markdown_table(table) == "|  | teacher |\n| :-- | --: |\n| a\\|b | 1 |"


@pytest.fixture
def run() -> PipelineRun:
    return PipelineRun(None, "abc", "7")


def test_a_local_store_is_told_by_its_command(workspace: Workspace, run: PipelineRun) -> None:
    line = mlflow_line(workspace, run)
    store = workspace.state / "mlflow.db"
    assert f"`mlflow server --backend-store-uri sqlite:///{store}`" in line
    assert "#/experiments/7/runs/abc" in line


def test_a_server_of_the_local_store_is_linked(
    workspace: Workspace, run: PipelineRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PBKD_MLFLOW_URL", "http://127.0.0.1:5100")
    assert mlflow_line(workspace, run) == (
        "MLflow: [run abc](http://127.0.0.1:5100/#/experiments/7/runs/abc?"
        "workflowType=machine_learning)"
    )


def test_a_server_is_linked_without_its_password(
    workspace: Workspace, run: PipelineRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@tracking.example:5000/base/")
    assert mlflow_line(workspace, run) == (
        "MLflow: [run abc](https://tracking.example:5000/base/"
        "#/experiments/7/runs/abc?workflowType=machine_learning)"
    )


def test_results_have_the_final_table_and_where_the_report_is(
    workspace: Workspace, run: PipelineRun
) -> None:
    text = results_markdown(workspace, run)
    assert "| accuracy (test) |" in text
    assert f"`{workspace.results / 'report.html'}`" in text
    assert mlflow_line(workspace, run) in text


def test_results_that_cannot_be_shown_are_a_warning(
    workspace: Workspace, run: PipelineRun, caplog: pytest.LogCaptureFixture
) -> None:
    (workspace.results / "metrics.json").unlink()
    artifacts.log.addHandler(caplog.handler)
    try:
        publish_results(workspace, run)
    finally:
        artifacts.log.removeHandler(caplog.handler)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


# ---------------------------------------------------------------- Prefect itself


def test_a_run_leaves_its_artifacts_in_prefect(project: Project) -> None:
    keys = ("results", "blocks", "plan", "block-progress", "mlflow-run")
    found = {}
    for key in keys:
        wanted = {"sort": "CREATED_DESC", "artifacts": {"key": {"any_": [key]}}}
        found[key] = api(project, "/artifacts/filter", wanted)[-1]  # of the first run, undisturbed
    assert found["mlflow-run"]["flow_run_id"] == found["plan"]["flow_run_id"]
    assert found["plan"]["data"].count("```text") == 2
    assert found["block-progress"]["data"] == 100
    rows = json.loads(found["blocks"]["data"])
    assert {row["state"] for row in rows} <= {"done", "from the store"}
    assert "accuracy (test)" in found["results"]["data"]
