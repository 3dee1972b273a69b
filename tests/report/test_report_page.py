"""The report: one page, whole by itself, with every block and candidate, whatever their names."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from pbkd.artifacts import read_json
from pbkd.distill import Damage
from pbkd.report import REPORT, Measured, Metrics, read_measured, read_metrics, render
from pbkd.report.plots import damages, loss_curves
from pbkd.stages.distill import read_distilled
from pbkd.students import Choice

VOID = {"meta", "br", "img", "link", "hr", "input"}
OPTIONAL_END = {"html", "p"}


class Page(HTMLParser):
    """Collects tags and text, and checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert set(self.open) <= OPTIONAL_END, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] != tag and self.open[-1] in OPTIONAL_END:
            self.open.pop()
        assert self.open, f"</{tag}> without a start"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def figures(_finished) -> tuple[Metrics, Measured]:
    return read_metrics(_finished / "results"), read_measured(_finished / "results")


def page_of(
    figures: tuple[Metrics, Measured],
    name: str = "layer1.0",
    candidate: str = "separable",
    title: str = "t",
    kl: float | None = 0.25,
) -> str:
    metrics, measured = figures
    return render(
        title=title,
        metrics=metrics,
        measured=measured,
        choices={
            "default": [
                Choice(block=name, candidate=None, config=None, damage_kl=kl, reason="why not")
            ]
        },
        candidate_damages={f"{name}/{candidate}": Damage(kl=kl, accuracy_drop=0.1, num_images=9)},
        curves={f"{name}/{candidate}": [(-1, 1.0), (0, 0.5)] if kl is not None else []},
        max_damage=1.0,
    )


def test_the_page_of_a_run_is_whole_by_itself(finished):
    text = (finished.results / REPORT).read_text()
    page = Page(text)
    assert text.startswith("<!doctype html>")
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "img"}
        for key, value in attributes.items():
            if key in {"src", "href", "xlink:href", "action", "data"}:
                assert value.startswith("#"), f"<{tag} {key}={value}>"
    assert not re.search(r"@import|@font-face|url\((?!#)", text)
    assert page.all("meta")[0] == {"charset": "utf-8"}


def test_the_page_of_a_run_names_every_block_and_candidate_and_figure(finished):
    text = (finished.results / REPORT).read_text()
    shown = Page(text).text
    for item in read_distilled(finished):
        name = f"{item.result.block}/{item.result.candidate}"
        assert item.result.block in shown
        assert shown.count(name) == 2, name  # in both pictures
        assert f"{item.damage.kl:.4f}" in shown
    metrics = read_metrics(finished.results)
    assert f"{metrics.teacher.num_parameters:,}" in shown
    assert f"{metrics.students['default'].test_accuracy:.2%}" in shown
    machine = read_json(finished.results / "measured.json")["machine"]
    assert machine["torch"] in shown[-2]


def test_pictures_scale_with_the_page_and_follow_its_colours(figures):
    text = page_of(figures)
    pictures = Page(text).all("svg")
    assert len(pictures) == 2
    for attributes in pictures:
        assert {"width", "height"} & set(attributes) == set()
        assert attributes["viewbox"]
    assert "currentColor" in text
    assert "#000000" not in text


def test_equal_figures_give_an_equal_page(figures):
    assert page_of(figures) == page_of(figures)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "a&amp;b", "$x_{$", "_blocks"]
)
def test_names_are_shown_as_they_are_and_never_run(figures, name):
    page = Page(page_of(figures, name=name, candidate=name, title=name))
    assert page.all("script") == []
    assert page.all("img") == []
    assert name in page.text  # the title and the table of blocks
    assert page.text.count(f"{name}/{name}") == 2  # the pictures


def test_a_candidate_that_diverged_is_said_to_be_not_finite(figures):
    page = Page(page_of(figures, kl=None))
    assert "not finite" in page.text
    assert "nan" not in " ".join(page.text).lower()


@pytest.mark.parametrize(
    ("values", "limit"),
    [({"a/b": 0.5}, 0.0), ({}, 1.0), ({"a/b": 0.0, "c/d": 2.0}, 1.0)],
    ids=["limit of 0", "no finite damage", "damage of 0"],
)
def test_damages_that_a_logarithmic_scale_does_not_hold_are_no_obstacle(values, limit):
    text = damages(values, limit)
    assert all(name in text for name in values)
    assert ("max_damage" in text) == (limit > 0)


def test_every_curve_has_its_name_beside_it():
    text = loss_curves({"first/x": [(-1, 1.0), (0, 0.1)], "second/x": []})
    assert text.count("first/x") == text.count("second/x") == 1
