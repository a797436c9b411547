"""Files of a store: written whole or not at all, read as mappings; what goes wrong with them, said plainly."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from avp.buffers import write_runs
from avp.errors import StoreFailed, TruncatedBundle


def write_scratch(folder: Path, runs: Sequence[memoryview], *, time: float) -> Path:
    """A new file in `folder` of these bytes, mode 0600, on the disk when this returns; `time` is its mtime."""
    fd, name = tempfile.mkstemp(dir=folder)
    try:
        try:
            write_runs(fd, runs)
            os.utime(fd, (time, time))
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def sync_folder(folder: Path) -> None:
    """See the names in a folder onto the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def map_file(path: Path) -> memoryview:
    """A file's bytes, mapped; they stay readable when it is unlinked."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise TruncatedBundle(f"the stored segment {path} is empty. Fix: run `avp store verify --repair`.")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def size_of(path: Path) -> int:
    """Bytes of a file; -1 if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


@contextmanager
def translated(folder: Path) -> Iterator[None]:
    """What the operating system refuses, as `StoreFailed`."""
    try:
        yield
    except StoreFailed:
        raise
    except OSError as error:
        raise StoreFailed(
            f"the store in {folder} cannot be used: {error.strerror or error}. Fix: {_fix(error)}."
        ) from error


def _fix(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space on that disk, or lower the budget and run `avp store gc`"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make the folder writable for this user, or choose another one (disk:/path)"
    return "choose a folder on a local disk that works (disk:/path)"
