"""A sequence's state as llama.cpp writes it, to canonical KV and back.

The blob of llama-cpp-python 0.3.36: u32 magic, i32 sequence; then one part for all layers, or, where a model has
sliding layers, one for its full and one for its sliding ones. A part: u32 streams (1), u32 cells; per cell i32
position, u32 sequences (1), i32 sequence; u32 whether V is transposed, u32 layers; of each layer i32 type, u64 bytes of
a row, and K as [cells, heads, dim]; then of each layer V likewise, or i32 type, u32 bytes of an element, u32 rows, and
V as [heads, dim, cells]. Everything but the cells' order follows from the layout, and must be as it follows.

Canonical: [heads, positions, dim] per layer, keys in rotate-half order. llama.cpp keeps the keys of the Llama
architecture for interleaved rotation: dims 0, h, 1, h+1, … with h half of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from avp.buffers import STORAGE, Buffer
from avp.errors import UnsupportedCache
from avp.identity import CacheLayout

MAGIC = 0xAF143CD8
_F32, _F16, _Q8_0 = 0, 1, 8  # ggml types
_TYPES = {"float32": (_F32, 4), "float16": (_F16, 2)}
_BLOCK, _BLOCK_BYTES = 32, 34  # of q8_0: one f16 scale, 32 numbers

Array = npt.NDArray[np.generic]
Layer = tuple[Array, Array]  # K and V, [heads, positions, dim]
T = TypeVar("T")
_FIX = "Fix: use the llama-cpp-python that AVP names in its extra `llamacpp`."


@dataclass(frozen=True, slots=True)
class StateShape:
    """What a model's blobs look like. `interleaved`: how keys are kept; `cache`: "float32", "float16" or "q8_0"."""

    layout: CacheLayout
    cache: str
    interleaved: bool

    @property
    def dtype(self) -> str:
        """Dtype of the canonical KV."""
        return "float16" if self.cache == "q8_0" else self.cache

    @property
    def transposed(self) -> bool:
        """Whether V is kept by dim; flash attention, which a quantised V needs, keeps it by position."""
        return self.cache != "q8_0"

    @property
    def window(self) -> int:
        """The narrowest window, 0 if there is none."""
        return min((layer.window for layer in self.layout.layers if layer.window), default=0)

    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Layers of each part of a blob."""
        count = len(self.layout.layers)
        if not self.window:
            return (tuple(range(count)),)
        full = tuple(i for i in range(count) if not self.layout.layers[i].window)
        return full, tuple(i for i in range(count) if self.layout.layers[i].window)


@dataclass(frozen=True, slots=True)
class _Piece:
    """The rows of K or V of one layer in a blob; `header` must stand before `start`."""

    layer: int
    part: str
    header: bytes
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of a blob: `head` at `start`, the cells' table, `tail`, and pieces."""

    start: int
    head: bytes
    table: slice
    tail: bytes
    pieces: tuple[_Piece, ...]
    stop: int


def _plan(shape: StateShape, count: int) -> list[_Part]:
    """Where everything lies in a blob of `count` positions."""
    at, parts = 8, []
    for layers in shape.parts():
        start = at
        table = slice(at + 8, at + 8 + 12 * count)
        at = table.stop + 8
        pieces: list[_Piece] = []
        for part in ("k", "v"):
            for layer in layers:
                header, size = _rows(shape, layer, part, count)
                at += len(header)
                pieces.append(_Piece(layer, part, header, at, size))
                at += size
        tail = struct.pack("<II", shape.transposed, len(layers))
        parts.append(_Part(start, struct.pack("<II", 1, count), table, tail, tuple(pieces), at))
    return parts


def _rows(shape: StateShape, layer: int, part: str, count: int) -> tuple[bytes, int]:
    """The header before the rows of a layer, and how many bytes they take."""
    wide = shape.layout.layers[layer].kv_heads * shape.layout.layers[layer].head_dim
    if shape.cache == "q8_0":
        row = wide // _BLOCK * _BLOCK_BYTES
        return struct.pack("<iQ", _Q8_0, row), row * count
    kind, width = _TYPES[shape.cache]
    if part == "v":
        return struct.pack("<iII", kind, width, wide), wide * width * count
    return struct.pack("<iQ", kind, wide * width), wide * width * count


