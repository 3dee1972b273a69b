"""The report's pictures: SVG text by matplotlib that follows the page's light or dark colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pbkd.errors import MissingExtraError


def loss_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Validation loss by epoch, a line per trainee; epoch -1 is before the first step."""
    figure, axes = _figure()
    for points in curves.values():
        axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.5)
    axes.set_xlabel("epoch (-1: inherited weights)")
    axes.set_ylabel("validation loss")
    axes.set_yscale("log")
    axes.legend(
        axes.lines,  # with labels of their own, a name that begins with _ would be left out
        [_literal(name) for name in curves],
        fontsize=7,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    return _svg(figure)


def damages(values: Mapping[str, float], limit: float) -> str:
    """Damage of each trainee as a bar, and the limit over which the teacher's block stays."""
    figure, axes = _figure(height=0.4 * max(len(values), 2) + 1)
    names = [_literal(name) for name in values]
    axes.barh(names, list(values.values()), color="#4c78a8", height=0.6)
    if limit > 0:  # 0 has no place on a logarithmic scale
        axes.axvline(limit, color="#e45756", linewidth=1.5, linestyle="--")
        above = axes.get_xaxis_transform()
        axes.text(limit, 1.02, "max_damage", color="#e45756", fontsize=8, transform=above)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("damage: KL of the logits (nats)")
    return _svg(figure)


def _literal(name: str) -> str:
    """A name that matplotlib takes for no formula."""
    return name.replace("$", r"\$")


def _figure(width: float = 7.5, height: float = 3.2) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "pipeline", "the report") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.25)
    return figure, axes


def _svg(figure: Any) -> str:
    """SVG without a size of its own, black as the page's text colour, equal for equal data."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pbkd"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1, flags=re.S)
    return text.replace("#000000", "currentColor").replace("fill: black", "fill: currentColor")
