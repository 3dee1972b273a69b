"""The MLflow record of a pipeline run: parameters, a child run per block, series, figures.

The stages of one pipeline run may be processes of their own (``dvc repro``); they find the same run
through a file in the state folder that names the run and the process that drives it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel

from pbkd._version import __version__
from pbkd.artifacts import Workspace, digest_of, read_json, write_json
from pbkd.config import Params
from pbkd.errors import MissingExtraError, TrackingError
from pbkd.redaction import without_secrets
from pbkd.tracking.lineage import commit_of
from pbkd.tracking.local_store import make_store
from pbkd.tracking.system_metrics import watch_machine

_log = logging.getLogger(__name__)

EXPERIMENT = "pbkd"

_URI = "MLFLOW_TRACKING_URI"

_MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a URL with the password in it
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # 7 by default: minutes until a wrong URI is told
}


def tracking_uri(workspace: Workspace) -> str:
    """MLFLOW_TRACKING_URI, else a sqlite file in the state folder.

    Raises:
        TrackingError: no URI can name that file.
    """
    return os.environ.get(_URI) or f"sqlite:///{_database(workspace)}"


def prepare_store(workspace: Workspace) -> None:
    """Make the sqlite file, if that is the store and it is missing.

    Raises:
        MissingExtraError: MLflow is not installed. TrackingError: no URI can name the file.
    """
    for name, value in _MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not os.environ.get(_URI):
        try:
            make_store(_database(workspace), _artifacts(workspace))
        except ImportError:
            raise MissingExtraError("mlflow", "pipeline", "tracking") from None


def _database(workspace: Workspace) -> Path:
    return _checked(workspace.state / "mlflow.db", r"\?|%[0-9a-fA-F]{2}")


def _artifacts(workspace: Workspace) -> Path:
    return _checked(workspace.state / "mlartifacts", r"%[0-9a-fA-F]{2}")


def _checked(path: Path, misread: str) -> Path:
    """The path, unless it holds what MLflow takes for a part of a URI."""
    if found := re.search(misread, str(path)):
        raise TrackingError(
            f"MLflow cannot use {path}: it misreads `{found[0]}`; move the workspace, or set "
            "PBKD_STATE_DIR to another folder, or MLFLOW_TRACKING_URI to a server"
        )
    return path


def mlflow_client(workspace: Workspace) -> Any:
    """A client of the tracking store; sets the store for MLflow's own functions, too.

    Raises:
        MissingExtraError: MLflow is not installed.
        TrackingError: the store cannot be reached.
    """
    workspace.state.mkdir(parents=True, exist_ok=True)
    prepare_store(workspace)
    try:
        import mlflow
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        raise MissingExtraError("mlflow", "pipeline", "tracking") from None
    uri = _with_login_apart(tracking_uri(workspace))
    given = os.environ.get(_URI)
    mlflow.set_tracking_uri(uri)
    if given is None:  # MLflow sets it; the next workspace must not take it for the user's
        os.environ.pop(_URI, None)
    try:
        client = mlflow.MlflowClient()
        client.search_experiments(max_results=1)
    except (mlflow.exceptions.MlflowException, ImportError) as error:
        raise TrackingError(f"MLflow at {uri} does not answer: {error}") from None
    except SQLAlchemyError as error:
        raise TrackingError(
            f"MLflow cannot use the database {uri}: {getattr(error, 'orig', error)}; if a kill met "
            "its making, delete it"
        ) from None
    return client


def _with_login_apart(uri: str) -> str:
    """A server's URI without name and password, which MLflow then takes from the environment.

    It shows its URI in errors and links, and Prefect records errors.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not (parts.username and parts.password):
        return uri
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password))
    os.environ[_URI] = without_secrets(uri)
    return os.environ[_URI]


