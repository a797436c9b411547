"""s3: segments in a bucket of S3, or of a server that speaks it, for agents on several machines.

```
<prefix>/<tenant>/segments/<key>-<header>.avp  a segment, a bundle; <header> is the xxh3-128 of its header
<prefix>/<tenant>/rows/<key>.json              its row
<prefix>/<tenant>/pages/<page>/<variant>       the row of a segment that holds the page; <variant>: class, dtype, engine
```

S3 charges by request, and a listing costs twelve times a look-up. So the name of a page's row is told by what is
wanted: `have` reads one small object for each page and asks for each segment once, all at the same time; only what is
not here in exactly that form is listed. The bundle is written before the rows that lead to it, and deleted after them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlsplit

import obstore
from blake3 import blake3
from obstore.exceptions import BaseError
from obstore.store import S3Store as Bucket

from avp.blob import Blob
from avp.errors import AVPError, LimitExceeded, StoreFailed, UsageError
from avp.identity import canonical_json
from avp.manifest import Limits
from avp.protocols import Store, StoredSegment
from avp.segment import Exactness, Want
from avp.stores.rows import (
    Row,
    describe,
    is_whole,
    missing,
    open_row,
    row_to_json,
    rows_from_json,
    tenant_key,
    usable,
)
from avp.stores.settings import Settings

Given = TypeVar("Given")
Result = TypeVar("Result")
_AT_ONCE = 32  # requests
_ONE_PUT = 64 * 2**20  # bytes; what is larger is sent in parts
_RETRY_SECONDS = 30
_STRAY_SECONDS = 86400  # a bundle without rows that is younger may still get them


class S3Store:
    """Segments in a bucket that any number of machines share.

    It has no budget and no ttl of its own: give the bucket a lifecycle rule. Credentials are those of the environment
    (AWS_ACCESS_KEY_ID and so on) or of the machine. `used` is the time of the put: reads are not noted.
    """

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "",
        endpoint: str | None = None,
        region: str | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.bucket, self.prefix, self.limits = bucket, prefix.strip("/"), limits or Limits()
        self._clock = clock
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="avp-s3")
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        with self._translated():
            self._s3 = Bucket(
                bucket,
                config={
                    **({"endpoint": endpoint} if endpoint else {}),
                    **({"region": region} if region else {}),
                },
                client_options={
                    "allow_http": bool(endpoint) and str(endpoint).startswith("http://"),
                    "connect_timeout": timedelta(seconds=10),
                    "timeout": timedelta(seconds=300),
                },
                retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)},
            )

    def put(self, blob: Blob, *, tenant: str) -> None:
        """Keep a segment: the bundle, then what leads to it. Raises as `Store.put`."""
        row = describe(blob, tenant=tenant, now=self._clock())
        value = row_to_json(row)
        with self._translated():
            before = self._rows_in([self._row(row)])
            self._write(self._segment(row), b"".join(blob.runs))
            self._write(self._row(row), value)
            self._lead_to(row)
            self._delete([self._segment(old) for old in before if old.header != row.header])

    def have(self, pages: Sequence[str], *, tenant: str, want: Want) -> list[bool]:
        """For each page, whether KV that will do is here."""
        unique = list(dict.fromkeys(pages))
        found = dict(zip(unique, self._rows(unique, tenant, want), strict=True))
        rows = {row.key: row for rows in found.values() for row in rows}
        segments = [self._segment(row) for row in rows.values()]
        here = dict(zip(rows, self._side_by_side(self._exists, segments), strict=True))
        return [any(here[row.key] and want.accepts(row.stored) for row in found[page]) for page in pages]

    def get(self, page: str, *, tenant: str, want: Want) -> Blob:
        """The best segment that holds the page. Raises as `Store.get`."""
        for row in usable(self._rows([page], tenant, want)[0], page, want=want):
            data = self._read(self._segment(row), largest=self.limits.bytes)
            if data is not None:
                return open_row(data, row, limits=self.limits)
        raise missing(page)

    def entries(self, *, tenant: str | None = None) -> Iterator[StoredSegment]:
        """What is here, most lately put first."""
        yield from (row.stored for row in self._all(tenant))

    def remove(self, page: str, *, tenant: str) -> int:
        """Forget every segment that holds the page; how many there were."""
        rows = self._all(tenant)
        gone = [row for row in rows if page in row.pages]
        for row in gone:
            self._forget(row)
        lost = {each for row in gone for each in row.pages}
        for row in rows:
            if row not in gone and lost & set(row.pages):  # the way to them may have been through those
                self._lead_to(row)
        return len(gone)

    def collect(self) -> int:
        """Drop rows whose bundle is gone, and bundles to which no row leads, if they are a day old; bytes that became
        free.
        """
        freed = 0
        for home in self._homes(None):
            bundles = {name: (size, age) for name, size, age in self._list(f"{home}/segments")}
            rows = self._read_rows([name for name, _, _ in self._list(f"{home}/rows")])
            for row in rows:
                if self._segment(row) not in bundles:
                    self._forget(row)
            strays = bundles.keys() - {self._segment(row) for row in rows}
            old = [name for name in strays if bundles[name][1] > _STRAY_SECONDS]
            self._delete(old)
            freed += sum(bundles[name][0] for name in old)
        return freed

    def verify(self) -> Iterator[StoredSegment]:
        """Read all of it; the segments that are damaged."""
        for row in self._all(None):
            data = self._read(self._segment(row))
            if data is not None and not is_whole(data, row, limits=self.limits):
                yield row.stored

    def close(self) -> None:
        """End the threads that ask; the store is not to be used after."""
        self._pool.shutdown()

    # --- rows

    def _rows(self, pages: Sequence[str], tenant: str, want: Want) -> list[list[Row]]:
        """For each page the rows of segments that may do; that of the very form that is wanted spares the listing."""
        own = _variant(Exactness.EXACT, want.dtype, want.engine)

        def read(page: str) -> list[Row]:
            rows = self._rows_in([f"{self._page(page, tenant)}/{own}"])
            if not rows and want.at_least > Exactness.EXACT:
                rows = self._rows_in([name for name, _, _ in self._list(self._page(page, tenant))])
            return [row for row in rows if row.stored.tenant == tenant]

        return self._side_by_side(read, pages)

    def _lead_to(self, row: Row) -> None:
        """Write the page rows of a segment."""
        value = row_to_json(row)
        self._side_by_side(lambda name: self._write(name, value), self._not_better(row))

    def _not_better(self, row: Row) -> list[str]:
        """The names of the page rows that this segment is to have: all but those of segments with more pages from
        there.
        """
        stored = row.stored
        variant = _variant(stored.exactness, stored.dtype, stored.engine)
        names = {page: f"{self._page(page, stored.tenant)}/{variant}" for page in row.pages}
        held = self._side_by_side(lambda name: self._rows_in([name]), names.values())
        better = {
            page: other
            for page, rows in zip(names, held, strict=True)
            for other in rows
            if page in other.pages and _beyond(other, page) > _beyond(row, page)
        }
        segments = {self._segment(other) for other in better.values()}
        here = dict(zip(segments, self._side_by_side(self._exists, segments), strict=True))
        return [name for page, name in names.items() if page not in better or not here[self._segment(better[page])]]

    def _all(self, tenant: str | None) -> list[Row]:
        """All rows whose bundle is here, latest first."""
        rows: list[Row] = []
        for home in self._homes(tenant):
            bundles = {name for name, _, _ in self._list(f"{home}/segments")}
            found = self._read_rows([name for name, _, _ in self._list(f"{home}/rows")])
            rows.extend(row for row in found if self._segment(row) in bundles)
        return sorted(rows, key=lambda row: -row.stored.created)

    def _read_rows(self, names: Iterable[str]) -> list[Row]:
        """The rows of any number of objects, read side by side."""
        return [row for rows in self._side_by_side(lambda name: self._rows_in([name]), names) for row in rows]

    def _rows_in(self, names: Iterable[str]) -> list[Row]:
        return rows_from_json([bytes(data) for data in map(self._read, names) if data is not None])

    def _forget(self, row: Row) -> None:
        """The rows first, then the bundle; rows that lead to another segment stay."""
        stored = row.stored
        variant = _variant(stored.exactness, stored.dtype, stored.engine)
        names = [f"{self._page(page, stored.tenant)}/{variant}" for page in row.pages]
        held = self._side_by_side(lambda name: self._rows_in([name]), names)
        mine = [name for name, rows in zip(names, held, strict=True) if any(each.key == row.key for each in rows)]
        self._delete([*mine, self._row(row)])
        self._delete([self._segment(row)])

    # --- objects

    def _segment(self, row: Row) -> str:
        return f"{self._home(row.stored.tenant)}/segments/{row.key}-{row.header}.avp"

    def _row(self, row: Row) -> str:
        return f"{self._home(row.stored.tenant)}/rows/{row.key}.json"

    def _page(self, page: str, tenant: str) -> str:
        return f"{self._home(tenant)}/pages/{page}"

    def _home(self, tenant: str) -> str:
        return f"{self.prefix}/{tenant_key(tenant)}".lstrip("/")

    def _homes(self, tenant: str | None) -> list[str]:
        """The folder of the tenant, or of each."""
        if tenant is not None:
            return [self._home(tenant)]
        with self._translated():
            return list(obstore.list_with_delimiter(self._s3, self.prefix or None)["common_prefixes"])

    def _write(self, name: str, data: bytes) -> None:
        obstore.put(self._s3, name, data, use_multipart=len(data) > _ONE_PUT)

    def _read(self, name: str, *, largest: int = 2**62) -> memoryview | None:
        """The bytes of an object; None if there is none."""
        with self._translated():
            try:
                found = obstore.get(self._s3, name)
                if found.meta["size"] > largest:
                    raise LimitExceeded(
                        f"the stored segment has {found.meta['size']} bytes; at most {largest} are allowed. "
                        "Fix: raise Limits.bytes."
                    )
                return memoryview(found.bytes())
            except FileNotFoundError:
                return None

    def _exists(self, name: str) -> bool:
        with self._translated():
            try:
                obstore.head(self._s3, name)
            except FileNotFoundError:
                return False
            return True

    def _list(self, below: str) -> Iterator[tuple[str, int, float]]:
        """Name, bytes and age in seconds of each object below a folder."""
        with self._translated():
            for chunk in obstore.list(self._s3, below, chunk_size=1000):
                for meta in chunk:
                    yield meta["path"], meta["size"], self._clock() - meta["last_modified"].timestamp()

    def _delete(self, names: Sequence[str]) -> None:
        with self._translated():
            if names:
                obstore.delete(self._s3, list(names))

    def _side_by_side(self, work: Callable[[Given], Result], each: Iterable[Given]) -> list[Result]:
        return list(self._pool.map(work, each))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            if isinstance(error, AVPError):
                raise
            said = " ".join(str(error).split())[:500]
            raise StoreFailed(
                f"the bucket {self.bucket} cannot be used: {said}. Fix: see that it exists, that endpoint "
                "and region are right, and that AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY may read and write it."
            ) from error


def _variant(exactness: Exactness, dtype: str, engine: str) -> str:
    return blake3(canonical_json([exactness.label, dtype, engine]).encode()).hexdigest(length=8)


def _beyond(row: Row, page: str) -> int:
    return len(row.pages) - row.pages.index(page)


def open_s3(url: str) -> Store:
    """`s3://bucket/prefix?endpoint=http://host:9000&region=eu-west-1`."""
    settings = Settings.of(url, known=("endpoint", "region"))
    bucket = urlsplit(url).netloc
    if not bucket or "@" in bucket:
        raise UsageError(f"{url!r} names no bucket. Fix: write s3://bucket/prefix; keys come from the environment.")
    return S3Store(bucket, prefix=settings.path, endpoint=settings.text("endpoint"), region=settings.text("region"))
