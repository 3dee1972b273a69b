"""What ``pbkd pick`` says: limits from text, the table of versions, and why it is this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pbkd.artifacts import Workspace
from pbkd.config import Figure, Limit, load_params, parse_limit
from pbkd.errors import ConfigError, TrackingError
from pbkd.measure import this_machine
from pbkd.report import Table
from pbkd.report.numbers import count_text, ms_text, size_text
from pbkd.tracking.aliases import is_ours
from pbkd.tracking.fetch import open_registry
from pbkd.tracking.pick import Comparison, Entry, Miss, Wanted, compare
from pbkd.tracking.versions import PYTORCH, ModelVersion, Setting, present_origin, read_versions

_NEAREST = 3  # versions that are named where nothing fits
_UNKNOWN = "not recorded"
_RUNTIMES = {
    PYTORCH: "PyTorch",
    "onnxruntime": "onnxruntime",
    "onnxruntime-int8": "onnxruntime in int8",
}


@dataclass(frozen=True)
class Answer:
    """The table of versions, sentences that explain the choice, and the choice.

    ``version`` is None where nothing fits; the sentences then say what is nearest.
    """

    table: Table
    sentences: tuple[str, ...]
    version: ModelVersion | None


def wanted_from(
    limits: Mapping[Figure, str | None],
    min_accuracy: str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    runtime: str = PYTORCH,
) -> Wanted:
    """Read limits as a user writes them: ``25%`` of the teacher's, ``1MB``, ``5ms``, ``0.9``.

    The last three say which latency counts; see ``Wanted``.

    Raises:
        ConfigError: one cannot be read.
    """
    parsed: dict[Figure, Limit] = {}
    for figure, text in limits.items():
        if text is None:
            continue
        try:
            parsed[figure] = parse_limit(text, figure)
        except ValueError as error:
            raise ConfigError(f"--max-{figure}: got `{text}`, {error}") from None
    if runtime not in _RUNTIMES:
        raise ConfigError(f"--runtime: got `{runtime}`, expected one of {', '.join(_RUNTIMES)}")
    return Wanted(parsed, _accuracy(min_accuracy), batch_size, threads, runtime)


def _accuracy(text: str | None) -> float | None:
    if text is None:
        return None
    stripped = text.strip()
    try:
        value = float(stripped.removesuffix("%")) / (100 if stripped.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(
            f"--min-accuracy: got `{text}`, expected an accuracy from 0 to 1, or in percent, such "
            "as 0.9 or 90%"
        )
    return value


def model_name(workspace: Workspace, given: str | None) -> str:
    """The model's name in the registry: the given one, else that of params.yaml."""
    if given is not None:
        return given
    if not workspace.params.is_file():
        raise ConfigError(f"there is no params.yaml in {workspace.root}; give --name MODEL")
    return load_params(workspace.params).register_.name


def pick(workspace: Workspace, name: str, wanted: Wanted) -> Answer:
    """Choose among the registered versions of a model; needs the registry alone.

    Raises:
        TrackingError: there is no registry, or no such model in it.
        ConfigError: a limit is a share of a teacher's figure that is not on record.
    """
    client = open_registry(workspace)
    versions = read_versions(client, name)
    if not versions:
        raise TrackingError(f"{name} has no version that pbkd registered; run: pbkd register")
    machine_id = this_machine().machine_id
    found = compare(versions, present_origin(client, versions), wanted, machine_id)
    return Answer(
        table=_table(name, found),
        sentences=_sentences(found, wanted, machine_id),
        version=found.chosen.version if found.chosen is not None else None,
    )


def check_alias(alias: str | None) -> None:
    """Refuse aliases that `register` moves; MLflow itself refuses names that it cannot take."""
    if alias is not None and is_ours(alias):
        raise ConfigError(
            f"--alias {alias}: `pbkd register` moves this one by its own rule; take another name"
        )


def move_alias(workspace: Workspace, version: ModelVersion, alias: str) -> None:
    """Let an alias of the registered model point to a version.

    Raises:
        TrackingError: the registry refuses.
    """
    check_alias(alias)
    client: Any = open_registry(workspace)
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_alias(version.name, alias, str(version.number))
    except MlflowException as error:
        raise TrackingError(f"the registry does not take alias `{alias}`: {error}") from None


# ---------------------------------------------------------------- texts


def _table(name: str, found: Comparison) -> Table:
    teacher = () if found.teacher is None else (found.teacher,)
    rows = tuple(_row(entry, found) for entry in (*teacher, *found.students))
    latency = f"latency, {found.setting}" if found.setting is not None else "latency"
    heads = ("version", "", "validation", "test", "parameters", "MACs", "file", latency, "")
    return Table(f"Versions of {name}", heads, rows)


