"""The index of a store on disk: SQLite, for any number of threads and processes. The files are the truth: an index
that is lost or damaged is built again from them, under another number, so that nobody mixes up old and new.

Writers hold a shared lock on a file beside it, and whoever opens or builds one an exclusive lock; both end with their
process.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import TypeVar

from avp.errors import StoreFailed
from avp.protocols import StoredSegment
from avp.segment import Exactness
from avp.stores.files import translated
from avp.stores.rows import Row

Result = TypeVar("Result")
_VERSION = 1
_BUSY_SECONDS = 60.0
_TRIES = 16
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SCHEMA = f"""
PRAGMA journal_mode=WAL;
CREATE TABLE segments(
  key TEXT PRIMARY KEY, tenant TEXT NOT NULL, pages TEXT NOT NULL, header TEXT NOT NULL, start INTEGER NOT NULL,
  count INTEGER NOT NULL, dtype TEXT NOT NULL, engine TEXT NOT NULL, exactness INTEGER NOT NULL, codec TEXT NOT NULL,
  nbytes INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE pages(
  tenant TEXT NOT NULL, page TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY(tenant, page, key)
) WITHOUT ROWID;
CREATE INDEX pages_of ON pages(key);
CREATE INDEX by_use ON segments(used);
CREATE TABLE held(bytes INTEGER NOT NULL);
INSERT INTO held VALUES(0);
CREATE TRIGGER more AFTER INSERT ON segments BEGIN UPDATE held SET bytes = bytes + new.nbytes; END;
CREATE TRIGGER less AFTER DELETE ON segments BEGIN
  UPDATE held SET bytes = bytes - old.nbytes;
  DELETE FROM pages WHERE key = old.key;
END;
PRAGMA user_version={_VERSION};
"""


class Index:
    """The rows of a store; `fill` puts what the files say into an empty one."""

    def __init__(self, folder: Path, *, fill: Callable[[sqlite3.Connection], object]) -> None:
        self._folder, self._fill = folder, fill
        self._mutex = RLock()  # a connection is for one thread at a time
        self._open: tuple[Path, sqlite3.Connection] | None = None

    def read(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """What `work` finds; it may run more than once."""
        return self._run(work)

    def write(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Carry out `work` alone among all processes; all of it is kept, or nothing. It may run more than once."""

        def transaction(connection: sqlite3.Connection) -> Result:
            with self._locked(fcntl.LOCK_SH):
                connection.execute("BEGIN IMMEDIATE")
                try:
                    result = work(connection)
                    connection.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                    raise
                if not self._is_current():
                    raise _StaleError
                return result

        return self._run(transaction)

    def check(self) -> None:
        """Read all of the index; one that is damaged is built again."""

        def look(connection: sqlite3.Connection) -> str:
            return str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])

        with self._mutex, _translated(self._folder):
            if self._run(look) != "ok":
                self._renew()

    def close(self) -> None:
        """Let go of the connection; the next use opens another one."""
        with self._mutex:
            if self._open is not None:
                self._open[1].close()
                self._open = None

    def _run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        with self._mutex, _translated(self._folder):
            for _ in range(_TRIES):
                try:
                    return work(self._connection())
                except _StaleError:
                    continue
                except sqlite3.DatabaseError as error:
                    if _is_damage(error):
                        self._renew()
                    elif self._is_current():
                        raise
            raise sqlite3.OperationalError(f"it was lost or damaged {_TRIES} times in a row")

    def _is_current(self) -> bool:
        return self._open is not None and self._open[0].exists()

    def _connection(self) -> sqlite3.Connection:
        if self._open is not None and self._is_current():
            return self._open[1]
        self.close()
        with self._locked(fcntl.LOCK_EX):
            path = self._newest()
            connection = None if path is None else _connect(path)
            if path is None or connection is None:
                path = self._build()
                connection = _connect(path)
            if connection is None:
                raise sqlite3.OperationalError("a new index cannot be read")
            self._open = path, connection
            return connection

    def _renew(self) -> None:
        """Leave the index that is open for the one that took its place, or for a new one."""
        with self._locked(fcntl.LOCK_EX):
            stale = self._open[0] if self._open is not None else self._newest()
            self.close()
            if stale is None or stale == self._newest():
                self._build()

    def _build(self) -> Path:
        """A new index out of the files; the old ones are deleted."""
        old = sorted(self._folder.glob("index-*"))
        # By the clock, so that no name comes twice: whoever has a lost one open deletes its -wal by name.
        number = max([time.time_ns(), *(1 + _number(path) for path in old)])
        path = self._folder / f"index-{number}.sqlite"
        scratch = self._folder / "tmp" / path.name
        _delete_database(scratch)
        os.close(os.open(scratch, os.O_CREAT | os.O_WRONLY, 0o600))
        with closing(sqlite3.connect(scratch, isolation_level=None)) as connection:
            connection.executescript(_SCHEMA)
            connection.execute("BEGIN IMMEDIATE")
            self._fill(connection)
            connection.execute("COMMIT")
        os.replace(scratch, path)
        for each in old:
            each.unlink(missing_ok=True)
        return path

    def _newest(self) -> Path | None:
        return max(self._folder.glob("index-*.sqlite"), key=_number, default=None)

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        fd = os.open(self._folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, kind)
            yield
        finally:
            os.close(fd)


