"""What a run leaves in Prefect beside its tasks: artifacts of the flow run, kept up to date.

Each is an HTTP call, so that a thread sends them, at most one a second; one that fails costs a
warning, never the run. Prefect's pages draw neither Mermaid nor what a ``file://`` link names: the
plan is drawn as text, and paths are named.
"""

from __future__ import annotations

import contextvars
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self
from uuid import UUID

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext

from flows.status import WORDS, CandidateStatus, Phase, seconds_text
from pbkd.artifacts import Workspace
from pbkd.plan import Plan
from pbkd.redaction import without_secrets
from pbkd.report import (
    REPORT,
    Table,
    block_phase_sentence,
    final_table,
    read_measured,
    read_metrics,
    summary_sentence,
)
from pbkd.report.plan import feed_of
from pbkd.report.plan_plots import durations_s
from pbkd.report.tables import counted
from pbkd.settings import Settings
from pbkd.tracking import PipelineRun
from pbkd.tracking.mlflow_run import tracking_uri

log = logging.getLogger(__name__)

_FOR_MODELS = "workflowType=machine_learning"
"""MLflow's pages open as those for language models otherwise."""

_PERIOD_S = 1.0
_AFTER_FAILURE_S = 30.0
_PATIENCE_S = 5.0  # how long the end of a run waits for the last ones
_WIDTH = 64  # of a chart, in characters

Kind = Literal["progress", "table", "markdown"]


@dataclass(frozen=True)
class Artifact:
    """What is to be shown under a key; ``data`` as Prefect's API takes it."""

    kind: Kind
    data: str | float
    description: str | None = None


class Feed:
    """Sends the latest state of each artifact; a context manager, within a flow run.

    What is replaced before its turn is never sent. Outside of a flow run nothing is.

    Args:
        period_s: seconds between two calls, at least; the last states go at once.
    """

    def __init__(self, period_s: float = _PERIOD_S) -> None:
        self._period_s = period_s
        self._wanted: dict[str, Artifact] = {}
        self._ids: dict[str, UUID] = {}
        self._condition = threading.Condition()
        self._is_closed = False
        self._has_failed = False
        self._flow_run_id: UUID | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            return self
        self._flow_run_id = context.flow_run.id
        # the thread's own log lines belong to the flow run
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._send_all,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        # Ctrl-C is not kept waiting
        if self._thread is not None and (error is None or isinstance(error, Exception)):
            self._thread.join(_PATIENCE_S)

    def show(self, key: str, artifact: Artifact) -> None:
        """Let the artifact of a key be this one soon; returns at once."""
        with self._condition:
            self._wanted[key] = artifact  # in its place in the queue, if it waits already
            self._condition.notify_all()

    def _send_all(self) -> None:
        with get_client(sync_client=True) as client:
            while (item := self._next()) is not None:
                self._send(client, *item)
                with self._condition:
                    pause_s = _AFTER_FAILURE_S if self._has_failed else self._period_s
                    self._condition.wait_for(lambda: self._is_closed, pause_s)
                    if self._is_closed and self._has_failed:
                        return

    def _next(self) -> tuple[str, Artifact] | None:
        """The next one; None: there is none left, and no more will come."""
        with self._condition:
            self._condition.wait_for(lambda: bool(self._wanted) or self._is_closed)
            if not self._wanted:
                return None
            key = next(iter(self._wanted))
            return key, self._wanted.pop(key)

    def _send(self, client: SyncPrefectClient, key: str, artifact: Artifact) -> None:
        try:
            if key in self._ids:
                update = ArtifactUpdate(data=artifact.data, description=artifact.description)
                client.update_artifact(self._ids[key], update)
            else:
                made = client.create_artifact(
                    ArtifactCreate(
                        key=key,
                        type=artifact.kind,
                        data=artifact.data,
                        description=artifact.description,
                        flow_run_id=self._flow_run_id,
                    )
                )
                self._ids[key] = made.id
            self._has_failed = False
        except Exception as error:  # noqa: BLE001  what is shown must not fail what is done
            if not self._has_failed:
                log.warning("Prefect does not take artifact %s: %s", key, error)
            self._has_failed = True


