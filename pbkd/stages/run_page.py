"""What the run's page in MLflow shows beside figures and series: a summary, and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pbkd.report import Measured, Metrics, summary_sentence
from pbkd.report.numbers import size_text
from pbkd.report.pareto import pictures
from pbkd.report.plots import jobs
from pbkd.tracking import Registered


def summary(metrics: Metrics, measured: Measured, network: str, receipt: Registered) -> str:
    """Markdown: what came out, and a link to the version of each model.

    Args:
        network: name of the teacher's network.
        receipt: has all of the metrics' models.
    """
    models = {"teacher": metrics.teacher, **metrics.by_size}
    lines = []
    for name, model in models.items():
        number = receipt.versions[name].version
        champion = ", champion" if number == receipt.champion else ""
        lines.append(
            f"- {name}: {model.val_accuracy:.2%} on the validation split, "
            f"{size_text(model.file_bytes)}, "
            f"[version {number}](#/models/{receipt.name}/versions/{number}){champion}"
        )
    found = "Artifacts: `report.html` explains the run, `pictures` shows its figures."
    return "\n\n".join([summary_sentence(metrics, measured, network), "\n".join(lines), found])


def picture_files(metrics: Metrics, measured: Measured, network: str) -> Iterator[tuple[str, str]]:
    """File name and SVG of each picture: accuracy against costs, and the jobs on their workers.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    found = pictures(metrics, measured, network)
    phase = measured.block_phase
    if phase is not None and phase.jobs:
        found["Jobs on workers"] = jobs(phase)
    for title, svg in found.items():
        yield f"{title.lower().replace(' ', '_')}.svg", _as_file(svg)


def _as_file(svg: str) -> str:
    """What a page takes for granted and a file does not: namespaces, a size, paper and a font."""
    view_box = re.match(r'<svg viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert view_box is not None
    width, height = view_box.groups()
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}pt" height="{height}pt" '
        'style="background: #fff; font-family: sans-serif"'
    )
    return head + svg.removeprefix("<svg")