class _StaleError(Exception):
    """The index was replaced while it was written."""


def _connect(path: Path) -> sqlite3.Connection | None:
    """A connection; None if the file is no index of ours, or damaged."""
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("SELECT bytes FROM held").fetchone()
    except sqlite3.DatabaseError as error:
        connection.close()
        if _is_damage(error) or "no such table" in str(error):
            return None
        raise
    if version != _VERSION:
        connection.close()
        return None
    return connection


class _BadRowError(sqlite3.DatabaseError):
    """A row that nobody here wrote."""


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    return isinstance(error, _BadRowError) or (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGED


def _number(path: Path) -> int:
    digits = path.name.removeprefix("index-").partition(".")[0]
    return int(digits) if digits.isdecimal() else 0


def _delete_database(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        with translated(folder):
            yield
    except sqlite3.Error as error:
        raise StoreFailed(
            f"the index of the store in {folder} cannot be used: {error}. Fix: see that the disk is not full and the "
            "folder writable and not on a network; if it stays so, delete its index-* files: they are made again."
        ) from error


# --- rows


_FIELDS = "key, tenant, pages, header, start, count, dtype, engine, exactness, codec, nbytes, created, used"


def insert(connection: sqlite3.Connection, row: Row) -> None:
    """Add the row, in place of one of the same key."""
    delete(connection, row.key)
    stored = row.stored
    form = (stored.start, stored.count, stored.dtype, stored.engine, int(stored.exactness), stored.codec)
    head = (row.key, stored.tenant, "".join(row.pages), row.header)
    values = (*head, *form, stored.nbytes, stored.created, stored.used)
    connection.execute(f"INSERT INTO segments({_FIELDS}) VALUES({', '.join('?' * len(values))})", values)
    connection.executemany("INSERT INTO pages VALUES(?, ?, ?)", [(stored.tenant, page, row.key) for page in row.pages])


def delete(connection: sqlite3.Connection, key: str) -> None:
    """Forget a row, if it is there."""
    connection.execute("DELETE FROM segments WHERE key = ?", (key,))


def find(connection: sqlite3.Connection, key: str) -> Row | None:
    """The row of that key."""
    return next(_rows(connection, "WHERE key = ?", (key,)), None)


def holding(connection: sqlite3.Connection, pages: Sequence[str], *, tenant: str, since: float) -> list[Row]:
    """The rows, put at `since` or later, that hold any of the pages."""
    where = """WHERE created >= ? AND key IN
        (SELECT key FROM pages WHERE tenant = ? AND page IN (SELECT value FROM json_each(?)))"""
    return list(_rows(connection, where, (since, tenant, json.dumps(list(pages)))))


def latest(connection: sqlite3.Connection, *, tenant: str | None, since: float) -> list[Row]:
    """The rows, put at `since` or later, most lately used first."""
    where = "WHERE created >= ? AND (? IS NULL OR tenant = ?) ORDER BY used DESC"
    return list(_rows(connection, where, (since, tenant, tenant)))


def expired(connection: sqlite3.Connection, *, since: float) -> list[Row]:
    """The rows that were put before `since`."""
    return list(_rows(connection, "WHERE created < ?", (since,)))


def least_used(connection: sqlite3.Connection, *, but: str) -> Row | None:
    """The row that is least lately used, other than the one of the key `but`."""
    return next(_rows(connection, "WHERE key != ? ORDER BY used LIMIT 1", (but,)), None)


def touch(connection: sqlite3.Connection, uses: Mapping[str, float]) -> None:
    """Note when rows were used, by key."""
    values = [(used, key) for key, used in uses.items()]
    connection.executemany("UPDATE segments SET used = max(used, ?) WHERE key = ?", values)


def held_bytes(connection: sqlite3.Connection) -> int:
    """Bytes of all segments together."""
    return int(connection.execute("SELECT bytes FROM held").fetchone()[0])


def _rows(connection: sqlite3.Connection, where: str, values: tuple[str | float | None, ...]) -> Iterator[Row]:
    for key, tenant, pages, header, *rest in connection.execute(
        f"SELECT {_FIELDS} FROM segments {where}", values
    ).fetchall():
        start, count, dtype, engine, exactness, codec, nbytes, created, used = rest
        try:
            ids = tuple(pages[i : i + 64] for i in range(0, len(pages), 64))
            grade = Exactness(exactness)
            stored = StoredSegment(tenant, ids[-1], start, count, dtype, engine, grade, codec, nbytes, created, used)
        except (ValueError, IndexError, TypeError) as error:
            raise _BadRowError(f"the row {key!r} is damaged") from error
        yield Row(key, ids, header, stored)
