"""Answers for people: tables, facts, receipts in words; and the same as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from unicodedata import category

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from avp.handle import Handle
from avp.receipt import Receipt

_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate, line and paragraph separators
_JOINERS = "\u200c\u200d"


def clean(value: str, *, keep: str = "") -> str:
    """What a stranger wrote, without the characters that steer a terminal; joiners, which scripts need, stay."""
    return "".join(
        char if category(char) not in _STEERING or char in _JOINERS or char in keep else ascii(char)[1:-1]
        for char in value
    )


def say(words: str) -> None:
    """A line of words, on stderr: stdout is for results."""
    click.echo(clean(words), err=True)


def document(value: object) -> None:
    """The one JSON document of `--json`."""
    click.echo(json.dumps(value, indent=2))


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, a line each."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{click.style(name, bold=True)}{' ' * (width - len(name))}  {clean(value)}")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table: fitted to a terminal, else in columns that no line is broken for."""
    cells = [[clean(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        drawn = Table(box=None, pad_edge=False)
        for heading in headings:
            drawn.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
        for row in cells:
            drawn.add_row(*map(Text, row))
        Console(file=sys.stdout, highlight=False).print(drawn)
        return
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    for row in [list(headings), *cells]:
        parts = [
            value.rjust(width) if heading in right else value.ljust(width)
            for heading, value, width in zip(headings, row, widths, strict=True)
        ]
        click.echo("  ".join(parts).rstrip())


def say_receipt(receipt: Receipt, *, did: str) -> None:
    """What a hand-over, a fetch or a generation did, how long its stages took, and why it was not better."""
    say(f"{did}; mode {receipt.mode}, {receipt.exactness.label}")
    if receipt.seconds:
        say("seconds: " + ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in receipt.seconds.items()))
    for reason in receipt.reasons:
        say(f"because: {reason}")


def handle_to_json(handle: Handle) -> dict[str, object]:
    """The fields of a handle."""
    return {
        "handle": handle.id,
        "url": handle.url,
        "length": handle.length,
        "exactness": handle.exactness.label,
        "ttl": handle.ttl,
    }