def to_canonical(blob: npt.NDArray[np.uint8], *, shape: StateShape, start: int, stop: int) -> tuple[Layer, ...]:
    """K and V of every layer for the positions [start, stop), out of a blob that holds just those.

    Raises:
        UnsupportedCache: the blob is not one of that model, cache type and positions, or of a version not known here.
    """
    count = stop - start
    data = blob.data.cast("B")
    parts = _plan(shape, count)
    _expect(data, 0, struct.pack("<I", MAGIC), "a magic number that is not known, so its version is another")
    if len(data) != parts[-1].stop:
        raise _odd(f"{len(data)} bytes instead of {parts[-1].stop}")
    found: list[dict[str, Array]] = [{} for _ in shape.layout.layers]
    jobs: list[tuple[_Piece, Array | None]] = []
    for part in parts:
        _expect(data, part.start, part.head, "another number of streams or cells")
        _expect(data, part.table.stop, part.tail, "V the other way round, or another number of layers")
        order = _order(data[part.table], start, stop)
        for piece in part.pieces:
            _expect(data, piece.start - len(piece.header), piece.header, "another type or size of rows")
            jobs.append((piece, order))

    def convert(job: tuple[_Piece, Array | None]) -> None:
        piece, order = job
        data = blob[piece.start : piece.start + piece.size]
        with np.errstate(all="ignore"):  # scales may be anything
            found[piece.layer][piece.part] = _read(data, shape, piece, count, order)

    _each(convert, jobs, count)
    return tuple((layer["k"], layer["v"]) for layer in found)


def _order(table: memoryview, start: int, stop: int) -> Array | None:
    """For each position the cell that holds it; None if they are in order."""
    cells = np.frombuffer(table, "<i4").reshape(-1, 3)
    positions = cells[:, 0]
    wanted = np.arange(start, stop, dtype=np.int32)
    if (cells[:, 1] != 1).any():
        raise _odd("cells of more than one sequence")
    if np.array_equal(positions, wanted):
        return None
    order = np.argsort(positions, kind="stable")
    if not np.array_equal(positions[order], wanted):
        raise _odd(f"positions other than {start} to {stop}")
    return order


