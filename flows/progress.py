"""What a running block phase tells: to the run's status, to Prefect's artifacts, to MLflow.

The jobs write histories; a thread here reads them as they grow. No job knows who watches. Elastic
teachers are an artifact in Prefect, too.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from prefect.artifacts import create_table_artifact
from prefect.context import TaskRunContext

from flows.artifacts import Feed, blocks_table, progress_of
from flows.status import CandidateStatus, RunStatus
from pbkd.artifacts import Store
from pbkd.blocks import candidate_name
from pbkd.distill.trainee import HistoryLine, TraineeSpec, read_history
from pbkd.elastic.status import TeachersStatus
from pbkd.errors import TrackingError
from pbkd.report.teachers import teacher_lines, teacher_table
from pbkd.stages.distill import read_trainee
from pbkd.stages.planning import is_done
from pbkd.tracking import PipelineRun
from pbkd.tracking.mlflow_run import BlockRun

log = logging.getLogger(__name__)

_PERIOD_S = 0.5
_SHARE_PERIOD_S = 2.0
_TABLE_PERIOD_S = 5.0
_TEACHERS_PERIOD_S = 10.0  # each time a version of the artifact


class Monitor:
    """Follows trainees until the block ends; a context manager.

    Args:
        trainees: those that will be trained now.
        progress: folder of the growing histories.
        status: has them all, in a phase that has begun.
        feed: takes their artifacts.
    """

    def __init__(
        self,
        trainees: list[TraineeSpec],
        progress: Path,
        store: Store,
        run: PipelineRun,
        status: RunStatus,
        feed: Feed,
    ) -> None:
        self._trainees = trainees
        self._progress = progress
        self._store = store
        self._run = run
        self._status = status
        self._feed = feed
        self._block_runs: dict[str, BlockRun] = {}
        self._seen: dict[str, int] = {}
        self._done: set[str] = set()
        self._stop = threading.Event()
        self._shown_s = {"share": float("-inf"), "table": float("-inf")}
        self._tracking_failed = False

    def __enter__(self) -> Self:
        for trainee in self._trainees:  # a history of a killed run would look like progress
            self._history_path(trainee).unlink(missing_ok=True)
        # the thread needs the flow run's context: its loggers
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._follow,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        for trainee in self._trainees:  # what is finished has its history in the store
            if trainee.key in self._done:
                self._history_path(trainee).unlink(missing_ok=True)

    def _follow(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self._look()
            self._show(_SHARE_PERIOD_S, _TABLE_PERIOD_S)
        self._look()
        self._show(0.0, 0.0)

    def _look(self) -> None:
        for trainee in self._trainees:
            if trainee.key in self._done:
                continue
            is_finished = is_done(self._store, trainee)
            history = read_history(self._history_path(trainee))
            seen = self._seen.get(trainee.key, 0)
            if len(history) < seen:  # a retry began again
                seen = 0
            self._log_lines(trainee, history[seen:])
            self._seen[trainee.key] = len(history)
            if history or self._history_path(trainee).is_file():
                self._status.begin(trainee.name)
            if history[seen:]:  # the first line is of before the first epoch
                self._status.advance(trainee.name, len(history) - 1, history[-1].val_loss)
            if is_finished:
                self._done.add(trainee.key)
                self._finish(trainee)

    def _log_lines(self, trainee: TraineeSpec, lines: list[HistoryLine]) -> None:
        if not lines or self._tracking_failed:
            return
        name = candidate_name(trainee.config)
        try:
            if trainee.block not in self._block_runs:
                self._block_runs[trainee.block] = self._run.block_run(trainee.block)
            for line in lines:
                losses = {"train_loss": line.train_loss, "val_loss": line.val_loss}
                self._block_runs[trainee.block].log_loss(name, line.epoch, losses)
        except TrackingError as error:  # the training goes on; the histories are on disk
            self._tracking_failed = True
            log.warning("series are no longer logged: %s", error)

    def _finish(self, trainee: TraineeSpec) -> None:
        item = read_trainee(self._store, trainee)
        self._status.finish(
            trainee.name,
            item.result.num_epochs,
            item.result.best_val_loss,
            item.damage.kl,
            item.damage.accuracy_drop,
            item.result.finished_at - item.result.started_at,
        )

    def _show(self, share_period_s: float, table_period_s: float) -> None:
        now_s, phase = self._status.now_s(), self._status.phase
        if phase is None:
            return
        if now_s - self._shown_s["share"] >= share_period_s:
            self._shown_s["share"] = now_s
            self._feed.show("block-progress", progress_of(phase))
        if now_s - self._shown_s["table"] >= table_period_s:
            self._shown_s["table"] = now_s
            self._feed.show("blocks", blocks_table(phase, now_s))

    def _history_path(self, trainee: TraineeSpec) -> Path:
        return self._progress / f"{trainee.key}.jsonl"


def candidates_of(trainees: list[TraineeSpec], store: Store) -> list[CandidateStatus]:
    """What is known of all trainees before any job: the figures of those that the store holds."""
    known = []
    for trainee in trainees:
        candidate = CandidateStatus(trainee.block, candidate_name(trainee.config))
        if is_done(store, trainee):
            item = read_trainee(store, trainee)
            candidate = replace(
                candidate,
                state="stored",
                num_epochs=item.result.num_epochs,
                val_loss=item.result.best_val_loss,
                damage_kl=item.damage.kl,
                accuracy_drop=item.damage.accuracy_drop,
                training_s=item.result.finished_at - item.result.started_at,
            )
        known.append(candidate)
    return known


def teachers_artifact() -> Callable[[TeachersStatus], None]:
    """What shows elastic teachers as a table in Prefect, now and then; outside a task nothing."""
    shown_s = float("-inf")

    def show(status: TeachersStatus) -> None:
        nonlocal shown_s
        if TaskRunContext.get() is None or time.monotonic() - shown_s < _TEACHERS_PERIOD_S:
            return
        shown_s = time.monotonic()
        table = teacher_table(status)
        create_table_artifact(
            key="elastic-teachers",
            table=[dict(zip(table.heads, row, strict=True)) for row in table.rows],
            description="\n".join(teacher_lines(status)),
        )

    return show


def log_figures(trainees: list[TraineeSpec], store: Store, run: PipelineRun) -> None:
    """Close each block's child run with the figures of its candidates, trained now or earlier."""
    for block in _counts(trainees):
        figures: dict[str, float | None] = {}
        finished = [t for t in trainees if t.block == block and is_done(store, t)]
        for trainee in finished:
            item, name = read_trainee(store, trainee), candidate_name(trainee.config)
            figures[f"{name}/best_val_loss"] = item.result.best_val_loss
            figures[f"{name}/damage_kl"] = item.damage.kl
            figures[f"{name}/accuracy_drop"] = item.damage.accuracy_drop
            figures[f"{name}/training_s"] = item.result.finished_at - item.result.started_at
        expected = sum(t.block == block for t in trainees)
        run.block_run(block).end(figures, failed=len(finished) < expected)


def _counts(trainees: list[TraineeSpec]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for trainee in trainees:
        counts[trainee.block] = counts.get(trainee.block, 0) + 1
    return counts
