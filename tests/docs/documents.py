"""README and pages as tests read them: fenced blocks with their markers, inline code, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown.extensions.toc import slugify

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
DOCUMENTS = (
    README,
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "pbkd" / "presets" / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
)

_FENCE = re.compile(
    r"(?:^<!-- (?P<marker>[\w: ]+) -->\n)?^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+?)(?: \{ #(\S+) \})?$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        marker: of the comment right before it: "run", "params", "serve: PORT"; empty: none.
        language: empty where the block does not say.
    """

    document: Path
    marker: str
    language: str
    text: str


def blocks(document: Path) -> Iterator[Block]:
    """The fenced blocks, in order."""
    for match in _FENCE.finditer(document.read_text()):
        yield Block(document, match["marker"] or "", match["language"], match["text"])


def inline_codes(document: Path) -> list[str]:
    """What stands between backticks outside of blocks."""
    return _INLINE.findall(_FENCE.sub("", document.read_text()))


def links(document: Path) -> list[str]:
    """Targets of links outside of blocks and inline code."""
    prose = _INLINE.sub("", _FENCE.sub("", document.read_text()))
    return _LINK.findall(prose)


def anchors(document: Path) -> set[str]:
    """Those of its headings."""
    prose = _FENCE.sub("", document.read_text())
    return {
        name or slugify(re.sub(r"[`*]", "", heading), "-")
        for heading, name in _HEADING.findall(prose)
    }


def commands(text: str) -> Iterator[list[str]]:
    """Each `pbkd ...` of a block or of inline code, as words without the program's name."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s#\s|\s*(?:;|&&|\|)\s*", line):
            found = re.match(r"(?:[A-Z_]+=\S+ )*(?:\$ )?(?:\.venv/bin/)?pbkd (.+)", part.strip())
            if found:
                yield found[1].split()
