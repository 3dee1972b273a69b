"""The pages in a real browser: drawn, quiet, narrow and wide, by pointer and by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from pbkd.report import render
from tests.report.browser import CHROMIUM, Tab, chromium
from tests.report.made_up import family, inputs

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

CONTRAST = """
(() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const over = (top, below) => top.slice(0, 3).map((v, i) => {
    const alpha = top[3] / 255; return alpha * v + (1 - alpha) * below[i];
  });
  const probe = document.body.appendChild(document.createElement("div"));
  probe.style.color = "Canvas";
  const page = rgba(getComputedStyle(probe).color);
  let least = 21, where = "";
  const texts = "h1, h2, h3, p, li, th, td, svg text, figcaption";
  for (const element of document.querySelectorAll(texts)) {
    const box = element.getBoundingClientRect();
    if (!box.width || !element.textContent.trim()) continue;
    const style = getComputedStyle(element);
    let back = page.slice(0, 3);
    const chain = []; for (let e = element; e; e = e.parentElement) chain.unshift(e);
    let opacity = 1;
    for (const e of chain) {
      back = over(rgba(getComputedStyle(e).backgroundColor), back);
      opacity *= Number(getComputedStyle(e).opacity);
    }
    const ink = rgba(element.closest("svg") ? style.fill : style.color);
    ink[3] *= opacity;
    const [a, b] = [light(over(ink, back)), light(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least) { least = ratio; where = element.outerHTML.slice(0, 120); }
  }
  return [least, where];
})()
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "report.html"
    path.write_text(render(inputs(*family(2, ("scratch", "distill"), limits=4))))
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "report.html"
    path.write_text(render(inputs(*family(30), num_blocks=60)))
    return path


@pytest.fixture(params=["few", "many"])
def page(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_logged_asked_for_or_wider_than_the_window(tab, page, width):
    tab.open(page, width)
    assert tab.named("Runtime.exceptionThrown") == []
    assert tab.named("Runtime.consoleAPICalled") == []
    assert tab.named("Log.entryAdded") == []
    asked = [event["request"]["url"] for event in tab.named("Network.requestWillBeSent")]
    assert asked == [page.as_uri()]
    assert tab.run("document.documentElement.scrollWidth") <= width


def test_charts_are_drawn_and_have_a_name(tab, page):
    tab.open(page, 1400)
    charts = tab.run(
        """[...document.querySelectorAll("svg")].map(svg => {
            const box = svg.getBoundingClientRect();
            const marks = [...svg.querySelectorAll(".mark")].map(m => m.getBoundingClientRect());
            return {name: svg.getAttribute("aria-label"), width: box.width, height: box.height,
                    paths: svg.querySelectorAll("path, use").length, marks: marks.length,
                    told: marks.filter(m => m.width > 0 || m.height > 0).length,
                    outside: marks.filter(m => m.right < box.left || m.left > box.right
                                            || m.bottom < box.top || m.top > box.bottom).length};
        })"""
    )
    assert len([chart for chart in charts if chart["marks"]]) >= 5
    for chart in charts:
        assert chart["name"]
        assert min(chart["width"], chart["height"]) > 5, chart
        assert chart["paths"] > 0, chart
        assert chart["told"] == chart["marks"], chart
        assert chart["outside"] == 0, chart
    unnamed = '[role="region"]:not([aria-label]), img:not([alt])'
    assert tab.run(f"document.querySelectorAll('{unnamed}').length") == 0


def test_headings_are_in_order(tab, page):
    tab.open(page, 1400)
    levels = tab.run('[...document.querySelectorAll("h1, h2, h3")].map(h => +h.tagName[1])')
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_keys_reach_every_mark_of_a_chart_and_show_its_figures(tab, few):
    tab.open(few, 1400)
    tip, focused = 'document.querySelector(".tip")', "document.activeElement"
    for _ in range(40):
        tab.press("Tab")
        if tab.run(f'{focused}.classList.contains("mark")'):
            break
    label = tab.run(f'{focused}.getAttribute("aria-label")')
    assert label == "vgg16_bn (teacher): 15.2 MB, 93.30% test, 93.50% validation"
    assert tab.run(f"{tip}.hidden ? null : {tip}.textContent") == label
    box = tab.run(f"{tip}.getBoundingClientRect().toJSON()")
    assert 0 <= box["left"] < box["right"] <= 1400
    assert 0 <= box["top"] < box["bottom"] <= 900
    num_marks = tab.run(f'{focused}.ownerSVGElement.querySelectorAll(".mark").length')
    seen = {label}
    for _ in range(num_marks + 2):  # there is no more at the end
        tab.press("ArrowRight")
        seen.add(tab.run(f"{tip}.textContent"))
    assert len(seen) == num_marks == 7
    tab.press("ArrowLeft")
    assert tab.run(f"{tip}.hidden") is False
    tab.press("Escape")
    assert tab.run(f"{tip}.hidden") is True


@pytest.mark.parametrize("number", [1, 5])  # a student, a hollow baseline
def test_the_pointer_shows_a_marks_figures(tab, few, number):
    tab.open(few, 360)
    x, y = tab.run(
        """(() => {
            const mark = document.querySelectorAll(".chart .mark")[NUMBER];
            mark.scrollIntoView({block: "center", inline: "center"});
            const box = mark.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        })()""".replace("NUMBER", str(number))
    )
    tab.settle()
    tab.point_at(x, y)
    tip = 'document.querySelector(".tip")'
    assert "% test" in tab.run(f"{tip}.hidden ? '' : {tip}.textContent")
    assert tab.run(f"{tip}.getBoundingClientRect().right") <= 360
    tab.point_at(1, 1)
    assert tab.run(f"{tip}.hidden") is True


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_what_is_behind_it(tab, page, dark):
    tab.open(page, 1400, dark=dark)
    least, where = tab.run(CONTRAST)
    assert least >= 4.5, where
