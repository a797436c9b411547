"""redis: segments in Redis or Valkey, for agents on several machines.

```
<prefix>{<tenant>}:b:<key>   a segment: a bundle
<prefix>{<tenant>}:p:<page>  a hash: key of each segment that holds the page -> its row, as JSON
```

The braces keep a tenant in one slot of a cluster. A page whose bundle Redis has evicted counts as absent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast
from urllib.parse import urlsplit

import redis

from avp.blob import Blob
from avp.errors import BundleError, StoreFailed
from avp.manifest import Limits
from avp.protocols import Store, StoredSegment
from avp.segment import Want
from avp.stores.rows import (
    Row,
    describe,
    is_whole,
    missing,
    open_row,
    row_to_json,
    rows_from_json,
    tenant_key,
    too_large,
    usable,
    used_at,
)
from avp.stores.settings import Settings

LARGEST = 512 * 2**20  # of a value, unless proto-max-bulk-len says otherwise
PREFIX = "avp:"
_CHUNK = 256  # keys in one command

# For each page (KEYS), the rows whose bundle is here. ARGV[1]: what the names of bundles begin with.
_ROWS = """
local found = {}
for i, page in ipairs(KEYS) do
  local rows, fields = {}, redis.call('HGETALL', page)
  for j = 1, #fields, 2 do
    if redis.call('EXISTS', ARGV[1] .. fields[j]) == 1 then rows[#rows + 1] = fields[j + 1] end
  end
  found[i] = rows
end
return found
"""


class RedisStore:
    """Segments in a Redis that any number of machines share.

    ttl: seconds after its last put for which a segment is held. The budget is Redis' own: `maxmemory`, with a
    `maxmemory-policy` that evicts. timeout: seconds that an answer may take.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl: int | None = None,
        prefix: str = PREFIX,
        timeout: float = 30.0,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.ttl, self.prefix, self.limits = ttl, prefix, limits or Limits()
        self._clock = clock
        self._place = urlsplit(url).hostname or urlsplit(url).path
        try:
            self._redis = redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=min(timeout, 10.0))
        except ValueError as error:
            raise StoreFailed(f"no Redis can be at that URL: {error}. Fix: write redis://host:port/0.") from error
        self._rows_of = self._redis.register_script(_ROWS)

    def put(self, blob: Blob, *, tenant: str) -> None:
        """Keep a segment, in one round trip. Raises as `Store.put`."""
        row = describe(blob, tenant=tenant, now=self._clock())
        if row.stored.nbytes > LARGEST:
            raise too_large(row.stored.nbytes, LARGEST, fix="cut smaller segments; Redis takes no larger value")
        value = row_to_json(row)
        with self._translated(), self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self._bundle(row), b"".join(blob.runs), ex=self.ttl)
            for page in row.pages:
                name = self._page(page, tenant)
                pipe.hset(name, row.key, value)
                if self.ttl is not None:
                    pipe.expire(name, self.ttl)
                else:
                    pipe.persist(name)
            pipe.execute()

    def have(self, pages: Sequence[str], *, tenant: str, want: Want) -> list[bool]:
        """For each page, whether KV that will do is here; one round trip for each few thousand pages."""
        found: list[bool] = []
        for first in range(0, len(pages), 4096):
            for rows in self._rows(pages[first : first + 4096], tenant):
                found.append(any(want.accepts(row.stored) for row in rows))
        return found

    def get(self, page: str, *, tenant: str, want: Want) -> Blob:
        """The best segment that holds the page. Raises as `Store.get`."""
        for row in usable(self._rows([page], tenant)[0], page, want=want):
            data = self._read(row)
            if data is not None:
                try:
                    return open_row(data, row, limits=self.limits)
                except BundleError:
                    if row in self._rows([page], tenant)[0]:
                        raise
                    return self.get(page, tenant=tenant, want=want)  # it was put anew in between
        raise missing(page)

    def entries(self, *, tenant: str | None = None) -> Iterator[StoredSegment]:
        """What is here, most lately used first, as far as Redis says (not with an LFU policy)."""
        rows = [used_at(row, self._used(row)) for row in self._all(tenant)]
        yield from (row.stored for row in sorted(rows, key=lambda row: -row.stored.used))

    def remove(self, page: str, *, tenant: str) -> int:
        """Forget every segment that holds the page; how many there were."""
        rows = self._rows([page], tenant)[0]
        with self._translated(), self._redis.pipeline(transaction=True) as pipe:
            for row in rows:
                pipe.delete(self._bundle(row))
                for each in row.pages:
                    pipe.hdel(self._page(each, tenant), row.key)
            pipe.execute()
        return len(rows)

    def collect(self) -> int:
        """Drop what the index says of bundles that Redis has evicted; bytes of bundles that became free: none, since
        Redis frees them itself.
        """
        for name in self._scan(f"{self.prefix}{{*}}:p:*"):
            with self._translated():
                fields = cast("list[bytes]", self._redis.hkeys(name))
                bundles = [name.rpartition(b":p:")[0] + b":b:" + field for field in fields]
                gone = [field for field, each in zip(fields, bundles, strict=True) if not self._redis.exists(each)]
                if gone:
                    self._redis.hdel(name, *gone)
        return 0

    def verify(self) -> Iterator[StoredSegment]:
        """Read all of it; the segments that are damaged."""
        for row in self._all(None):
            data = self._read(row)
            if data is not None and not is_whole(data, row, limits=self.limits):
                yield row.stored

    def close(self) -> None:
        """End the connections."""
        self._redis.close()

    def _bundle(self, row: Row) -> str:
        return f"{self._names(row.stored.tenant)}:b:{row.key}"

    def _page(self, page: str, tenant: str) -> str:
        return f"{self._names(tenant)}:p:{page}"

    def _names(self, tenant: str) -> str:
        return f"{self.prefix}{{{tenant_key(tenant)}}}"

    def _read(self, row: Row) -> bytes | None:
        with self._translated():
            return cast("bytes | None", self._redis.get(self._bundle(row)))

    def _rows(self, pages: Sequence[str], tenant: str) -> list[list[Row]]:
        """For each page the rows whose bundle is here."""
        if not pages:
            return []
        names = [self._page(page, tenant) for page in pages]
        with self._translated():
            found = cast("list[list[bytes]]", self._rows_of(keys=names, args=[f"{self._names(tenant)}:b:"]))
        return [[row for row in rows_from_json(values) if row.stored.tenant == tenant] for values in found]

    def _all(self, tenant: str | None) -> list[Row]:
        rows: dict[str, Row] = {}
        for name in self._scan(f"{self.prefix}{{{'*' if tenant is None else tenant_key(tenant)}}}:p:*"):
            with self._translated():
                values = cast("list[bytes]", self._redis.hvals(name))
            rows |= {row.key: row for row in rows_from_json(values)}
        with self._translated():
            return [row for row in rows.values() if self._redis.exists(self._bundle(row))]

    def _scan(self, pattern: str) -> Iterator[bytes]:
        with self._translated():
            yield from cast("Iterator[bytes]", self._redis.scan_iter(match=pattern, count=_CHUNK))

    def _used(self, row: Row) -> float:
        """When it was last read or written, by the seconds that Redis counts."""
        try:
            with self._translated():
                idle = cast("int | None", self._redis.object("IDLETIME", self._bundle(row)))
        except StoreFailed:
            return row.stored.created
        return row.stored.created if idle is None else max(self._clock() - idle, row.stored.created)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except redis.exceptions.ConnectionError as error:
            raise StoreFailed(
                f"Redis at {self._place} cannot be reached: {error}. Fix: start it, or correct the store's URL."
            ) from error
        except redis.exceptions.TimeoutError as error:
            raise StoreFailed(f"Redis at {self._place} did not answer in time. Fix: see what keeps it busy.") from error
        except redis.exceptions.RedisError as error:
            raise StoreFailed(
                f"Redis at {self._place} refused: {error}. Fix: if it is out of memory, raise maxmemory or set "
                "maxmemory-policy allkeys-lru; else see its log and rights."
            ) from error


def open_redis(url: str) -> Store:
    """`redis://host:port/0?ttl=7d&prefix=avp:&timeout=30s`; `rediss://` for TLS. No budget: Redis has its maxmemory."""
    settings = Settings.of(url, known=("ttl", "prefix", "timeout"))
    prefix, timeout = settings.text("prefix") or PREFIX, settings.seconds("timeout") or 30
    bare = urlsplit(url)._replace(query="").geturl()
    return RedisStore(bare, ttl=settings.seconds("ttl"), prefix=prefix, timeout=timeout)