# ---------------------------------------------------------------- the block phase


def progress_of(phase: Phase) -> Artifact:
    """The share of all epochs."""
    return Artifact("progress", 100 * phase.share(), "Share of all epochs of all blocks")


def blocks_table(phase: Phase, now_s: float) -> Artifact:
    """A row per candidate, those of a block together.

    Args:
        now_s: the status's time.
    """
    rows = [_row(c, phase.max_epochs, now_s) for b in phase.blocks for c in b.candidates]
    counts = ", ".join(f"{count} {WORDS[state]}" for state, count in phase.counts.items())
    description = (
        f"{len(phase.blocks)} blocks: {counts}. The loss is the latest on the validation images, "
        "the best one once a candidate is done. Damage (KL, nats) and accuracy drop (percentage "
        "points) are what the teacher suffers when only this block is replaced."
    )
    return Artifact("table", json.dumps(rows), description)


def _row(candidate: CandidateStatus, max_epochs: int, now_s: float) -> dict[str, str]:
    took_s = candidate.duration_s(now_s)
    epochs = f"{candidate.num_epochs} of {max_epochs}" if candidate.state != "stored" else ""
    kl, drop = candidate.damage_kl, candidate.accuracy_drop
    return {
        "block": candidate.block,
        "candidate": candidate.name,
        "state": WORDS[candidate.state],
        "worker": candidate.worker or "",
        "epochs": epochs,
        "loss": "" if candidate.val_loss is None else f"{candidate.val_loss:.3g}",
        "damage": "" if kl is None else f"{kl:.3g}",
        "accuracy drop": "" if drop is None else f"{100 * drop:.2f}",
        "time": "" if took_s is None else seconds_text(took_s),
    }


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Bar:
    """A job in a chart: its number, and seconds from the chart's zero."""

    number: str
    start_s: float
    duration_s: float


def planned_bars(plan: Plan, speeds: Sequence[float]) -> dict[str, list[Bar]]:
    """The bars of a plan per worker, "worker 1" and on.

    Args:
        speeds: of the plan's workers.
    """
    durations = durations_s(plan, speeds)
    return {
        f"worker {number}": [
            Bar(
                job_number(plan.jobs[index].job_id),
                plan.fill_s + plan.placement.starts_s[index],
                durations[index],
            )
            for index in indices
        ]
        for number, indices in enumerate(plan.placement.workers, start=1)
    }


def job_number(job_id: str) -> str:
    """ "7" for "job-007"."""
    return str(int(job_id.removeprefix("job-")))


def gantt_text(rows: Mapping[str, Sequence[Bar]], last_s: float, width: int = _WIDTH) -> str:
    """A Gantt chart as lines of text: a row per worker, a bar per job that begins with its number.

    In ASCII: in the font of Prefect's pages other characters have other widths.

    Args:
        last_s: what the right end of the axis stands for, in seconds.
        width: of the axis, in characters.
    """
    head = max((len(name) for name in rows), default=0)
    scale = width / last_s if last_s > 0 else 0.0
    lines = []
    for name, bars in rows.items():
        line = ""
        for bar in sorted(bars, key=lambda bar: bar.start_s):
            line = line.ljust(round(bar.start_s * scale))
            length = max(1, round((bar.start_s + bar.duration_s) * scale) - len(line))
            # a gap between two bars, but for bars that would vanish
            fill = "=" * length if length < 3 else "=" * (length - 1) + " "
            fits = len(bar.number) < length
            line += bar.number + fill[len(bar.number) :] if fits else fill
        lines.append(f"{name:<{head}} |{line:<{width}}|")
    end = seconds_text(last_s)
    lines.append(f"{'':<{head}}  0 s{end:>{width - 3}}")
    return "\n".join(lines)