class PipelineRun:
    """One pipeline run in MLflow; every process that the same driver started gets the same one."""

    def __init__(self, client: Any, run_id: str, experiment_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self.experiment_id = experiment_id

    @classmethod
    def current(cls, workspace: Workspace, params: Params) -> PipelineRun:
        """The open run of this process's driver: found, or begun.

        A run that an earlier driver left open is ended as killed.

        Raises:
            TrackingError: MLflow cannot be reached, or does not take the parameters.
        """
        client = mlflow_client(workspace)
        from mlflow.exceptions import MlflowException

        path = workspace.state / "pipeline_run.json"
        driver, uri = _driver(), tracking_uri(workspace)
        store = digest_of(uri)  # which may hold a password
        known = read_json(path) if path.is_file() else None
        if known and known.get("store") == store:
            if known["driver"] == driver and _is_open(client, known["run_id"]):
                return cls(client, known["run_id"], known["experiment_id"])
            _end_abandoned(client, known["run_id"])
        experiment_id = _experiment(client, workspace)
        name = f"{params.teacher.model} {time.strftime('%m-%d %H:%M:%S')}"
        run = client.create_run(experiment_id, run_name=name, tags=_source_tags(workspace))
        self = cls(client, run.info.run_id, experiment_id)
        known = {"store": store, "driver": driver, "run_id": self.run_id}
        try:
            self._log_params(self.run_id, _flat(params))
            write_json(path, known | {"experiment_id": experiment_id})
        except BaseException:  # nobody would find the run and end it
            with suppress(MlflowException):
                self.end(failed=True)
            raise
        watch_machine(self.run_id, uri)
        return self

    def log_history(self, stage: str, history: Iterable[Mapping[str, float]]) -> None:
        """A stage's training as series ``stage/figure``; once per run, however often called."""
        kind = stage.partition("/")[0]
        series, tag = stage.removeprefix(f"{kind}/"), f"pbkd.series.{kind}"
        logged = self.client.get_run(self.run_id).data.tags.get(tag, "").split(", ")
        if series in logged:
            return
        points = [
            (f"{stage}/{name}", value, int(line["epoch"]))
            for line in history
            for name, value in line.items()
            if name != "epoch"
        ]
        self._log_points(self.run_id, points)
        self.client.set_tag(self.run_id, tag, ", ".join([*filter(None, logged), series]))

    def log_metrics(self, metrics: Mapping[str, float | None]) -> None:
        """Figures of the whole run; those that could not be measured are left out."""
        self._log_points(self.run_id, [(k, v, 0) for k, v in metrics.items() if v is not None])

    def log_file(self, path: Path) -> None:
        """Keep a file with the run."""
        self.client.log_artifact(self.run_id, str(path))

    def log_text(self, text: str, name: str) -> None:
        """Keep a text with the run, as a file of this name."""
        self.client.log_text(self.run_id, text, name)

    def log_data(self, digest: str) -> None:
        """Say which images the run is about; MLflow shows them in the list of runs."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        name = self.client.get_run(self.run_id).data.params["prepare.source"]
        data = Dataset(name, digest, source_type="pbkd", source=json.dumps({"prepare": name}))
        tags = [InputTag("mlflow.data.context", "distillation")]
        self.client.log_inputs(self.run_id, datasets=[DatasetInput(data, tags)])

    def describe(self, markdown: str) -> None:
        """Set the description on the run's page."""
        self.client.set_tag(self.run_id, "mlflow.note.content", markdown)

    def block_run(self, block: str) -> BlockRun:
        """The child run of a block."""
        return BlockRun(self, self._child_run("pbkd.block", block))

    def model_run(self, budget: str) -> str:
        """Id of the child run of a model.

        MLflow copies a run's figures to the models that are logged in it, so each has its own.
        """
        return self._child_run("pbkd.model", budget)

    def end(self, *, failed: bool = False) -> None:
        """Close the run; one that failed stays visible as such."""
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")

    def _child_run(self, tag: str, name: str) -> str:
        found = self.client.search_runs(
            [self.experiment_id],
            f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.`{tag}` = '{name}'",
            max_results=1,
        )
        tags = {"mlflow.parentRunId": self.run_id, tag: name, "mlflow.runName": name}
        run = found[0] if found else self.client.create_run(self.experiment_id, tags=tags)
        return str(run.info.run_id)

    def _log_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        params = [Param(key, str(value)[:6000]) for key, value in values.items()]
        try:
            self.client.log_batch(run_id, params=params)
        except MlflowException as error:
            raise TrackingError(f"MLflow takes no parameters of run {run_id}: {error}") from error

    def _log_points(self, run_id: str, points: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value, step in points]
        try:
            for start in range(0, len(metrics), 1000):
                self.client.log_batch(run_id, metrics=metrics[start : start + 1000])
        except MlflowException as error:
            raise TrackingError(f"MLflow takes no figures of run {run_id}: {error}") from error


class BlockRun:
    """The child run of one block: a series per candidate, then its figures."""

    def __init__(self, parent: PipelineRun, run_id: str) -> None:
        self._parent = parent
        self._run_id = run_id

    def log_loss(self, candidate: str, epoch: int, losses: Mapping[str, float | None]) -> None:
        """One epoch of one candidate; epoch -1 (before training) becomes MLflow's step 0."""
        points = [
            (f"{candidate}/{name}", value, epoch + 1)
            for name, value in losses.items()
            if value is not None
        ]
        self._parent._log_points(self._run_id, points)

    def end(self, figures: Mapping[str, float | None], *, failed: bool = False) -> None:
        """Log the final figures and close the run."""
        points = [(key, value, 0) for key, value in figures.items() if value is not None]
        self._parent._log_points(self._run_id, points)
        self._parent.client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


def _driver() -> str:
    """The process that drives this pipeline run: the nearest ``dvc`` above, else this one."""
    import psutil

    process = psutil.Process()
    if "DVC_STAGE" in os.environ:
        for parent in process.parents():
            if any(Path(word).name == "dvc" for word in parent.cmdline()[:3]):
                process = parent
                break
    return f"{process.pid}-{process.create_time():.0f}"


def _experiment(client: Any, workspace: Workspace) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        is_local = tracking_uri(workspace).startswith("sqlite:")
        location = _artifacts(workspace).as_uri() if is_local else None
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=location))
        except MlflowException:  # another workspace was faster
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the experiment `{EXPERIMENT}` was deleted in MLflow; `mlflow experiments restore "
            f"--experiment-id {found.experiment_id}` brings it back"
        )
    return str(found.experiment_id)


