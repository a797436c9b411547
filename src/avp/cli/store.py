"""`avp store …`: what a store holds; remove from it, tidy it, check it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import click
from rich.console import Console
from rich.table import Table

from avp.errors import SegmentMissing, UsageError
from avp.protocols import Store, StoredSegment
from avp.stores import open_store

_MIB = 1 << 20
_SHORTEST = 8  # hex digits of a page id

_where = click.option("--store", "url", default="disk:", show_default=True, metavar="URL", help="The store.")
_of = click.option("--tenant", metavar="NAME", help="Only what is this tenant's. The nameless tenant is ''.")
_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


@dataclass(frozen=True, slots=True)
class _Total:
    """What a tenant holds; times are seconds since the epoch."""

    tenant: str
    segments: int
    positions: int
    nbytes: int
    created: float
    used: float


@click.group()
def store() -> None:
    """Segments that are kept: list, count, remove, tidy, check."""


@store.command("ls")
@_where
@_of
@_json
def list_segments(url: str, *, tenant: str | None, as_json: bool) -> None:
    """List the segments, most lately used first."""
    with _opened(url) as held:
        entries = list(held.entries(tenant=tenant))
    if as_json:
        click.echo(json.dumps([_plain(entry) for entry in entries], indent=2))
    else:
        _show(entries)


@store.command("stat")
@_where
@_of
@_json
def stat(url: str, *, tenant: str | None, as_json: bool) -> None:
    """Count segments, positions and bytes by tenant."""
    with _opened(url) as held:
        totals = _totals(held.entries(tenant=tenant))
    if as_json:
        click.echo(json.dumps([asdict(total) for total in totals], indent=2))
        return
    table = _table("TENANT", "SEGMENTS", "POSITIONS", "MIB", "OLDEST", "LAST USED", right=(1, 2, 3))
    for total in totals:
        numbers = (str(total.segments), str(total.positions), f"{total.nbytes / _MIB:.1f}")
        table.add_row(_quoted(total.tenant), *numbers, _time(total.created), _time(total.used))
    Console(file=sys.stdout).print(table)


@store.command("rm")
@click.argument("page")
@_where
@_of
def remove(page: str, url: str, *, tenant: str | None) -> None:
    """Forget the segments that hold PAGE, in all their forms.

    PAGE is a page id, or the first 8 or more of its digits as `ls` shows them.
    """
    prefix = page.lower()
    if len(prefix) < _SHORTEST or set(prefix) - set("0123456789abcdef"):
        raise UsageError(
            f"{page!r} is no page id. Fix: give 8 or more of its hex digits, as `avp store ls` shows them."
        )
    with _opened(url) as held:
        owner, full = _meant(prefix, held, tenant)
        count = held.remove(full, tenant=owner)
    if not count:
        raise SegmentMissing(f"the store holds no page {page}. Fix: see `avp store ls`; a page is its tenant's only.")
    click.echo(f"{count} segment{'' if count == 1 else 's'} removed")


@store.command("gc")
@_where
@_json
def collect(url: str, *, as_json: bool) -> None:
    """Forget what is expired, unreadable, left over by a crash, or over the budget."""
    with _opened(url) as held:
        freed = held.collect()
    click.echo(json.dumps({"freed_bytes": freed}) if as_json else f"{freed / _MIB:.1f} MiB freed")


@store.command("verify")
@_where
@click.option("--repair", is_flag=True, help="Remove the damaged segments, and other forms of the same pages.")
@_json
@click.pass_context
def verify(ctx: click.Context, url: str, *, repair: bool, as_json: bool) -> None:
    """Read every byte of the store; list the damaged segments and exit with 1 if there are any."""
    with _opened(url) as held:
        damaged = list(held.verify())
        if repair:
            for entry in damaged:
                held.remove(entry.page, tenant=entry.tenant)
    if as_json:
        click.echo(json.dumps([_plain(entry) for entry in damaged], indent=2))
    elif damaged:
        _show(damaged)
        click.echo(f"{len(damaged)} damaged{', removed' if repair else ''}", err=True)
    else:
        click.echo("all of it is whole")
    if damaged:
        ctx.exit(1)


@contextmanager
def _opened(url: str) -> Iterator[Store]:
    held = open_store(url)
    try:
        yield held
    finally:
        held.close()


def _meant(prefix: str, held: Store, tenant: str | None) -> tuple[str, str]:
    """The tenant and the page id that the digits stand for."""
    found = sorted({(e.tenant, e.page) for e in held.entries(tenant=tenant) if e.page.startswith(prefix)})
    if len(found) > 1:
        pages = ", ".join(f"{page[:16]}… of {_quoted(owner)}" for owner, page in found[:8])
        raise UsageError(f"{prefix} may be any of {pages}. Fix: give more digits, or --tenant.")
    return found[0] if found else (tenant or "", prefix)


def _totals(entries: Iterator[StoredSegment]) -> list[_Total]:
    by_tenant: dict[str, list[StoredSegment]] = {}
    for entry in entries:
        by_tenant.setdefault(entry.tenant, []).append(entry)
    return [
        _Total(
            tenant,
            len(held),
            sum(entry.count for entry in held),
            sum(entry.nbytes for entry in held),
            min(entry.created for entry in held),
            max(entry.used for entry in held),
        )
        for tenant, held in sorted(by_tenant.items())
    ]


def _show(entries: list[StoredSegment]) -> None:
    table = _table("PAGE", "TENANT", "POSITIONS", "DTYPE", "ENGINE", "CLASS", "CODEC", "MIB", "LAST USED", right=(7,))
    for entry in entries:
        table.add_row(
            entry.page[:12],
            _quoted(entry.tenant),
            f"{entry.start}-{entry.start + entry.count}",
            entry.dtype,
            entry.engine,
            entry.exactness.label,
            entry.codec,
            f"{entry.nbytes / _MIB:.2f}",
            _time(entry.used),
        )
    Console(file=sys.stdout).print(table)


def _table(*headings: str, right: tuple[int, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number in right else "left", no_wrap=True)
    return table


def _plain(entry: StoredSegment) -> dict[str, object]:
    return {**asdict(entry), "exactness": entry.exactness.label}


def _quoted(tenant: str) -> str:
    return json.dumps(tenant) if not tenant.isprintable() or tenant.strip() != tenant or not tenant else tenant


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
