"""Arena: the KV of one sequence, all layers, in memory that grows at its end and forks without a copy.

K and V of a layer are [1, kv_heads, capacity, head_dim]; positions [0, used) never change. On the CPU the memory is a
sparse, unlinked file in RAM. The run that continues from position `used` writes on in place; every other run maps the
same file privately (MAP_PRIVATE): it shares the prefix's pages and owns those it writes. What one run writes behind
`used` may show through another's private mapping only at positions that the other has not written, hence never reads.
A device that cannot map copies the prefix once for each such run; `copied` counts the bytes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from math import prod

import torch

from avp.identity import CacheLayout
from avp.shared import MemoryFile, arena_offsets

SLACK = 8192  # positions of address space behind the prefix; memory is taken only when it is written


@dataclass(frozen=True, slots=True)
class Shape:
    """What an arena is made for."""

    layout: CacheLayout
    dtype: torch.dtype
    device: torch.device

    def nbytes(self, positions: int) -> int:
        """Bytes of KV that so many positions take."""
        return (
            positions * sum(2 * layer.kv_heads * layer.head_dim for layer in self.layout.layers) * self.dtype.itemsize
        )


class Arena:
    """See the module. Made by `Arena.empty` and `continue_from`; a `Snapshot` names its first positions."""

    def __init__(self, shape: Shape, capacity: int, memory: torch.Tensor, file: MemoryFile | None) -> None:
        self.shape = shape
        self.capacity = capacity
        self.used = 0
        self.copied = 0  # bytes of KV copied into this arena by forking or growing
        self.file = file  # None: no other run can map this memory
        self._memory = memory
        self._busy = False
        self._lock = threading.Lock()
        self._twin: Arena | None = None
        self.keys, self.values = _views(shape, capacity, memory)

    @classmethod
    def empty(cls, shape: Shape, capacity: int) -> Arena:
        """An arena of no positions, with address space for `capacity`."""
        size = shape.nbytes(capacity)
        if shape.device.type != "cpu":
            return cls(shape, capacity, torch.empty(size, dtype=torch.uint8, device=shape.device), None)
        file = MemoryFile.create(size)
        return cls(shape, capacity, _map(file, shared=True), file)

    @classmethod
    def adopt(cls, shape: Shape, file: MemoryFile, capacity: int, length: int) -> Arena:
        """The first `length` positions of an arena that somebody else owns and writes on; every run over it forks."""
        arena = cls(shape, capacity, _map(file, shared=False), file)
        arena.used, arena._busy = length, True
        return arena

    def claim(self, length: int) -> bool:
        """Whether the caller may write on in place at `length`; if so, `release` must follow."""
        with self._lock:
            if self._busy or self.used != length:
                return False
            self._busy = True
            return True

    def release(self, length: int) -> None:
        """End a claim: positions up to `length` are written and frozen."""
        with self._lock:
            self.used = length
            self._busy = False

    def fork(self, length: int) -> Arena:
        """An arena of its own over the first `length` positions, claimed by the caller; copies no KV where memory
        maps.
        """
        if self.file is not None:
            fork = Arena(self.shape, self.capacity, _map(self.file, shared=False), None)
        elif self.shape.device.type == "cpu":
            return self._shared_twin(length).fork(length)
        else:
            fork = Arena.empty(self.shape, self.capacity)
            fork.copy_from(self, length)
        fork.used, fork._busy = length, True
        return fork

    def _shared_twin(self, length: int) -> Arena:
        """A private arena that is forked itself moves to memory that can be mapped: one copy, however many forks
        follow.
        """
        with self._lock:
            if self._twin is None or self._twin.used < length:
                twin = Arena.empty(self.shape, self.capacity)
                twin.copy_from(self, max(length, self.used))
                twin.used = max(length, self.used)
                self._twin = twin
            return self._twin

    def copy_from(self, other: Arena, length: int) -> None:
        """Copy the first `length` positions of `other`, counted."""
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine[:, :, :length].copy_(theirs[:, :, :length])
        self.copied += self.shape.nbytes(length)


def _map(file: MemoryFile, *, shared: bool) -> torch.Tensor:
    """A memory file as bytes; private unless `shared`."""
    storage = torch.UntypedStorage.from_file(file.path, shared, file.size)
    return torch.tensor([], dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]


def _views(shape: Shape, capacity: int, memory: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for layer, offsets in zip(
        shape.layout.layers, arena_offsets(shape.layout, shape.dtype.itemsize, capacity), strict=True
    ):
        form = (1, layer.kv_heads, capacity, layer.head_dim)
        for views, offset in zip((keys, values), offsets, strict=True):
            flat = memory[offset : offset + prod(form) * shape.dtype.itemsize]
            views.append(flat.view(shape.dtype).view(form))
    return keys, values


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The first `length` positions of an arena, which never change."""

    arena: Arena
    length: int


def continue_from(snapshot: Snapshot, length: int, need: int) -> Arena:
    """A claimed arena whose first `length` positions are the snapshot's and which has room for `need`.

    In place where nobody else continues from there, else a fork; a larger arena (one copy) if the room is too small.
    """
    arena = snapshot.arena
    if need > arena.capacity:
        larger = Arena.empty(arena.shape, need + SLACK)
        larger.copy_from(arena, length)
        larger.used, larger._busy = length, True
        return larger
    return arena if length == snapshot.length and arena.claim(length) else arena.fork(length)
