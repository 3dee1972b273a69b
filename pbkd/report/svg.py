"""A matplotlib figure as SVG text for the page: scales with it, takes its colours and font.

Pictures are drawn in the colours below. In the page each one is a CSS variable, so that the page
can give it another value in dark mode; the variable's fallback is the colour drawn.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pbkd.errors import MissingExtraError

INK = "#000000"
_SERIES = ("#0069a8", "#b3470b", "#00735a", "#9a3a80")
_VARIABLES = {INK: "currentColor"} | {
    colour: f"var(--series-{index}, {colour})" for index, colour in enumerate(_SERIES)
}
_DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))
_MARKERS = "osD^"
_TOLD = "told: "
"""What the id of a mark with a text begins with, on its way through matplotlib."""


class SeriesStyle(NamedTuple):
    """How a series is told from the others, with colours and without."""

    colour: str
    dashes: Any
    marker: str


def series_style(index: int) -> SeriesStyle:
    """The style of a picture's n-th series; the first 16 differ."""
    second = (index + index // len(_SERIES)) % len(_DASHES)
    return SeriesStyle(_SERIES[index % len(_SERIES)], _DASHES[second], _MARKERS[second])


def new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> tuple[Any, Any]:
    """A figure and its axes; sizes in inches, of which the page makes what fits.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "pipeline", "the report") from None
    figure = Figure(figsize=(width, height), layout=layout)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.2)
    return figure, axes


def literal(name: str) -> str:
    """A name that matplotlib takes for no formula."""
    return name.replace("$", r"\$")


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between two positive ones: 3 to 6 of them where there are as many."""
    exponents = range(-30, 31)
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        values = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [value for value in values if low <= value <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: -(-len(ticks) // 6) or 1]


def set_log_scale(
    axes: Any,
    which: Literal["x", "y"],
    limits: tuple[float, float],
    text: Callable[[float], str],
    min_gap: float = 0.0,
) -> None:
    """Make one axis logarithmic, between two positive limits, with round ticks.

    Args:
        min_gap: ticks are at least so far apart, as a share of the axis.
    """
    axes.set(**{f"{which}scale": "log", f"{which}lim": limits})
    axis = axes.xaxis if which == "x" else axes.yaxis
    decades = math.log10(limits[1] / limits[0])
    ticks: list[float] = []
    for tick in log_ticks(*limits):
        if not ticks or math.log10(tick / ticks[-1]) >= min_gap * decades:
            ticks.append(tick)
    axis.set_ticks([], minor=True)
    axis.set_ticks(ticks, [text(tick) for tick in ticks])


def tell(artist: Any, text: str) -> None:
    """Say what a mark means: its name for those who do not see it, and its tooltip in the page."""
    artist.set_gid(_TOLD + text)


def svg_of(figure: Any, alt: str) -> str:
    """SVG for an HTML page, without a size of its own; equal for equal pictures.

    Marks with a text by ``tell`` are focusable: the first by Tab, the others by the page's script.

    Args:
        alt: what a reader hears who does not see the picture; it also keeps the picture's ids apart
            from those of the page's other pictures.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    body = text[text.index("<defs>") :]
    body = re.sub(r"\A<defs>\s*<style.*?</defs>", "", body, flags=re.S)  # it would be the page's
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # figure_1 is in every picture, and unused
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"(?<=[: ])#[0-9a-f]{6}(?=[;\"])", _variable, body)
    body, num_told = re.subn(f'<g id="{_TOLD}([^"]*)">', _told, body)
    body = body.replace(' tabindex="-1"', ' tabindex="0"', 1)
    role = "group" if num_told else "img"
    return f'<svg {view_box[0]} role="{role}" aria-label="{html.escape(alt)}">{body}'


def _told(found: re.Match[str]) -> str:
    text = found[1]
    return f'<g class="mark" tabindex="-1" role="img" aria-label="{text}"><title>{text}</title>'


def _variable(found: re.Match[str]) -> str:
    return _VARIABLES.get(found[0], found[0])
