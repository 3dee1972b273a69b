"""Two runs side by side: figures, settings that differ, and both Pareto fronts in one picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pbkd.report import pareto
from pbkd.report.family import summary_sentence
from pbkd.report.numbers import count_text, size_text
from pbkd.report.results import ModelFigures
from pbkd.report.runs import Run
from pbkd.report.tables import Table
from pbkd.report.template import fill

COMPARISON = "compare.html"

_ABSENT = "-"
_FILE_SIZE = pareto.Axis("file size", "file size", size_text)


def comparison_table(before: Run, after: Run) -> Table:
    """Teacher and students of both; each cell is before, after, and the change.

    Speed is told against the run's own teacher, whose latency was measured in turns with the
    student's, and only where one machine measured both runs, with the same batches and threads.
    """
    names = dict.fromkeys(["teacher", *before.metrics.by_size, *after.metrics.by_size])
    latency = latency_is_comparable(before, after)
    heads = ["model", "accuracy (test)", "accuracy (validation)", "file", "parameters", "MACs"]
    if latency:
        heads += [f"speed, batch {e.batch_size}" for e in before.measured.headline["teacher"]]
    rows = []
    for name in names:
        one, two = _model(before, name), _model(after, name)

        def cell(
            figure: Callable[[ModelFigures], float],
            text: Callable[[float], str],
            change: Callable[[float, float], str] = _ratio,
            pair: tuple[ModelFigures | None, ModelFigures | None] = (one, two),
        ) -> str:
            values = [None if model is None else figure(model) for model in pair]
            return _cell(values[0], values[1], text, change)

        cells = [
            cell(lambda model: model.test_accuracy, "{:.2%}".format, _points),
            cell(lambda model: model.val_accuracy, "{:.2%}".format, _points),
            cell(lambda model: model.file_bytes, size_text),
            cell(lambda model: model.num_parameters, count_text),
            cell(lambda model: model.macs, count_text),
        ]
        if latency:
            speeds = [_speeds(run, name) for run in (before, after)]
            for index in range(len(before.measured.headline["teacher"])):
                old, new = (own[index] if own else None for own in speeds)
                cells.append(_cell(old, new, "{:.2f}x".format, _ratio))
        rows.append((name, *cells))
    return Table(f"{before.name} -> {after.name}", tuple(heads), tuple(rows))


def latency_is_comparable(before: Run, after: Run) -> bool:
    """Whether one machine measured both, with equal batches, threads and device."""

    def how(run: Run) -> tuple[object, ...]:
        entries = run.measured.headline["teacher"]
        settings = [(e.batch_size, e.threads, e.device, e.runtime) for e in entries]
        return (run.measured.machine.machine_id, *settings)

    return how(before) == how(after)


def settings_table(before: Run, after: Run) -> Table | None:
    """Values of params.yaml that differ, defaults filled in; None where one run has none."""
    if before.params is None or after.params is None:
        return None
    one, two = (
        dict(_flat(params.model_dump(mode="json", by_alias=True)))
        for params in (before.params, after.params)
    )
    rows = tuple(
        (name, *(json.dumps(own[name]) if name in own else _ABSENT for own in (one, two)))
        for name in dict.fromkeys([*one, *two])
        if one.get(name, _ABSENT) != two.get(name, _ABSENT)
    )
    return Table("Settings that differ", ("params.yaml", before.name, after.name), rows)


def notes(before: Run, after: Run) -> list[str]:
    """What a reader of the tables must know."""
    said = []
    if not latency_is_comparable(before, after):
        said.append(
            "Speed is left out: the runs were measured on other machines, or with other "
            "batches or threads."
        )
    if before.params is None or after.params is None:
        said.append("Settings are left out: a run has no params.yaml that this version reads.")
    elif before.params.seed == after.params.seed and before.params.prepare != after.params.prepare:
        said.append("The runs have other data: accuracies are of other images.")
    return said


def render_comparison(before: Run, after: Run) -> str:
    """HTML of the comparison.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    return fill(
        "compare.html",
        names=(before.name, after.name),
        summaries=[summary_sentence(run.metrics, run.measured) for run in (before, after)],
        figures=comparison_table(before, after),
        settings=settings_table(before, after),
        picture=fronts(before, after),
        marks=pareto.run_keys((before.name, after.name)),
        notes=notes(before, after),
    )


def fronts(before: Run, after: Run) -> str:
    """Both Pareto fronts against file bytes, as SVG."""
    runs = [
        [
            point._replace(
                name=f"{'teacher' if point.kind == 'teacher' else point.name} ({run.name})"
            )
            for point in pareto.points_of(run.metrics, "teacher", lambda _, m: m.file_bytes)
            if point.student is None
        ]
        for run in (before, after)
    ]
    return pareto.fronts(runs, _FILE_SIZE)


def _model(run: Run, name: str) -> ModelFigures | None:
    return run.metrics.teacher if name == "teacher" else run.metrics.students.get(name)


def _speeds(run: Run, name: str) -> list[float]:
    """How many times as fast as the run's teacher, by batch size; empty: not in the run."""
    latency = run.measured.headline
    pairs = zip(latency["teacher"], latency.get(name, ()), strict=False)
    return [teacher.median_ms / own.median_ms for teacher, own in pairs]


def _cell(
    old: float | None,
    new: float | None,
    text: Callable[[float], str],
    change: Callable[[float, float], str],
) -> str:
    if old is None or new is None:
        return f"{_ABSENT if old is None else text(old)} -> {_ABSENT if new is None else text(new)}"
    if old == new:
        return f"{text(old)} (equal)"
    return f"{text(old)} -> {text(new)} ({change(old, new)})"


def _points(old: float, new: float) -> str:
    return f"{100 * (new - old):+.2f}"


def _ratio(old: float, new: float) -> str:
    return f"{new / old - 1:+.1%}" if 0.5 < new / old < 2 else f"{new / old:.3g}x"


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings by dotted name; lists are leaves."""
    if not isinstance(value, Mapping) or not value:
        return [(name, value)]
    return [
        leaf for key, own in value.items() for leaf in _flat(own, f"{name}.{key}" if name else key)
    ]
