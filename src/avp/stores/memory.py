"""memory: segments of this process, kept as they come; gone when it ends."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import RLock

from avp.blob import Blob
from avp.errors import UsageError
from avp.manifest import Limits
from avp.protocols import Store, StoredSegment
from avp.segment import Want
from avp.stores.rows import Row, describe, is_whole, missing, too_large, usable, used_at
from avp.stores.settings import GIB, Settings

_ANY = Limits(bytes=2**62, header=2**62, tensors=2**62, layers=2**31, tokens=2**31)  # what this process made itself


@dataclass(slots=True)
class _Held:
    row: Row
    blob: Blob


class MemoryStore:
    """Blobs as they are, without a copy: their runs may be views of an engine's own memory, which they keep alive.

    The least lately used make room: first those of the tenant that exceeds `tenant_budget`, then any.
    """

    def __init__(
        self, budget: int = 4 * GIB, *, tenant_budget: int | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.budget, self.tenant_budget = budget, tenant_budget
        self._clock = clock
        self._lock = RLock()
        self._held: OrderedDict[str, _Held] = OrderedDict()  # least lately used first
        self._pages: defaultdict[tuple[str, str], set[str]] = defaultdict(set)  # (tenant, page) -> keys
        self._bytes: Counter[str] = Counter()  # by tenant

    def put(self, blob: Blob, *, tenant: str) -> None:
        """Keep a segment; what it replaces is the same segment. Raises as `Store.put`."""
        row = describe(blob, tenant=tenant, now=self._clock())
        room = min(self.budget, self.tenant_budget or self.budget)
        if row.stored.nbytes > room:
            raise too_large(row.stored.nbytes, room, fix="raise its budget, or cut smaller segments")
        with self._lock:
            self._drop(row.key)
            self._held[row.key] = _Held(row, blob)
            self._bytes[tenant] += row.stored.nbytes
            for page in row.pages:
                self._pages[tenant, page].add(row.key)
            self._make_room(tenant)

    def have(self, pages: Sequence[str], *, tenant: str, want: Want) -> list[bool]:
        """For each page, whether KV that will do is here."""
        with self._lock:
            return [any(want.accepts(row.stored) for row in self._rows(page, tenant)) for page in pages]

    def get(self, page: str, *, tenant: str, want: Want) -> Blob:
        """The best segment that holds the page. Raises as `Store.get`."""
        with self._lock:
            rows = usable(self._rows(page, tenant), page, want=want)
            if not rows:
                raise missing(page)
            held = self._held[rows[0].key]
            held.row = used_at(held.row, self._clock())
            self._held.move_to_end(rows[0].key)
            return held.blob

    def entries(self, *, tenant: str | None = None) -> Iterator[StoredSegment]:
        """What is here, most lately used first."""
        with self._lock:
            rows = [held.row.stored for held in reversed(self._held.values())]
        yield from (stored for stored in rows if tenant in (None, stored.tenant))

    def remove(self, page: str, *, tenant: str) -> int:
        """Forget every segment that holds the page; how many there were."""
        with self._lock:
            rows = self._rows(page, tenant)
            for row in rows:
                self._drop(row.key)
            return len(rows)

    def collect(self) -> int:
        """Forget what is over the budget; bytes that became free."""
        with self._lock:
            before = self._bytes.total()
            for tenant in list(self._bytes):
                self._make_room(tenant)
            return before - self._bytes.total()

    def verify(self) -> Iterator[StoredSegment]:
        """Hash all of it; the segments whose memory changed after they were put."""
        with self._lock:
            held = list(self._held.values())
        for each in held:
            if not is_whole(b"".join(each.blob.runs), each.row, limits=_ANY):
                yield each.row.stored

    def close(self) -> None:
        """Let go of all of it."""
        with self._lock:
            self._held.clear()
            self._pages.clear()
            self._bytes.clear()

    def _rows(self, page: str, tenant: str) -> list[Row]:
        return [self._held[key].row for key in self._pages.get((tenant, page), ())]

    def _make_room(self, tenant: str) -> None:
        own = self.budget if self.tenant_budget is None else self.tenant_budget
        while self._bytes[tenant] > own:
            self._drop(next(key for key, held in self._held.items() if held.row.stored.tenant == tenant))
        while self._bytes.total() > self.budget:
            self._drop(next(iter(self._held)))

    def _drop(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is None:
            return
        tenant = held.row.stored.tenant
        self._bytes[tenant] -= held.row.stored.nbytes
        if not self._bytes[tenant]:
            del self._bytes[tenant]
        for page in held.row.pages:
            keys = self._pages[tenant, page]
            keys.discard(key)
            if not keys:
                del self._pages[tenant, page]


def open_memory(url: str) -> Store:
    """`memory:?budget=4GiB&tenant_budget=1GiB`."""
    settings = Settings.of(url, known=("budget", "tenant_budget"))
    if settings.path:
        raise UsageError(f"{url!r} names a place, and memory has none. Fix: write memory:, and settings after a ?.")
    return MemoryStore(settings.size("budget") or 4 * GIB, tenant_budget=settings.size("tenant_budget"))