def _is_open(client: Any, run_id: str) -> bool:
    """Whether a run goes on; one that the store does not know (any more) does not."""
    import mlflow

    try:
        return bool(client.get_run(run_id).info.status == "RUNNING")
    except mlflow.exceptions.MlflowException as error:
        _log.debug("run %s cannot be read: %s", run_id, without_secrets(str(error)))
        return False


def _end_abandoned(client: Any, run_id: str) -> None:
    if _is_open(client, run_id):
        client.set_terminated(run_id, "KILLED")


def _source_tags(workspace: Workspace) -> dict[str, str]:
    """Whose run it is, of what; MLflow's pages show these tags as source and author."""
    from mlflow.tracking.context.registry import resolve_tags

    tags = {
        "pbkd.workspace": digest_of(str(workspace.root))[:8],
        "mlflow.source.name": f"pbkd {__version__}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit_of(workspace),
        "mlflow.user": resolve_tags().get("mlflow.user", ""),
    }
    return {key: value for key, value in tags.items() if value}


def _flat(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Settings by their names in params.yaml; a mapping stays whole, as JSON.

    Its keys are the user's, and MLflow takes no globs in names.
    """
    dumped = section.model_dump(mode="json", by_alias=True, exclude_none=True)
    flat: dict[str, Any] = {}
    for field, info in type(section).model_fields.items():
        name, value = info.alias or field, getattr(section, field)
        if isinstance(value, BaseModel):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            flat[prefix + name] = json.dumps(dumped[name], ensure_ascii=False)
        else:
            flat[prefix + name] = dumped.get(name)
    return flat