def plan_markdown(
    plan: Plan,
    speeds: Sequence[float],
    wall_s: float | None,
    ran: Mapping[str, Sequence[Bar]] | None = None,
) -> Artifact:
    """The plan as a chart and a table of its jobs, and beside it how they ran.

    Args:
        speeds: of the plan's workers.
        wall_s: predicted time of the phase, the scores included, in seconds.
        ran: slot to the jobs that it finished; None: the phase is not over.
    """
    planned = planned_bars(plan, speeds)
    ran_s = max(
        (b.start_s + b.duration_s for bars in (ran or {}).values() for b in bars), default=0
    )
    last_s = max(plan.wall_s, ran_s)
    told = "" if wall_s is None else f" in {seconds_text(wall_s)}, predicted"
    jobs, workers = counted(len(plan.jobs), "job"), counted(len(planned), "worker")
    lines = [f"**{jobs} on {workers}{told}.** {plan.bottleneck[:1].upper()}{plan.bottleneck[1:]}."]
    lines += ["", "```text", gantt_text(planned, last_s), "```"]
    if ran:
        lines += ["", f"**As it ran**, {seconds_text(ran_s)}:"]
        lines += ["", "```text", gantt_text(dict(sorted(ran.items())), last_s), "```"]
    durations = durations_s(plan, speeds)
    took = {b.number: seconds_text(b.duration_s) for bars in (ran or {}).values() for b in bars}
    rows = []
    for job, duration_s in zip(plan.jobs, durations, strict=True):
        number = job_number(job.job_id)
        figures = (number, feed_of(job), seconds_text(duration_s))
        took_by = (took.get(number, ""),) if ran else ()
        rows.append((*figures, *took_by, str(len(job.trainees)), _shortened(job.blocks)))
    heads = ("job", "source", "predicted", *(("took",) if ran else ()), "candidates", "of blocks")
    lines += ["", markdown_table(Table("", heads, tuple(rows)))]
    description = "Which worker trains what, and when; an idle worker takes the next job"
    return Artifact("markdown", "\n".join(lines), description)


def _shortened(names: Sequence[str], num_shown: int = 4) -> str:
    if len(names) <= num_shown + 1:
        return ", ".join(names)
    return f"{', '.join(names[:num_shown])} and {len(names) - num_shown} more"


# ---------------------------------------------------------------- results and where they are


def markdown_table(table: Table) -> str:
    """A table of the report in Markdown; the first column to the left, the others to the right."""
    rows = [table.heads, tuple(":--" if i == 0 else "--:" for i in range(len(table.heads)))]
    rows += [tuple(cell.replace("|", "\\|") for cell in row) for row in table.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mlflow_line(workspace: Workspace, run: PipelineRun) -> str:
    """Where the run is in MLflow: a link, or the command that shows a local store."""
    uri = tracking_uri(workspace)
    page = f"#/experiments/{run.experiment_id}/runs/{run.run_id}?{_FOR_MODELS}"
    is_server = uri.startswith(("http://", "https://"))
    if server := uri if is_server else Settings.from_env().mlflow_url:
        return f"MLflow: [run {run.run_id}]({without_secrets(server).rstrip('/')}/{page})"
    return (
        f"MLflow: run `{run.run_id}`; start `mlflow server --backend-store-uri "
        f"{without_secrets(uri)}`, then open `http://127.0.0.1:5000/{page}`"
    )


def mlflow_artifact(workspace: Workspace, run: PipelineRun) -> Artifact:
    """Where the series of losses are while they grow."""
    return Artifact("markdown", mlflow_line(workspace, run), "The run in MLflow")


def results_markdown(workspace: Workspace, run: PipelineRun) -> str:
    """Teacher against students, what the block phase gained, and where the rest is.

    Raises:
        ArtifactError: `evaluate` has not run.
    """
    metrics, measured = read_metrics(workspace.results), read_measured(workspace.results)
    return "\n\n".join(
        [
            f"**{summary_sentence(metrics, measured)}**",
            markdown_table(final_table(metrics, measured)),
            block_phase_sentence(measured),
            f"- Report: `{workspace.results / REPORT}` (open it in a browser)\n"
            f"- {mlflow_line(workspace, run)}",
        ]
    )


def publish_results(workspace: Workspace, run: PipelineRun) -> None:
    """Show the results of a finished run in Prefect; a failure is a warning."""
    try:
        create_markdown_artifact(
            results_markdown(workspace, run),
            key="results",
            description="Teacher against students, and where the report is",
        )
    except Exception as error:  # noqa: BLE001  the run itself has ended well
        log.warning("Prefect does not take artifact results: %s", error)
