"""The report: one page, whole by itself, with every block and candidate, whatever their names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest

from pbkd._version import __version__
from pbkd.artifacts import read_json
from pbkd.config import Params
from pbkd.distill import Damage
from pbkd.report import (
    REPORT,
    BlockPhase,
    JobFigures,
    Measured,
    Metrics,
    ReportInputs,
    TraineeFigures,
    read_metrics,
    render,
)
from pbkd.report.page import prediction_note
from pbkd.report.plots import candidate_keys, damages, jobs, loss_curves
from pbkd.report.svg import log_ticks, series_style
from pbkd.stages.distill import read_distilled
from pbkd.students import Choice
from tests.report.html_page import Page
from tests.report.made_up import family


@pytest.fixture(scope="module")
def figures() -> tuple[Metrics, Measured]:
    return family(1, limits=1)


def trainee(block: str, candidate: str, kl: float | None = 0.25) -> TraineeFigures:
    losses = () if kl is None else ((-1, 1.0), (0, 0.5), (1, 0.25))
    damage = Damage(kl=kl, accuracy_drop=0.1, num_images=9)
    return TraineeFigures(block=block, candidate=candidate, damage=damage, val_losses=losses)


def kept(block: str, kl: float | None) -> Choice:
    return Choice(block=block, candidate=None, config=None, damage_kl=kl, reason="why not")


def page_of(
    figures: tuple[Metrics, Measured],
    name: str = "layer1.0",
    candidate: str = "separable",
    network: str = "net",
    kl: float | None = 0.25,
    max_damage: float = 1.0,
    **measured: object,
) -> str:
    return render(
        ReportInputs(
            network=network,
            params=Params(),
            metrics=figures[0],
            measured=figures[1].model_copy(update=measured),
            choices={"half": [kept(name, kl)]},
            trainees=[trainee(name, candidate, kl)],
            max_damage=max_damage,
        )
    )


def phase_of(
    num_jobs: int,
    num_workers: int,
    trained: Sequence[str] = ("a/x",),
    predicted_s: float | None = None,
) -> BlockPhase:
    done = [
        JobFigures(
            job_id=f"job-{index:03d}",
            worker=f"cpu-{index % num_workers}",
            trained=tuple(trained),
            started_s=10.0 * (index // num_workers),
            duration_s=10.0,
            energy_j=None if index else 123.4,
            predicted_s=predicted_s,
        )
        for index in range(num_jobs)
    ]
    wall_s, jobs_s = 10.0 * -(-num_jobs // num_workers), 10.0 * num_jobs
    return BlockPhase(
        num_workers=num_workers,
        num_jobs=num_jobs,
        wall_s=wall_s,
        jobs_s=jobs_s,
        speedup=jobs_s / wall_s,
        energy_j=None,
        jobs=tuple(reversed(done)),
    )


# ---------------------------------------------------------------- the page of a run


def test_the_page_of_a_run_is_whole_by_itself(finished):
    text = (finished.results / REPORT).read_text()
    page = Page(text)
    assert text.startswith("<!doctype html>")
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "img", "object", "embed"}
        for key, value in attributes.items():
            if key in {"src", "srcset", "href", "xlink:href", "action", "data"}:
                assert value.startswith("#"), f"<{tag} {key}={value}>"
    assert not re.search(r"@import|@font-face|url\((?!#)|https?:|src=", text)
    assert page.all("meta")[0] == {"charset": "utf-8"}


def test_the_page_of_a_run_names_every_block_and_candidate_and_figure(finished):
    text = (finished.results / REPORT).read_text()
    page = Page(text)
    for item in read_distilled(finished):
        assert page.text.count(item.result.block) == 4  # both pictures and two tables
        assert item.result.candidate in page.text
        assert f"{item.damage.kl:.4f}" in page.text
    metrics = read_metrics(finished.results)
    assert f"{metrics.teacher.num_parameters:,}" in page.text
    (student,) = metrics.students.values()
    assert f"{student.test_accuracy:.2%}" in page.text
    assert any(line.startswith("vgg_small at ") for line in page.text)
    machine = read_json(finished.results / "measured.json")["machine"]
    assert {machine["torch"], machine["python"], __version__} <= set(page.text)


def test_the_page_of_a_run_shows_its_settings_by_section_with_defaults(finished):
    text = "\n".join(Page((finished.results / REPORT).read_text()).text)
    sections = list(Params().model_dump(by_alias=True))
    assert all(f"\n{section}\n" in text for section in sections)
    assert "width: 0.25" in text  # given
    assert "label_smoothing: 0.0" in text  # by default
    assert "exclude:\n- features.0" in text


# ---------------------------------------------------------------- pictures and names


def test_pictures_scale_follow_the_pages_colours_and_have_a_text(figures):
    text = page_of(figures, block_phase=phase_of(3, 2))
    pictures = Page(text).all("svg")
    assert len(pictures) == 4 + 3 + 4  # accuracy with marks; a key, damage, losses, jobs
    for attributes in pictures:
        assert {"width", "height"} & set(attributes) == set()
        assert attributes["viewbox"]
        assert attributes["role"] in ("img", "group")
        assert attributes["aria-label"]
    assert "currentColor" in text
    assert "#000000" not in text
    assert "font-family" not in text


def test_ids_are_unique_in_a_page_with_many_pictures(figures):
    ids = re.findall(r' id="([^"]*)"', page_of(figures, block_phase=phase_of(3, 2)))
    assert ids
    assert len(ids) == len(set(ids))


def test_equal_figures_give_an_equal_page(figures):
    assert page_of(figures) == page_of(figures)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "a&amp;b", "$x_{$", "_blocks"]
)
def test_names_are_shown_as_they_are_and_never_run(figures, name):
    phase = phase_of(1, 1, [name])
    page = Page(page_of(figures, name=name, candidate=name, network=name, block_phase=phase))
    assert page.all("script") == [{}]  # the page's own
    assert page.all("img") == []
    # damage, losses, the key, the tables of blocks and jobs, twice in that of candidates
    assert page.text.count(name) == 7
    assert page.text.count(f"{name} (teacher)") == 4
    assert page.text.count(f"{name}, compressed") == 2  # the title and the heading
    assert sum(name in str(picture["aria-label"]) for picture in page.all("svg")) == 4 + 2


def test_a_report_of_54_blocks_has_all_of_them_and_their_jobs(figures):
    names = [f"layer{index // 18}.{index}.conv" for index in range(54)]
    trainees = [trainee(name, candidate) for name in names for candidate in ("x", "y", "z")]
    page = Page(
        render(
            ReportInputs(
                network="net",
                params=Params(),
                metrics=figures[0],
                measured=figures[1].model_copy(update={"block_phase": phase_of(54, 4)}),
                choices={"half": [kept(name, 2.0) for name in names]},
                trainees=trainees,
                max_damage=1.0,
            )
        )
    )
    for name in names:
        # damage, losses, choices; three candidates
        assert page.text.count(name) == 6, name
    pictures = page.all("svg")
    assert len(pictures) == 4 + 3 + 3 + 1 + 54 + 1
    drawn = page.text[page.text.index("Jobs on workers") :]
    assert all(drawn.count(str(number)) >= 2 for number in range(1, 55))  # chart and table


def test_a_candidate_that_diverged_is_said_to_be_not_finite(figures):
    page = Page(page_of(figures, kl=None))
    assert page.text.count("not finite") == 3  # the picture and two tables
    assert "nan" not in " ".join(page.text).lower()


# ---------------------------------------------------------------- what was not measured


def test_without_a_block_phase_the_page_says_so_and_draws_none(figures):
    page = Page(page_of(figures, block_phase=None))
    assert any("Block phase: not measured" in line for line in page.text)
    assert not any("on workers over time" in str(p["aria-label"]) for p in page.all("svg"))


def test_a_block_phase_that_lists_no_jobs_is_told_without_a_chart(figures):
    page = Page(page_of(figures, block_phase=phase_of(3, 2).model_copy(update={"jobs": ()})))
    assert any("3 jobs on 2 workers" in line for line in page.text)
    assert len(page.all("svg")) == 4 + 3 + 3


@pytest.mark.parametrize("limit", [0.0, 1.0, math.inf])
def test_a_limit_of_damage_that_is_not_drawn_is_not_spoken_of(figures, limit):
    assert ("dashed line" in page_of(figures, max_damage=limit)) == (limit == 1.0)


def test_figures_that_were_not_measured_are_said_to_be_so(figures):
    nothing = dict.fromkeys(figures[1].latency, ())
    page = Page(page_of(figures, stages={}, latency=nothing, block_phase=None))
    text = " ".join(page.text)
    assert "Latency: not measured" in text
    assert "Energy: not measured" in text
    assert "Block phase: not measured" in text


# ---------------------------------------------------------------- single pictures


@pytest.mark.parametrize(
    ("kls", "limit"),
    [
        ({"a": 0.5}, 0.0),
        ({"a": 0.5}, math.inf),
        ({}, 1.0),
        ({"a": 0.0, "c": 2.0}, 1.0),
        ({"a": None}, 0.0),
    ],
    ids=["limit of 0", "no limit", "no candidate", "damage of 0", "nothing finite, limit of 0"],
)
def test_damages_that_a_logarithmic_scale_does_not_hold_are_no_obstacle(kls, limit):
    text = damages([trainee(block, "x", kl) for block, kl in kls.items()], set(), limit)
    assert all(f">{block}</text>" in text for block in kls)
    assert ("max_damage" in text) == (0 < limit < math.inf)
    assert ("not finite" in text) == (None in kls.values())


def test_what_a_student_took_is_drawn_in_another_way():
    own = [trainee("a", "x"), trainee("b", "x")]
    none, some = damages(own, set(), 1.0), damages(own, {("a", "x")}, 1.0)
    assert none.count("fill-opacity: 0") == some.count("fill-opacity: 0") + 1


def test_loss_curves_are_one_picture_per_block_on_equal_axes():
    low = trainee("b", "x").model_copy(update={"val_losses": ((-1, 0.01), (0, 0.001))})
    curves = loss_curves([trainee("a", "x"), trainee("a", "y", None), low])
    assert list(curves) == ["a", "b"]
    assert "x from 1 to 0.25, y no finite loss" in curves["a"]
    ticks = [re.findall(r">([\d.]+)</text>", picture) for picture in curves.values()]
    assert ticks[0] == ticks[1]
    assert {"0.001", "1"} <= set(ticks[0])


def test_a_candidate_that_diverged_does_not_flatten_the_others():
    rising = trainee("b", "x").model_copy(update={"val_losses": ((-1, 1.0), (0, 0.5), (1, 1e12))})
    assert loss_curves([trainee("a", "x"), rising])["a"] == loss_curves([trainee("a", "x")])["a"]


def test_a_candidate_has_one_style_in_every_picture():
    own = [trainee("a", "x"), trainee("a", "y"), trainee("b", "y")]
    assert list(candidate_keys(own)) == ["x", "y"]
    second = series_style(1).colour
    assert second in loss_curves(own)["b"]
    assert second in candidate_keys(own)["y"]
    assert second not in candidate_keys(own)["x"]


def test_the_first_16_styles_differ():
    styles = [series_style(index) for index in range(16)]
    assert len({(s.colour, s.marker) for s in styles}) == 16
    assert len({(s.colour, str(s.dashes)) for s in styles}) == 16


def test_a_job_too_short_for_its_number_is_drawn_without():
    phase = phase_of(3, 1)
    short = phase.in_order[1].model_copy(update={"duration_s": 0.01})
    text = jobs(phase.model_copy(update={"jobs": (phase.in_order[0], short, phase.in_order[2])}))
    numbers = re.findall(r">(\d+)</text>", text)
    assert numbers.count("1") == numbers.count("3") == 1
    assert "2" not in numbers


def test_what_was_predicted_is_drawn_beside_the_jobs_and_explained(figures):
    without, predicted = phase_of(3, 2), phase_of(3, 2, predicted_s=25.0)
    assert "predicted" not in jobs(without)
    text = jobs(predicted)
    assert text.count("stroke-dasharray") == jobs(without).count("stroke-dasharray") + 3
    assert "below each job the time that was predicted for it" in text
    page = " ".join(Page(page_of(figures, block_phase=predicted)).text)
    assert "thin dashed bar" in page
    assert "all epochs are counted" in page
    assert "thin dashed bar" not in page_of(figures, block_phase=without)


@pytest.mark.parametrize(("num_epochs", "early"), [(2, None), (3, "1 of 2"), (9, "2 of 2")])
def test_candidates_that_stopped_early_are_counted_where_they_matter(num_epochs, early):
    longer = trainee("b", "x").model_copy(update={"val_losses": ((-1, 1.0), (2, 0.5))})
    own = [trainee("a", "x"), longer, trainee("not of this run", "x")]
    phase = phase_of(1, 1, ["a/x", "b/x"], predicted_s=5.0)
    note = prediction_note(phase, own, num_epochs)
    assert note is not None
    assert ("stopped early" in note) == (early is not None)
    assert early is None or f"{early} candidates stopped early" in note


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.001, 20.0, [0.001, 0.01, 0.1, 1, 10]),
        (0.5, 40.0, [1, 3, 10, 30]),
        (1e-9, 1.0, [1e-9, 1e-7, 1e-5, 1e-3, 1e-1]),
        (2.5, 5.5, [3, 4, 5]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_few_and_round(low, high, expected):
    assert log_ticks(low, high) == pytest.approx(expected)
