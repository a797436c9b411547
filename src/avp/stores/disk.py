"""disk: segments as files, the default. What is put survives the process, and a crash of it at any moment.

```
segments/<2 hex>/<tenant>-<key>-<header>.avp  a segment, a bundle; <header> is the xxh3-128 of its header
tenants/<tenant>                              the tenant's name, of which <tenant> is the hash
index-<number>.sqlite                         which pages are where; built again from the files if need be
tmp/                                          what is being written
```

A file gets its name, and the index its row, in one transaction, after its bytes are on the disk. It is unlinked in one
as well: whoever has it mapped reads on.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TypeVar
from urllib.parse import urlsplit

from avp.blob import Blob, open_blob
from avp.bundle import read_head
from avp.errors import BundleError, MissingExtra, StoreFailed, UnsupportedBundle, UsageError
from avp.folders import cache_dir
from avp.manifest import Limits
from avp.protocols import Store, StoredSegment
from avp.segment import Want
from avp.stores import index
from avp.stores.files import map_file, size_of, sync_folder, translated, write_scratch
from avp.stores.rows import Row, describe, is_whole, missing, open_row, tenant_key, too_large, usable
from avp.stores.settings import GIB, Settings
from avp.table import Head

Result = TypeVar("Result")
BUDGET = 20 * GIB
LEFTOVER_SECONDS = 3600  # a file in tmp/ that is older belongs to nobody
_HEADS = 1024  # headers that are kept as they were read
_NOTED = 128  # uses that are noted in one transaction, at the latest after so many seconds:
_NOTE_SECONDS = 5.0


class DiskStore:
    """Segments in a folder that any number of threads and processes share; each process opens its own after a fork.

    budget: bytes of all segments, of all tenants; the least lately used make room. ttl: seconds after its last put for
    which a segment is held; reading does not prolong it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        budget: int = BUDGET,
        ttl: float | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.budget, self.ttl, self.limits = budget, ttl, limits or Limits()
        self._clock = clock
        self._segments, self._tenants = self.folder / "segments", self.folder / "tenants"
        self._tmp = self.folder / "tmp"
        self._named: set[str] = set()  # tenants whose name is on the disk
        self._made: set[Path] = set()  # folders of segments that are on the disk themselves
        self._mutex = Lock()
        self._heads: dict[tuple[str, str], Head] = {}  # of segments that were read: their files are mapped, no more
        self._uses: dict[str, float] = {}  # not noted in the index yet: key -> when
        with translated(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in (self._segments, self._tenants, self._tmp):
                path.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self.folder)
            self._index = index.Index(self.folder, fill=self._adopt)
            self._index.read(index.held_bytes)

    def put(self, blob: Blob, *, tenant: str) -> None:
        """Keep a segment; it is on the disk when this returns. Raises as `Store.put`."""
        row = describe(blob, tenant=tenant, now=self._clock())
        if row.stored.nbytes > self.budget:
            raise too_large(row.stored.nbytes, self.budget, fix="raise its budget, or cut smaller segments")
        with translated(self.folder):
            held = self._index.read(lambda connection: index.find(connection, row.key))
            if held is not None and self._is_here(held, row):
                return
            target = self._path(row)
            self._name(tenant)
            self._make(target.parent)
            scratch = write_scratch(self._tmp, blob.runs, time=row.stored.created)
            try:
                self._write(lambda connection: self._place(connection, row, scratch))
            finally:
                scratch.unlink(missing_ok=True)
            sync_folder(target.parent)
            if held is not None and held.header != row.header:
                self._write(lambda connection: self._discard(connection, held))

    def have(self, pages: Sequence[str], *, tenant: str, want: Want) -> list[bool]:
        """For each page, whether KV that will do is here."""
        since = self._since()
        rows = self._index.read(lambda connection: index.holding(connection, pages, tenant=tenant, since=since))
        here = {page for row in rows if want.accepts(row.stored) for page in row.pages}
        return [page in here for page in pages]

    def get(self, page: str, *, tenant: str, want: Want) -> Blob:
        """The best segment that holds the page, mapped; each tensor is checked at its first use.

        Raises:
            SegmentMissing: there is none that will do. BundleError: its header is damaged. StoreFailed: it cannot be
            read.
        """
        since = self._since()
        rows = self._index.read(lambda connection: index.holding(connection, [page], tenant=tenant, since=since))
        for row in usable(rows, page, want=want):
            try:
                with translated(self.folder):
                    blob = self._open(row)
            except _GoneError:
                self._repair(row)
                return self.get(page, tenant=tenant, want=want)
            self._touch(row)
            return blob
        raise missing(page)

    def entries(self, *, tenant: str | None = None) -> Iterator[StoredSegment]:
        """What is here, most lately used first; of all tenants where None."""
        yield from (row.stored for row in self._rows(tenant))

    def remove(self, page: str, *, tenant: str) -> int:
        """Forget every segment that holds the page; how many there were."""

        def forget(connection: sqlite3.Connection) -> int:
            rows = index.holding(connection, [page], tenant=tenant, since=float("-inf"))
            for row in rows:
                self._forget(connection, row)
            return len(rows)

        with translated(self.folder):
            return self._write(forget)

    def collect(self) -> int:
        """Forget what is expired, unreadable, left over by a crash, or over the budget; bytes that became free."""
        with translated(self.folder):
            self._index.check()
            freed = self._sweep()
            return freed + self._write(self._tidy)

    def verify(self) -> Iterator[StoredSegment]:
        """Read all of it; the segments that are damaged."""
        for row in self._rows(None):
            try:
                data = self._path(row).read_bytes()
            except FileNotFoundError:
                self._repair(row)
                continue
            except OSError:  # the disk cannot read it
                yield row.stored
                continue
            if not is_whole(data, row, limits=self.limits):
                yield row.stored

    def close(self) -> None:
        """Let go of the index; the next use opens it again."""
        self._note()
        self._index.close()

    # --- rows and files

    def _rows(self, tenant: str | None) -> list[Row]:
        self._note()
        since = self._since()
        return self._index.read(lambda connection: index.latest(connection, tenant=tenant, since=since))

    def _since(self) -> float:
        return float("-inf") if self.ttl is None else self._clock() - self.ttl

    def _path(self, row: Row) -> Path:
        return self._segments / row.key[:2] / f"{tenant_key(row.stored.tenant)}-{row.key}-{row.header}.avp"

    def _open(self, row: Row) -> Blob:
        try:
            data = map_file(self._path(row))
        except FileNotFoundError as error:
            raise _GoneError from error
        name = row.key, row.header
        head = self._heads.get(name) or read_head(data, limits=self.limits)
        blob = open_row(data, row, limits=self.limits, head=head)
        with self._mutex:
            self._heads[name] = head
            while len(self._heads) > _HEADS:
                del self._heads[next(iter(self._heads))]
        return blob

    def _touch(self, row: Row) -> None:
        now = self._clock()
        with self._mutex:
            first = next(iter(self._uses.values()), now)
            self._uses[row.key] = now
            due = len(self._uses) >= _NOTED or now - first >= _NOTE_SECONDS
        if due:
            self._note()

    def _note(self) -> None:
        """Tell the index of the uses since the last time."""
        if self._uses:
            with suppress(StoreFailed):  # a disk that is full can still be read
                self._write(lambda _connection: None)

    def _write(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """A transaction, which notes what was used before it."""
        with self._mutex:
            uses, self._uses = self._uses, {}

        def transaction(connection: sqlite3.Connection) -> Result:
            index.touch(connection, uses)
            return work(connection)

        return self._index.write(transaction)

    def _is_here(self, held: Row, row: Row) -> bool:
        """Whether these very bytes are here, whole; then they count as put anew. Damaged ones are written again."""
        try:
            whole = held.header == row.header and is_whole(map_file(self._path(row)), row, limits=self.limits)
        except (FileNotFoundError, BundleError):
            return False
        if not whole:
            return False
        now = row.stored.created

        def renew(connection: sqlite3.Connection) -> bool:
            try:
                os.utime(self._path(row), (now, now))
            except FileNotFoundError:  # it made room for others meanwhile
                return False
            index.insert(connection, row)
            return True

        return self._write(renew)

    # --- what is done within a transaction

    def _place(self, connection: sqlite3.Connection, row: Row, scratch: Path) -> None:
        try:
            os.replace(scratch, self._path(row))
        except FileNotFoundError:  # it has its name already, where the index had to be built again in between
            if not self._path(row).exists():
                raise
        index.insert(connection, row)
        self._make_room(connection, but=row.key)

    def _discard(self, connection: sqlite3.Connection, old: Row) -> None:
        """Delete the file of a row that another one took the place of."""
        now = index.find(connection, old.key)
        if now is None or now.header != old.header:
            self._path(old).unlink(missing_ok=True)

    def _make_room(self, connection: sqlite3.Connection, *, but: str = "") -> int:
        freed = 0
        if index.held_bytes(connection) > self.budget:
            freed += self._expire(connection)
        while index.held_bytes(connection) > self.budget:
            row = index.least_used(connection, but=but)
            if row is None:
                break
            freed += self._forget(connection, row)
        return freed

    def _expire(self, connection: sqlite3.Connection) -> int:
        return sum([self._forget(connection, row) for row in index.expired(connection, since=self._since())])

    def _forget(self, connection: sqlite3.Connection, row: Row) -> int:
        self._path(row).unlink(missing_ok=True)
        index.delete(connection, row.key)
        return row.stored.nbytes

    def _repair(self, row: Row) -> None:
        """Forget a row whose file is gone."""

        def forget(connection: sqlite3.Connection) -> None:
            now = index.find(connection, row.key)
            if now is not None and not self._path(now).exists():
                index.delete(connection, row.key)

        self._write(forget)

    def _adopt(self, connection: sqlite3.Connection) -> list[Path]:
        """A row for every file that has none; the files that deserve none: damaged, or one too many."""
        bad: list[Path] = []
        tenants = dict(filter(None, map(_tenant_of, self._tenants.iterdir())))
        for path in self._segments.glob("*/*.avp"):
            home, _, rest = path.name.partition("-")
            row = index.find(connection, rest.partition("-")[0])
            if (row is not None and self._path(row) == path) or home not in tenants:
                continue
            try:
                found = self._read_row(path, tenants[home])
            except (UnsupportedBundle, MissingExtra):  # somebody else can read it
                continue
            except BundleError:
                bad.append(path)
                continue
            if row is None:
                index.insert(connection, found)
            else:
                bad.append(path)
        return bad

    def _read_row(self, path: Path, tenant: str) -> Row:
        """What a file says that it is."""
        row = describe(open_blob(map_file(path), limits=self.limits), tenant=tenant, now=path.stat().st_mtime)
        if self._path(row) != path:
            raise BundleError(f"{path} is not what its name says. Fix: run `avp store gc`.")
        return row

    def _tidy(self, connection: sqlite3.Connection) -> int:
        """Rows and files made to agree; then what is expired or over the budget is forgotten."""
        freed = 0
        for row in index.latest(connection, tenant=None, since=float("-inf")):
            size = size_of(self._path(row))
            if size != row.stored.nbytes:
                self._forget(connection, row)
                freed += max(size, 0)
        for path in self._adopt(connection):
            freed += max(size_of(path), 0)
            path.unlink(missing_ok=True)
        return freed + self._expire(connection) + self._make_room(connection)

    def _name(self, tenant: str) -> None:
        """See the tenant's name onto the disk, so that its files can be told from others' without the index."""
        if tenant not in self._named:
            path = self._tenants / tenant_key(tenant)
            if not path.exists():
                name = memoryview(tenant.encode(errors="surrogatepass"))
                os.replace(write_scratch(self._tmp, [name], time=self._clock()), path)
            sync_folder(self._tenants)
            self._named.add(tenant)

    def _make(self, folder: Path) -> None:
        """See one of the 256 folders of segments onto the disk."""
        if folder not in self._made or not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            made = set(self._segments.iterdir())
            sync_folder(self._segments)
            self._made |= made

    def _sweep(self) -> int:
        """What writers that died left behind."""
        freed = 0
        for path in self._tmp.iterdir():
            with suppress(FileNotFoundError):
                found = path.stat()
                if self._clock() - found.st_ctime > LEFTOVER_SECONDS:
                    path.unlink()
                    freed += found.st_size
        return freed


class _GoneError(Exception):
    """The file of a row was unlinked."""


def _tenant_of(path: Path) -> tuple[str, str] | None:
    """The key and the name of the tenant that a file of tenants/ names; None if it is no such file."""
    try:
        name = path.read_bytes().decode(errors="surrogatepass")
    except (OSError, UnicodeDecodeError):
        return None
    return (path.name, name) if tenant_key(name) == path.name else None


def open_disk(url: str) -> Store:
    """`disk:/path?budget=20GiB&ttl=7d`; `disk:` alone is the folder of the user's cache."""
    settings = Settings.of(url, known=("budget", "ttl"))
    if urlsplit(url).netloc:
        raise UsageError(f"{url!r} names a host, and a disk store is of this one. Fix: write disk:/path.")
    folder = Path(settings.path) if settings.path else cache_dir() / "store"
    return DiskStore(folder, budget=settings.size("budget") or BUDGET, ttl=settings.seconds("ttl"))
