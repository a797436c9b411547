"""The table of abuses is the list of abuses: `python -m tests.attacks.test_readme` writes it."""

from __future__ import annotations

import importlib
from pathlib import Path

HERE = Path(__file__).parent
FAMILIES = ("truncation", "offsets", "counts", "json", "claims", "bombs", "files", "segments")
INTRO = """# Abuses

What a bundle must not do to its reader. Every row is a test in the file of its family: the bundle is refused by
`from_bytes` with either `verify` (a segment alone by `open_blob`, whole and out of a stream), reading allocates no more
than 40 bytes for each that came, and the error says what is wrong and how to fix it. Memory is counted with
tracemalloc, never timed.

| family | abuse | verdict | error |
|---|---|---|---|
"""


def table() -> str:
    """The page."""
    rows = [
        f"| [{family}](test_{family}.py) | {abuse.name} | refused | `{abuse.error.__name__}` |\n"
        for family in FAMILIES
        for abuse in importlib.import_module(f".test_{family}", __package__).ABUSES
    ]
    return INTRO + "".join(rows)


def test_every_abuse_is_in_the_table() -> None:
    assert (HERE / "README.md").read_text() == table()
    assert {path.stem for path in HERE.glob("test_*.py")} == {f"test_{family}" for family in (*FAMILIES, "readme")}


if __name__ == "__main__":
    (HERE / "README.md").write_text(table())
