"""What README and pages name is there: commands, options, settings, keys, files, headings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from pbkd.cli import app
from pbkd.config import Params
from pbkd.config.load import sections_in
from pbkd.settings import Settings
from tests.docs.documents import (
    DOCUMENTS,
    README,
    REPOSITORY,
    anchors,
    blocks,
    commands,
    inline_codes,
    links,
)

SECTIONS = {field.alias or name: field for name, field in Params.model_fields.items()}
GENERATED = re.compile(r'^PAGE = "(.+)"$', re.MULTILINE)
FILES = (".html", ".json", ".jsonl", ".md", ".pbkd", ".py", ".yaml")

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY))
)


def _command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words name, and the words that are left."""
    command, left = typer.main.get_command(app), list(words)
    while left and hasattr(command, "commands"):
        if left[0].startswith("-"):
            break
        assert left[0] in command.commands, f"pbkd {' '.join(words)}: there is no {left[0]}"
        command = command.commands[left.pop(0)]
    return command, left


def _unknown_option(words: list[str]) -> str | None:
    command, left = _command(words)
    known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    given = [word.split("=")[0].rstrip(",.") for word in left if re.match(r"--?[a-z]", word)]
    return next((word for word in given if word not in {*known, "--help", "-h"}), None)


@each_document
def test_every_command_and_option_exists(document: Path) -> None:
    texts = [block.text for block in blocks(document)] + inline_codes(document)
    for words in (words for text in texts for words in commands(text)):
        if words[0].isupper():  # pbkd VERB
            continue
        if (option := _unknown_option(words)) is not None:
            pytest.fail(f"pbkd {' '.join(words)}: there is no option {option}")


def test_a_command_that_is_not_there_is_found() -> None:
    found = list(
        commands("PBKD_WORKERS=2 pbkd plan --workers 1,2  # text\ncd x; pbkd export a -o b")
    )
    assert found == [["plan", "--workers", "1,2"], ["export", "a", "-o", "b"]]
    assert [_unknown_option(words) for words in found] == [None, None]
    assert _unknown_option(["plan", "--jobs", "3"]) == "--jobs"
    with pytest.raises(AssertionError, match="there is no compress"):
        _command(["compress"])


@each_document
def test_every_variable_exists(document: Path) -> None:
    named = set(re.findall(r"\bPBKD_([A-Z][A-Z_]*)", document.read_text()))
    assert named <= {name.upper() for name in Settings.model_fields}


def test_the_readme_lists_every_variable() -> None:
    named = re.findall(r"`PBKD_([A-Z_]+)`", README.read_text())
    assert {name.upper() for name in Settings.model_fields} <= set(named)


@each_document
def test_every_yaml_block_with_a_section_is_a_configuration(document: Path) -> None:
    for block in blocks(document):
        value = yaml.safe_load(block.text) if block.language == "yaml" else None
        if isinstance(value, dict) and SECTIONS.keys() & value.keys():
            Params.model_validate(value)


@each_document
def test_every_key_exists(document: Path) -> None:
    """`section.key` and `section.key: value` in inline code, with keys of keys."""
    for code in inline_codes(document):
        path, _, value = code.partition(": ")
        if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", path) or path.endswith(FILES):
            continue
        section, *keys = path.split(".")
        if section in SECTIONS:
            assert _has(SECTIONS[section].annotation, keys), f"`{code}` of {document.name}"
            if value:
                given: Any = yaml.safe_load(value)
                for key in reversed([section, *keys]):
                    given = {key: given}
                Params.model_validate(given)


def _has(annotation: Any, keys: list[str]) -> bool:
    """Whether a section, or one of a union's, has a key, with keys of keys."""
    if not keys:
        return True
    fields = [f for model in sections_in(annotation) for f in _fields(model, keys[0])]
    return any(_has(field.annotation, keys[1:]) for field in fields)


def _fields(model: type[BaseModel], key: str) -> list[Any]:
    return [field for name, field in model.model_fields.items() if key in (name, field.alias)]


def test_a_key_that_is_not_there_is_found() -> None:
    assert _has(SECTIONS["stitch"].annotation, ["repair", "method"])
    assert not _has(SECTIONS["stitch"].annotation, ["repair", "rate"])
    assert not _has(SECTIONS["prepare"].annotation, ["size"])


@each_document
def test_every_relative_link_resolves(document: Path) -> None:
    hooks = (REPOSITORY / "docs" / "hooks").glob("*.py")
    made = {
        (REPOSITORY / "docs" / name)
        for path in hooks
        for name in GENERATED.findall(path.read_text())
    }
    assert len(made) == 2
    for link in links(document):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if target in made:
            continue
        assert target.exists(), f"{document.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{document.name}: {link} has no such heading"
