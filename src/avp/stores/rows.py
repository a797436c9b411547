"""What a store notes of a segment, and how it chooses among several and checks what it reads back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

import xxhash
from blake3 import blake3

from avp.blob import Blob, open_blob
from avp.errors import AVPError, BundleError, SegmentMissing, StoreFailed
from avp.identity import canonical_json
from avp.manifest import Limits, SegmentEntry
from avp.protocols import StoredSegment
from avp.segment import Exactness, Want
from avp.table import Head


@dataclass(frozen=True, slots=True)
class Row:
    """One segment: its name in the store, the ids of its pages, and the xxh3-128 of its bundle's header.

    The header is what the digests of tensors do not cover.
    """

    key: str
    pages: tuple[str, ...]
    header: str
    stored: StoredSegment


def describe(blob: Blob, *, tenant: str, now: float) -> Row:
    """What a store notes of a blob that comes in at the time `now`."""
    entry = blob.entry
    stored = StoredSegment(
        tenant,
        entry.pages[-1],
        entry.start,
        entry.count,
        entry.dtype,
        entry.engine,
        entry.exactness,
        entry.codec,
        blob.nbytes,
        now,
        now,
    )
    return Row(segment_key(entry, tenant=tenant), entry.pages, header_digest(blob), stored)


def segment_key(entry: SegmentEntry, *, tenant: str) -> str:
    """The name of a segment: BLAKE3 of all that tells it from others; equal on every machine. 64 hex digits."""
    form = [entry.dtype, entry.engine, entry.exactness.label, entry.codec]
    return blake3(b"avp-store-1\0" + canonical_json([tenant, entry.pages[-1], entry.start, *form]).encode()).hexdigest()


def tenant_key(tenant: str) -> str:
    """A tenant's name as 32 hex digits, whatever characters it holds."""
    return blake3(b"avp-tenant-1\0" + tenant.encode(errors="surrogatepass")).hexdigest(length=16)


def header_digest(blob: Blob) -> str:
    """xxh3-128 of a bundle up to its first tensor."""
    return xxhash.xxh3_128_hexdigest(blob.header)


def usable(rows: Iterable[Row], page: str, *, want: Want) -> list[Row]:
    """Those of the rows that hold the page in a form that will do, the best first."""
    found = [row for row in rows if page in row.pages and want.accepts(row.stored)]
    return sorted(found, key=lambda row: _rank(row, page, want))


def _rank(row: Row, page: str, want: Want) -> tuple[Exactness, Exactness, int, float]:
    """Smallest for the best class, as the receiver has it and as it is stored, then for most pages from this one."""
    beyond = len(row.pages) - row.pages.index(page)
    return want.grade(row.stored), row.stored.exactness, -beyond, -row.stored.used


def open_row(data: bytes | memoryview, row: Row, *, limits: Limits, head: Head | None = None) -> Blob:
    """The blob that a store kept under `row`; its tensors are checked at their first use. `head`: what was read of this
    header before.

    Raises:
        BundleError: the header is damaged, or is that of another segment.
    """
    blob = open_blob(data, limits=limits, head=head)
    if header_digest(blob) != row.header or segment_key(blob.entry, tenant=row.stored.tenant) != row.key:
        raise BundleError(
            f"the header of the stored segment {row.stored.page[:12]}… is not the one that was written. "
            "Nothing of it was used. Fix: remove it (`avp store verify --repair`) and hand over again."
        )
    return blob


def is_whole(data: bytes | memoryview, row: Row, *, limits: Limits) -> bool:
    """Whether every byte is as it was written."""
    try:
        open_row(data, row, limits=limits).verify()
    except BundleError:
        return False
    return True


def missing(page: str) -> SegmentMissing:
    """The error of `get` where nothing will do."""
    return SegmentMissing(
        f"the store holds no KV of page {page[:12]}… that will do: it was never put, was removed, expired or made room "
        "for others, or is of another engine, dtype or class. Fix: compute it again, or accept a lower class."
    )


def too_large(nbytes: int, budget: int, *, fix: str) -> StoreFailed:
    """The error of `put` for a segment that cannot fit."""
    return StoreFailed(f"a segment of {nbytes} bytes does not fit a store of at most {budget}. Fix: {fix}.")


def row_to_json(row: Row) -> bytes:
    """The row for stores whose index is made of small values."""
    stored = row.stored
    value = {
        "tenant": stored.tenant,
        "pages": "".join(row.pages),
        "start": stored.start,
        "count": stored.count,
        "dtype": stored.dtype,
        "engine": stored.engine,
        "exactness": stored.exactness.label,
        "codec": stored.codec,
        "nbytes": stored.nbytes,
        "created": stored.created,
        "header": row.header,
        "key": row.key,
    }
    return canonical_json(value).encode()


def rows_from_json(values: Iterable[bytes]) -> list[Row]:
    """The rows again; a value that is none counts as absent."""
    rows: list[Row] = []
    for value in values:
        try:
            rows.append(_row(json.loads(value)))
        except (ValueError, KeyError, TypeError, AVPError):
            continue
    return rows


def _row(value: dict[str, str | float]) -> Row:
    pages = bytes.fromhex(_text(value["pages"]))
    ids = tuple(pages[i : i + 32].hex() for i in range(0, len(pages), 32))
    created = float(value["created"])
    stored = StoredSegment(
        _text(value["tenant"]),
        ids[-1] if ids else "",
        int(value["start"]),
        int(value["count"]),
        _text(value["dtype"]),
        _text(value["engine"]),
        Exactness.parse(_text(value["exactness"])),
        _text(value["codec"]),
        int(value["nbytes"]),
        created,
        created,
    )
    return Row(_text(value["key"]), ids, _text(value["header"]), stored)


def _text(value: str | float) -> str:
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value


def used_at(row: Row, used: float) -> Row:
    """The row with the time of its last use."""
    return replace(row, stored=replace(row.stored, used=used))
