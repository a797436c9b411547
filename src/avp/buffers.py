"""Buffer: an n-dimensional array of bytes with a dtype tag, on the host. No framework, no device."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from avp.errors import UsageError

IOV_MAX = 1024  # runs that the kernel takes at once

# numpy has no bfloat16 and no float8: they travel in the unsigned integer of the same width.
STORAGE: Mapping[str, np.dtype[np.generic]] = MappingProxyType(
    {
        "float32": np.dtype("<f4"),
        "float16": np.dtype("<f2"),
        "bfloat16": np.dtype("<u2"),
        "uint8": np.dtype("u1"),
        "int8": np.dtype("i1"),
    }
)


def itemsize(dtype: str) -> int:
    """Bytes per element of `dtype` ("float32", "bfloat16", …).

    Raises:
        UsageError: the dtype is not one that AVP carries.
    """
    if dtype not in STORAGE:
        raise UsageError(
            f"dtype {dtype!r} is not one that AVP carries. Fix: use one of {', '.join(STORAGE)}."
        ) from None
    return STORAGE[dtype].itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """A read-only view of numbers: `array` has the shape of the tensor and the storage type of `dtype`.

    The array may be strided in its first axis (one contiguous run per head), so that a view of a larger cache needs no
    copy.
    """

    dtype: str
    array: npt.NDArray[np.generic]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.array.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without gaps."""
        return self.array.size * self.array.itemsize

    def runs(self) -> Iterator[memoryview]:
        """The bytes in order, as few pieces as the layout allows; none is a copy of a contiguous run."""
        if self.array.size == 0:
            return
        if self.array.flags.c_contiguous:
            yield self.array.reshape(-1).view(np.uint8).data
            return
        for row in self.array:
            yield np.ascontiguousarray(row).reshape(-1).view(np.uint8).data

    def tobytes(self) -> bytes:
        """The bytes in order, as one copy."""
        return b"".join(self.runs())


def from_memory(memory: memoryview, *, dtype: str, shape: tuple[int, ...]) -> Buffer:
    """A buffer over `memory` (exactly the bytes of the tensor); nothing is copied.

    Raises:
        UsageError: the dtype is unknown, or the bytes are not as many as the shape needs.
    """
    if len(memory) != prod(shape) * itemsize(dtype):
        raise UsageError(
            f"{len(memory)} bytes are not a {dtype} tensor of shape {list(shape)}. Fix: pass all of its bytes."
        )
    return Buffer(dtype, np.frombuffer(memory, dtype=STORAGE[dtype]).reshape(shape))


def drop(runs: deque[memoryview], count: int) -> None:
    """Take the first `count` bytes away."""
    while runs and count >= len(runs[0]):
        count -= len(runs.popleft())
    if count:
        runs[0] = runs[0][count:]


def write_runs(fd: int, runs: Iterable[bytes | memoryview]) -> int:
    """Write all of the runs to a file, many in one system call; the bytes written. Raises OSError."""
    size = 0
    each = iter(runs)
    while batch := deque(memoryview(run) for run in islice(each, IOV_MAX) if len(run)):
        while batch:
            count = os.writev(fd, batch)
            size += count
            drop(batch, count)
    return size
