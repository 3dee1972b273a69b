"""What README and docs/ show is there: verbs, options, variables, parameters, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
import yaml

from pbkd.cli import app
from pbkd.config import Params
from pbkd.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"(?:^|[\s(;|&])(pbkd [a-z][^#|;&)]*)")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def names() -> list[str]:
    return [str(page.relative_to(ROOT)) for page in PAGES]


def verbs() -> dict[str, click.Command]:
    return dict(typer.main.get_command(app).commands)


def commands(text: str) -> list[list[str]]:
    """Commands in fenced blocks and in code spans; prose says `pbkd`, too."""
    lines = [
        line
        for language, body in FENCE.findall(text)
        if language in ("", "sh")
        for line in body.splitlines()
    ]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return [shlex.split(found) for line in lines for found in COMMAND.findall(line)]


@pytest.mark.parametrize("page", PAGES, ids=names())
def test_commands_have_verbs_and_options_that_exist(page: Path) -> None:
    known = verbs()
    for words in commands(page.read_text()):
        assert words[1] in known, words
        options = {
            flag
            for parameter in known[words[1]].params
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        flags = [word for word in words[2:] if re.match(r"-{1,2}[a-z]", word)]
        assert {flag.split("=")[0] for flag in flags} <= options | {"--help"}, words


def test_every_verb_is_in_the_docs() -> None:
    shown = {words[1] for page in PAGES for words in commands(page.read_text())}
    shown |= set(re.findall(r"\| `(\w+)` \|", (ROOT / "docs/architecture.md").read_text()))
    assert set(verbs()) <= shown


@pytest.mark.parametrize("page", PAGES, ids=names())
def test_variables_are_settings(page: Path) -> None:
    known = {f"PBKD_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"PBKD_[A-Z][A-Z_]*[A-Z]", page.read_text())) <= known


def test_every_variable_is_in_the_readme() -> None:
    shown = set(re.findall(r"PBKD_[A-Z_]+", (ROOT / "README.md").read_text()))
    assert {f"PBKD_{name.upper()}" for name in Settings.model_fields} <= shown


@pytest.mark.parametrize("page", PAGES, ids=names())
def test_parameters_are_valid(page: Path) -> None:
    for language, text in FENCE.findall(page.read_text()):
        if language == "yaml" and set(content := yaml.safe_load(text)) <= set(Params.model_fields):
            Params.model_validate(content)


def test_parameters_of_the_readme_are_looked_at() -> None:
    blocks = [text for language, text in FENCE.findall((ROOT / "README.md").read_text())
              if language == "yaml"]  # fmt: skip
    assert len(blocks) >= 2
    assert all(set(yaml.safe_load(text)) <= set(Params.model_fields) for text in blocks)


@pytest.mark.parametrize("page", PAGES, ids=names())
def test_links_lead_to_files(page: Path) -> None:
    generated = {ROOT / "docs/reference/settings.md", ROOT / "docs/reference/cli.md"}
    for target in LINK.findall(page.read_text()):
        if not re.match(r"[a-z]+:", target):
            path = (page.parent / target).resolve()
            assert path.exists() or path in generated, f"{page.name}: {target}"
