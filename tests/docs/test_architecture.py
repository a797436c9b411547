"""docs/architecture.md names every module of src/avp, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import avp

from .pages import ROOT

SOURCE = Path(avp.__file__).parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROWS = re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", PAGE, re.M)


def test_every_module_has_one_line() -> None:
    modules = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")}
    named = [name for name, _ in ROWS]
    assert sorted(modules - set(named)) == [], "modules without a line in docs/architecture.md"
    assert sorted(set(named) - modules) == [], "lines of docs/architecture.md without a module"
    assert len(named) == len(set(named))
    assert all(text for _, text in ROWS)


def test_the_modules_of_the_request_exist() -> None:
    story = PAGE.partition("## The life of a request")[2].partition("## Where to add what")[0]
    stems = {path.stem for path in SOURCE.rglob("*.py")}
    spans = re.findall(r"`([a-z_]+)`", story)
    assert spans
    assert [span for span in spans if span not in stems | {"generate", "data"}] == []