def _read(data: npt.NDArray[np.uint8], shape: StateShape, piece: _Piece, count: int, order: Array | None) -> Array:
    layer = shape.layout.layers[piece.layer]
    heads, dim = layer.kv_heads, layer.head_dim
    if piece.part == "v" and shape.transposed:
        rows = data.view(STORAGE[shape.dtype]).reshape(heads, dim, count)
        rows = rows if order is None else rows[:, :, order]
        return np.ascontiguousarray(rows.transpose(0, 2, 1))
    rows = _numbers(data, shape, count).reshape(count, heads, dim)
    rows = rows if order is None else rows[order]
    if piece.part == "k" and shape.interleaved:
        pairs = rows.reshape(count, heads, dim // 2, 2)
        return np.ascontiguousarray(pairs.transpose(1, 0, 3, 2)).reshape(heads, count, dim)
    return np.ascontiguousarray(rows.transpose(1, 0, 2))


def _numbers(data: npt.NDArray[np.uint8], shape: StateShape, count: int) -> Array:
    if shape.cache != "q8_0":
        return data.view(STORAGE[shape.dtype])
    blocks = data.reshape(-1, _BLOCK_BYTES)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return (blocks[:, 2:].view(np.int8) * scales).astype(np.float16)


def from_canonical(
    layers: Callable[[int, str], Iterator[tuple[int, Buffer]]], *, shape: StateShape, count: int
) -> npt.NDArray[np.uint8]:
    """The blob of the positions [0, count); `layers(layer, part)` gives runs [heads, n, dim] and where each begins."""
    parts = _plan(shape, count)
    blob = np.zeros(parts[-1].stop, np.uint8)
    data = blob.data
    data[:8] = struct.pack("<Ii", MAGIC, 0)
    jobs: list[_Piece] = []
    for part in parts:
        data[part.start : part.table.start] = part.head
        cells = np.frombuffer(data[part.table], "<i4").reshape(count, 3)
        cells[:, 0], cells[:, 1], cells[:, 2] = np.arange(count), 1, 0
        data[part.table.stop : part.table.stop + len(part.tail)] = part.tail
        for piece in part.pieces:
            data[piece.start - len(piece.header) : piece.start] = piece.header
            jobs.append(piece)

    def convert(piece: _Piece) -> None:
        target = blob[piece.start : piece.start + piece.size]
        with np.errstate(all="ignore"):  # what float16 cannot hold is infinite
            for at, buffer in layers(piece.layer, piece.part):
                _write(target, shape, piece, count, at, buffer)

    _each(convert, jobs, count)
    return blob


def filler(shape: StateShape, count: int) -> npt.NDArray[np.uint8]:
    """The blob of so many positions of nothing."""
    return from_canonical(lambda layer, part: iter(()), shape=shape, count=count)


def _write(
    target: npt.NDArray[np.uint8], shape: StateShape, piece: _Piece, count: int, at: int, buffer: Buffer
) -> None:
    """Put a run [heads, n, dim] at its place among the rows."""
    heads, length, dim = buffer.shape
    run = plain(buffer)
    if shape.cache == "q8_0":
        width = len(target) // count
        rows = _ordered(run, shape, piece).astype(np.float32).reshape(length, -1)
        target.reshape(count, width)[at : at + length] = _quantised(rows)
    elif piece.part == "v":
        wide = target.view(STORAGE[shape.dtype]).reshape(heads, dim, count)
        wide[:, :, at : at + length] = run.transpose(0, 2, 1)
    else:
        rows = target.view(STORAGE[shape.dtype]).reshape(count, heads, dim)[at : at + length]
        if shape.interleaved:
            across, half = run.transpose(1, 0, 2), dim // 2
            rows[:, :, 0::2], rows[:, :, 1::2] = across[:, :, :half], across[:, :, half:]
        else:
            rows[:] = run.transpose(1, 0, 2)


def _ordered(run: Array, shape: StateShape, piece: _Piece) -> Array:
    """A run as rows [n, heads, dim], keys in the engine's order."""
    heads, length, dim = run.shape
    across = run.transpose(1, 0, 2)
    if piece.part == "k" and shape.interleaved:
        return across.reshape(length, heads, 2, dim // 2).transpose(0, 1, 3, 2).reshape(length, heads, dim)
    return across


def plain(buffer: Buffer) -> Array:
    """The numbers as numpy knows them: bfloat16 is the upper half of float32."""
    if buffer.dtype != "bfloat16":
        return buffer.array
    return (buffer.array.astype(np.uint32) << 16).view(np.float32)


def _quantised(rows: Array) -> npt.NDArray[np.uint8]:
    """Rows of floats as q8_0: per block of 32 a scale of amax / 127."""
    blocks = rows.reshape(-1, _BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    packed = np.empty((len(blocks), _BLOCK_BYTES), np.uint8)
    packed[:, :2] = scales.astype("<f2").view(np.uint8)
    packed[:, 2:] = np.rint(blocks * inverse).astype(np.int8).view(np.uint8)
    return packed.reshape(len(rows), -1)


def _each(convert: Callable[[T], None], jobs: Sequence[T], count: int) -> None:
    """All of them; by two threads where it is worth it (first writes wait for the kernel to hand out pages)."""
    if count < 128:
        for job in jobs:
            convert(job)
        return
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(convert, jobs))


def _expect(data: memoryview, at: int, wanted: bytes, what: str) -> None:
    if bytes(data[at : at + len(wanted)]) != wanted:
        raise _odd(what)


def _odd(what: str) -> UnsupportedCache:
    return UnsupportedCache(f"llama.cpp wrote a state with {what}. {_FIX}")
