"""The disk store: put and get of a context, against a plain file of the same bytes on the same disk."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from xxhash import xxh3_128_digest

from avp.bench.net_context import in_arena
from avp.bench.net_transfer import wire_bytes
from avp.bench.peer import Shape
from avp.bench.perf_figure import Clock, Figure, Target, compare, rounds, speed, timed
from avp.blob import seal
from avp.segment import Want
from avp.stores.disk import DiskStore

PUT = Target("one write of the same bytes to a new file and fsync, its time / time of all puts", at_least=0.5)
_GET = "its time / time to get all segments and check their digests"
GET = Target("the same bytes in one file, mapped, and one xxh3-128 of all of them, " + _GET, at_least=0.5)
GET_READ = Target(
    "the same bytes in one file, mapped, every byte read (a sum of 64-bit numbers), " + _GET, at_least=0.5
)


def disk(shape: Shape, folder: Path | None, *, n: int) -> list[Figure]:
    """Put and get, in a new folder in `folder` (None: the system's for temporary files)."""
    context = in_arena(shape)
    if context.model is None:
        raise AssertionError("a synthetic context has a model")
    blobs = [seal(context.model, segment) for segment in context.segments]
    data = wire_bytes(context)
    with tempfile.TemporaryDirectory(prefix="avp-net-", dir=folder) as name:
        plain, store = Path(name) / "plain", DiskStore(Path(name) / "store")
        want = Want(blobs[0].entry.engine, blobs[0].entry.dtype)

        def put() -> float:
            for blob in blobs:
                store.remove(blob.entry.pages[0], tenant="")
            started = perf_counter()
            for blob in blobs:
                store.put(blob, tenant="")
            return perf_counter() - started

        def get() -> float:
            started = perf_counter()
            found = [store.get(blob.entry.pages[0], tenant="", want=want).verify() for blob in blobs]
            seconds = perf_counter() - started
            del found
            return seconds

        def write() -> float:
            plain.unlink(missing_ok=True)
            started = perf_counter()
            _write(plain, data)
            return perf_counter() - started

        def read(use: Callable[[memoryview], object]) -> Clock:
            return timed(lambda: _read(plain, use))

        _write(plain, data)
        put()
        seconds = rounds({"put": put, "write": write}, n) | rounds(
            {"get": get, "hash": read(xxh3_128_digest), "read": read(_sum)}, n
        )
        store.close()
    detail: dict[str, object] = {"bytes": len(data), **{f"{each}_seconds": median(seconds[each]) for each in seconds}}
    detail |= {f"{each}_GB_per_s": speed(len(data), values) for each, values in seconds.items()}
    return [
        compare("disk_put", seconds["write"], seconds["put"], PUT, **detail),
        compare("disk_get", seconds["hash"], seconds["get"], GET, **detail),
        compare("disk_get_read", seconds["read"], seconds["get"], GET_READ, **detail),
    ]


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())


def _read(path: Path, use: Callable[[memoryview], object]) -> None:
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        use(view)


def _sum(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint64, count=len(view) // 8).sum())