def _row(entry: Entry, found: Comparison) -> tuple[str, ...]:
    version = entry.version
    if entry is found.teacher:
        verdict = "not a student"
    elif entry is found.chosen:
        verdict = "chosen"
    else:
        verdict = "; ".join(map(_miss, entry.misses)) or "within all limits"
    return (
        str(version.number),
        version.student,
        _percent(version.figure("val_accuracy")),
        _percent(version.figure("test_accuracy")),
        _text("parameters", version.figure("num_parameters")),
        _text("macs", version.figure("macs")),
        _text("bytes", version.figure("file_bytes")),
        _text("latency", entry.latency_ms),
        verdict,
    )


def _miss(miss: Miss) -> str:
    label = "MACs" if miss.figure == "macs" else miss.figure
    if miss.value is None:
        return f"{label} {'not measured here' if miss.figure == 'latency' else _UNKNOWN}"
    assert miss.limit is not None
    if miss.figure == "accuracy":
        return f"accuracy {100 * (miss.limit - miss.value):.2f} points too low"
    return f"{label} {miss.excess:.1%} over {_text(miss.figure, miss.limit)}"


def _sentences(found: Comparison, wanted: Wanted, machine_id: str) -> tuple[str, ...]:
    notes = list(_notes(found, machine_id))
    if found.chosen is None:
        return (_nothing(found, wanted), *notes)
    version = found.chosen.version
    num_fitting = sum(not entry.misses for entry in found.students)
    those = f"of the {num_fitting} students" if num_fitting > 1 else "the only student"
    if found.rule == "bytes":
        kept = f"with at least {_percent(wanted.min_accuracy)} on the validation split"
        why = f"the smallest file {those} {kept}" if num_fitting > 1 else f"{those} {kept}"
    else:
        within = f"within the limits ({_limits(found, wanted)})" if _limits(found, wanted) else ""
        why = f"the most accurate {those} {within}" if num_fitting > 1 else f"{those} {within}"
    latency = found.chosen.latency_ms
    figures = [
        f"{_percent(version.figure('val_accuracy'))} on the validation split",
        f"{_percent(version.figure('test_accuracy'))} on the test split",
        _text("bytes", version.figure("file_bytes")),
        *([_text("latency", latency)] if latency is not None else []),
    ]
    lead = f"Version {version.number}, `{version.student}`, is {why.strip()}"
    return (f"{lead}: {', '.join(figures)}.", *notes)


def _nothing(found: Comparison, wanted: Wanted) -> str:
    if not found.students:
        return "no student of the present teacher is registered; run: pbkd register"
    nearest = [
        f"version {entry.version.number} `{entry.version.student}` "
        f"({'; '.join(map(_miss, entry.misses))})"
        for entry in found.nearest[:_NEAREST]
    ]
    return (
        f"no version is within the limits ({_limits(found, wanted)}); nearest: "
        f"{', '.join(nearest)}; relax a limit, or add a budget to stitch.students and run: pbkd run"
    )


def _limits(found: Comparison, wanted: Wanted) -> str:
    parts = [
        f"{'MACs' if figure == 'macs' else figure} at most {_text(figure, limit)}"
        for figure, limit in found.limits.items()
    ]
    if wanted.min_accuracy is not None:
        parts.append(f"accuracy at least {_percent(wanted.min_accuracy)}")
    return ", ".join(parts)


def _notes(found: Comparison, machine_id: str) -> list[str]:
    notes = []
    if "latency" in found.limits and found.setting is not None:
        notes.append(_which_latency(found.setting))
    if found.teacher is not None and not found.teacher.misses and found.limits:
        notes.append("The teacher itself is within the limits.")
    if "latency" in found.limits:
        others = sorted(
            {
                latency.machine
                for entry in found.students
                for key, latency in entry.version.latency.items()
                if machine_id not in entry.version.latency and key != machine_id
            }
        )
        unmeasured = sum(entry.latency_ms is None for entry in found.students)
        if unmeasured:
            where = f" (but on: {'; '.join(others)})" if others else ""
            notes.append(
                f"{unmeasured} of {len(found.students)} students have no latency of this "
                f"machine{where}; only such ones compare: run here `pbkd evaluate --remeasure` and "
                "`pbkd register`."
            )
    if found.left_out:
        notes.append(
            f"Left out: {found.left_out} version{'s' if found.left_out > 1 else ''} of other data "
            "or of another teacher."
        )
    return notes


def _which_latency(setting: Setting) -> str:
    where = setting._replace(runtime=PYTORCH)
    note = f"Latency is that of {_RUNTIMES[setting.runtime]}, {where}."
    if setting.runtime == "onnxruntime-int8":
        note += " All other figures are of the float32 model."
    return note


def _percent(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.2%}"


def _text(figure: Figure, value: float | None) -> str:
    if value is None:
        return "not measured here" if figure == "latency" else _UNKNOWN
    if figure == "latency":
        return ms_text(value)
    return size_text(value) if figure == "bytes" else count_text(value)
