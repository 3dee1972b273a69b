"""Site: what the pages link to outside of this folder: reports become pages, files become names."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
_REPORTS = "benchmarks/reports"
_PAGES = {"README.md": "index.md", "pbkd/config": "reference/settings.md"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the reports of the benchmarks."""
    root = Path(config.docs_dir).parent
    for path in sorted((root / _REPORTS).glob("*.md")):
        files.append(File.generated(config, f"reports/{path.name}", content=path.read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave the folder into links to pages, or into plain names."""
    here = posixpath.dirname(page.file.src_uri)

    def resolved(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join("docs", here, target))
        if path.startswith("docs/"):
            return match[0]
        inside = page_of(path)
        if inside is None:
            return text if path in text else f"{text} (`{path}`)"
        return f"[{text}]({posixpath.relpath(inside, here or '.')}{anchor})"

    return _LINK.sub(resolved, markdown)


def page_of(path: str) -> str | None:
    """The page that shows a file of the repository, if one does."""
    if posixpath.dirname(path) == _REPORTS and path.endswith(".md"):
        return f"reports/{posixpath.basename(path)}"
    return _PAGES.get(path) or _PAGES.get(posixpath.dirname(path))
