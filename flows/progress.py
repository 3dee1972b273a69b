"""What a running block phase shows: bars in the terminal, an artifact in Prefect, series in MLflow.

The jobs write histories; a thread here reads them as they grow. No job knows who watches. Elastic
teachers are an artifact in Prefect, too.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from prefect.artifacts import (
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import TaskRunContext
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
_ARTIFACT_PERIOD_S = 2.0
_TEACHERS_PERIOD_S = 10.0  # each time a version of the artifact


class Monitor:
    """Follows trainees until the block ends; a context manager.

    Args:
        trainees: those that will be trained now.
        progress: folder of the growing histories.
        num_epochs: at most, per trainee.
    """

    def __init__(
        self,
        trainees: list[TraineeSpec],
        progress: Path,
        num_epochs: int,
        store: Store,
        run: PipelineRun,
    ) -> None:
        self._trainees = trainees
        self._progress = progress
        self._num_epochs = num_epochs
        self._store = store
        self._run = run
        self._block_runs: dict[str, BlockRun] = {}
        self._seen: dict[str, int] = {}
        self._done: set[str] = set()
        self._stop = threading.Event()
        self._bars = _bars()
        self._bar_ids = {
            block: self._bars.add_task(block, total=num_epochs * count, loss="")
            for block, count in _counts(trainees).items()
        }
        self._artifact: Any = None
        self._artifact_time = 0.0
        self._tracking_failed = False

    def __enter__(self) -> Self:
        for trainee in self._trainees:  # a history of a killed run would look like progress
            self._history_path(trainee).unlink(missing_ok=True)
        self._artifact = create_progress_artifact(
            progress=0.0, key="block-progress", description="Share of all epochs of all blocks"
        )
        self._bars.start()
        # the thread needs the flow run's context: its client and its loggers
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
        self._bars.stop()
        for trainee in self._trainees:  # what is finished has its history in the store
            if trainee.key in self._done:
                self._history_path(trainee).unlink(missing_ok=True)

    def _follow(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self._look()
        self._look()
        self._show_artifact()

    def _look(self) -> None:
        for trainee in self._trainees:
            if trainee.key in self._done:
                continue
            finished = is_done(self._store, trainee)
            history = read_history(self._history_path(trainee))
            seen = self._seen.get(trainee.key, 0)
            if len(history) < seen:  # a retry began again
                seen = 0
            self._log_lines(trainee, history[seen:])
            self._seen[trainee.key] = len(history)
            if finished:
                self._done.add(trainee.key)
            self._show_bar(trainee.block, history)
        if time.monotonic() - self._artifact_time >= _ARTIFACT_PERIOD_S:
            self._show_artifact()

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

    def _show_bar(self, block: str, history: list[HistoryLine]) -> None:
        epochs = sum(self._epochs(t) for t in self._trainees if t.block == block)
        last = history[-1].val_loss if history else None
        loss = "" if last is None else f"loss {last:.4f}"
        self._bars.update(self._bar_ids[block], completed=epochs, loss=loss)

    def _epochs(self, trainee: TraineeSpec) -> int:
        """Epochs behind a trainee; one that stopped early counts as through."""
        if trainee.key in self._done:
            return self._num_epochs
        return max(0, self._seen.get(trainee.key, 0) - 1)

    def _show_artifact(self) -> None:
        self._artifact_time = time.monotonic()
        total = self._num_epochs * len(self._trainees)
        share = sum(map(self._epochs, self._trainees)) / total if total else 1.0
        if isinstance(self._artifact, UUID):
            update_progress_artifact(self._artifact, progress=100 * share)

    def _history_path(self, trainee: TraineeSpec) -> Path:
        return self._progress / f"{trainee.key}.jsonl"


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


def _bars() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        disable=not console.is_terminal,
    )
