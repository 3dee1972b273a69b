"""The site: built strictly, without anything from outside, with every command and key in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pbkd.cli import app
from pbkd.config import Params
from pbkd.settings import Settings
from tests.docs.documents import REPOSITORY

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


def test_nothing_is_loaded_from_outside(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="([^"]+)"', text)
        assert loaded
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page


def test_no_link_leaves_the_site_for_the_repository(site: Path) -> None:
    for page in site.rglob("*.html"):
        for link in re.findall(r'href="([^"#]+)', page.read_text()):
            if re.match(r"(https?|mailto):", link) or page.name == "404.html":
                continue
            assert (page.parent / link).exists(), f"{page.relative_to(site)} links to {link}"


def test_every_command_has_its_options(site: Path) -> None:
    text = (site / "reference" / "commands.html").read_text()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f'id="pbkd-{name}"' in text
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert all(f"<code>{option}</code>" in text for option in parameter.opts)


def test_every_key_is_listed(site: Path) -> None:
    text = (site / "reference" / "settings.html").read_text()
    for name, field in Params.model_fields.items():
        if name == "seed":
            continue
        section = field.annotation
        assert isinstance(section, type)
        table = text.split(f'id="{section.__name__.lower()}"', 1)[1].split("<h2", 1)[0]
        for key, inner in section.model_fields.items():  # type: ignore[attr-defined]
            assert f"<code>{inner.alias or key}</code>" in table, (name, key)
    for name in Settings.model_fields:
        assert f"<code>PBKD_{name.upper()}</code>" in text


def test_the_python_page_has_the_arguments_of_compress(site: Path) -> None:
    text = (site / "reference" / "python.html").read_text()
    for word in ("budget", "folder", "ConfigError", "pbkd.load", "max_difference"):
        assert word in text
