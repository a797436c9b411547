"""KV in memory that another process can map: a file in RAM, laid out as one arena.

K and V of a layer are [kv_heads, capacity, head_dim], K before V, layer by layer, without gaps. Positions that were
written never change.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import numpy.typing as npt
import xxhash

from avp.buffers import STORAGE, Buffer, itemsize
from avp.identity import CacheLayout

_GATHERED = 1 << 20  # bytes that are copied together before they are hashed: other threads run meanwhile


class MemoryFile:
    """A sparse file in RAM without a name; it lives as long as anything maps it."""

    def __init__(self, fd: int, size: int, path: str) -> None:
        self.fd, self.size, self.path = fd, size, path
        self.digests: dict[tuple[str, int, int, int], bytes] = {}  # of positions that were hashed: they never change
        weakref.finalize(self, _release, fd, path).atexit = not path.startswith("/proc/")  # else the system does it

    @classmethod
    def create(cls, size: int) -> MemoryFile:
        """A new one of `size` bytes, all zero; memory is taken only when it is written. On Linux its size is sealed, so
        that no mapping of it ever ends before its file does.
        """
        size = max(size, 1)
        if sys.platform == "linux":
            import fcntl

            fd = os.memfd_create("avp-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            path = f"/proc/self/fd/{fd}"
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        else:
            fd, path = tempfile.mkstemp(prefix="avp-kv-")
            os.ftruncate(fd, size)
        return cls(fd, size, path)

    @classmethod
    def adopt(cls, fd: int) -> MemoryFile:
        """One that another process made; the descriptor is ours from here on."""
        return cls(fd, os.fstat(fd).st_size, f"/proc/self/fd/{fd}")

    @cached_property
    def view(self) -> memoryview:
        """The bytes, read-only, mapped."""
        return memoryview(mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ))


def _release(fd: int, path: str) -> None:
    os.close(fd)
    if not path.startswith("/proc/"):
        os.unlink(path)


def arena_offsets(layout: CacheLayout, width: int, capacity: int) -> Iterator[tuple[int, int]]:
    """Byte offsets of K and of V, layer by layer; an element has `width` bytes."""
    offset = 0
    for layer in layout.layers:
        size = layer.kv_heads * capacity * layer.head_dim * width
        yield offset, offset + size
        offset += 2 * size


def arena_bytes(layout: CacheLayout, dtype: str, capacity: int) -> int:
    """Bytes of an arena of `capacity` positions."""
    return capacity * layout.bytes_per_token(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class SharedTensors:
    """The KV of the positions [start, stop) of an arena in a memory file; read in place."""

    file: MemoryFile
    layout: CacheLayout
    dtype: str
    capacity: int
    start: int
    stop: int
    offsets: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls, file: MemoryFile, layout: CacheLayout, dtype: str, capacity: int, start: int, stop: int
    ) -> SharedTensors:
        """The positions [start, stop) of the arena in `file`."""
        return cls(file, layout, dtype, capacity, start, stop, tuple(arena_offsets(layout, itemsize(dtype), capacity)))

    @property
    def fits(self) -> bool:
        """Whether these positions lie in the arena, and the arena in its file."""
        size = arena_bytes(self.layout, self.dtype, self.capacity)
        return 0 <= self.start < self.stop <= self.capacity and size <= self.file.size

    def read(self, layer: int, part: str) -> Buffer:
        """K or V of a layer, [kv_heads, stop - start, head_dim], a view."""
        heads, dim = self.layout.layers[layer].kv_heads, self.layout.layers[layer].head_dim
        shape = (heads, self.capacity, dim)
        offset = self.offsets[layer][part == "v"]
        rows = np.ndarray(shape, dtype=STORAGE[self.dtype], buffer=self.file.view, offset=offset)
        return Buffer(self.dtype, rows[:, self.start : self.stop])

    @property
    def digests(self) -> bytes:
        """xxh3-128 of K and of V, layer by layer; computed at the first asking, for all who show these positions."""
        found = self.file.digests.get(self._key)
        return self.hash() if found is None else found

    @property
    def hashed(self) -> bool:
        """Whether the digests are known."""
        return self._key in self.file.digests

    def hash(self) -> bytes:
        """The digests of what lies there now."""
        digests: list[bytes] = []
        for tensors in self._blocks():
            at_once = max(1, _GATHERED // tensors[0].nbytes)
            scratch = np.empty((at_once, *tensors.shape[1:]), tensors.dtype)
            for first in range(0, len(tensors), at_once):
                count = min(at_once, len(tensors) - first)
                np.copyto(scratch[:count], tensors[first : first + count])
                digests += [_digest(each) for each in scratch[:count]]
        found = self.file.digests[self._key] = b"".join(digests)
        return found

    def _blocks(self) -> Iterator[npt.NDArray[np.generic]]:
        """Neighbouring layers of one shape as one array, [2 * layers, kv_heads, stop - start, head_dim], a view."""
        first = 0
        for (heads, dim), layers in groupby(self.layout.layers, key=lambda layer: (layer.kv_heads, layer.head_dim)):
            count = len(list(layers))
            shape = (2 * count, heads, self.capacity, dim)
            rows = np.ndarray(shape, STORAGE[self.dtype], buffer=self.file.view, offset=self.offsets[first][0])
            yield rows[:, :, self.start : self.stop]
            first += count

    @property
    def _key(self) -> tuple[str, int, int, int]:
        return self.dtype, self.capacity, self.start, self.stop


def _digest(tensor: npt.NDArray[np.generic]) -> bytes:
    """xxh3-128 of a contiguous tensor, head by head: for such short runs a thread does not give way to others."""
    hasher = xxhash.xxh3_128()
    for head in tensor:
        hasher.update(head.data)
    return hasher.digest()
