"""The pages of the documentation, their code blocks and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"(?:^[ ]*<!--[ ]not[ ]run:[ ]*(?P<why>[^>]*?)[ ]*-->\n\s*)?"
    r"^(?P<indent>[ ]*)```[ ]?(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.M | re.S | re.X,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: `line` is that of its first line of text; `why` says why it is not run, or ""."""

    language: str
    text: str
    line: int
    why: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    source = page.read_text()
    return [
        Block(
            found["language"],
            dedent(found["text"]),
            source.count("\n", 0, found.start("text")) + 1,
            found["why"] or "",
        )
        for found in _BLOCK.finditer(source)
        if found["language"] in languages
    ]


def prose(page: Path) -> str:
    """A page without its blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", _BLOCK.sub("", page.read_text()))


def name(page: Path) -> str:
    """A page's path from the root of the repository."""
    return page.relative_to(ROOT).as_posix()
