"""Students against the same architecture with random weights, trained for equal device seconds."""

from __future__ import annotations

from pbkd.report.family import kinds_of, seconds_text
from pbkd.report.results import BASELINES, Measured, Metrics, ModelFigures
from pbkd.report.tables import NOT_MEASURED, Table

_EQUAL = 5e-5
"""Test accuracies nearer than this are equal in the tables, and so they are called."""

_HOW = {"scratch": "training from scratch", "distill": "end-to-end distillation"}


def baseline_table(metrics: Metrics, measured: Measured) -> Table | None:
    """A row per student and per baseline of it; None where there is no baseline."""
    if not metrics.baselines:
        return None
    rows = []
    for name, student in metrics.by_size.items():
        if name not in metrics.baselines:
            continue
        own_s = measured.device_s.get(name)
        used = NOT_MEASURED if own_s is None else seconds_text(own_s)
        own = (f"{student.test_accuracy:.2%}", f"{student.val_accuracy:.2%}")
        rows.append((name, *own, "", used, used))
        for kind, figures in _sorted(metrics, name):
            seconds = measured.baselines.get(name, {}).get(kind)
            given_s, used_s = (seconds.given_s, seconds.used_s) if seconds else (None, None)
            rows.append(
                (
                    f"{name}, {BASELINES[kind]}",
                    f"{figures.test_accuracy:.2%}",
                    f"{figures.val_accuracy:.2%}",
                    f"{100 * (figures.test_accuracy - student.test_accuracy):+.2f}",
                    NOT_MEASURED if given_s is None else seconds_text(given_s),
                    NOT_MEASURED if used_s is None else seconds_text(used_s),
                )
            )
    accuracies = ("accuracy (test)", "accuracy (validation)", "points against the student")
    heads = ("model", *accuracies, "device seconds given", "used")
    return Table("Students against baselines", heads, tuple(rows))


def baseline_sentences(metrics: Metrics) -> list[str]:
    """Per kind of baseline: how many students are better, and by name those that are not."""
    return [_sentence(metrics, kind) for kind in kinds_of(metrics)]


def _sentence(metrics: Metrics, kind: str) -> str:
    points = {
        name: student.test_accuracy - metrics.baselines[name][kind].test_accuracy
        for name, student in metrics.by_size.items()
        if kind in metrics.baselines.get(name, {})
    }
    better = [gain for gain in points.values() if gain > _EQUAL]
    equal = [name for name, gain in points.items() if abs(gain) <= _EQUAL]
    worse = {name: -gain for name, gain in points.items() if gain < -_EQUAL}
    how = _HOW[kind]
    if len(points) == 1:
        (name,) = points
        if worse:
            gain = f"{100 * worse[name]:.2f} points of test accuracy"
            return f"{how.capitalize()} is better than {name} by {gain}, for the same seconds."
        if equal:
            return f"{name} and {how} reach the same test accuracy, for the same seconds."
        gain = f"{100 * better[0]:.2f} points of test accuracy"
        return f"{name} is better than {how} by {gain}, for the same seconds."
    text = f"{len(better)} of {len(points)} students are better than {how} for the same seconds"
    if better:
        text += f", by {_range(better)} points of test accuracy"
    if equal:
        text += f"; as good: {', '.join(equal)}"
    if worse:
        named = ", ".join(f"{name} by {100 * gain:.2f}" for name, gain in worse.items())
        text += f"; worse: {named} points"
    return f"{text}."


def _range(gains: list[float]) -> str:
    low, high = f"{100 * min(gains):.2f}", f"{100 * max(gains):.2f}"
    return low if low == high else f"{low} to {high}"


def _sorted(metrics: Metrics, name: str) -> list[tuple[str, ModelFigures]]:
    own = metrics.baselines[name]
    return [(kind, own[kind]) for kind in BASELINES if kind in own]
