"""KV as a frame of AVP 0.4 holds it: one shape for all layers.

Payload: `<IIIIB` layers, kv heads, head dim, positions, dtype; then K and V of each layer, [kv_heads, positions,
head_dim], little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType

import numpy as np

from avp.buffers import STORAGE, Buffer, itemsize
from avp.context import Context
from avp.errors import BundleError, LimitExceeded, TruncatedBundle, UnsupportedBundle, UnsupportedCache, UsageError
from avp.identity import CacheLayout, LayerLayout, ModelIdentity
from avp.interop.avp04 import Frame, check_size
from avp.interop.avp04_proto import DataType
from avp.manifest import Limits
from avp.segment import Segment

KV_DTYPES: Mapping[str, DataType] = MappingProxyType(
    {each.label: each for each in (DataType.FLOAT32, DataType.FLOAT16, DataType.BFLOAT16)}
)
_SHAPE = struct.Struct("<IIIIB")
_ASK = "Fix: ask the sender for a valid frame."


@dataclass(frozen=True, slots=True)
class Shape:
    """The first 17 bytes of a KV payload."""

    layers: int
    kv_heads: int
    head_dim: int
    positions: int
    dtype: str

    @property
    def tensor(self) -> tuple[int, int, int]:
        """Shape of K, and of V, of one layer."""
        return self.kv_heads, self.positions, self.head_dim

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return 2 * self.layers * prod(self.tensor) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The KV of the positions [start, stop) in a payload, as views of it."""

    payload: memoryview
    shape: Shape
    start: int
    stop: int

    def read(self, layer: int, part: str) -> Buffer:
        """K or V of a layer, [kv_heads, stop - start, head_dim]; the bytes may begin at any address."""
        count = prod(self.shape.tensor)
        storage = STORAGE[self.shape.dtype]
        offset = _SHAPE.size + (2 * layer + (part == "v")) * count * storage.itemsize
        whole = np.frombuffer(self.payload, storage, count, offset).reshape(self.shape.tensor)
        return Buffer(self.shape.dtype, whole[:, self.start : self.stop])


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    """The KV of a segment in memory of its own: K and V of each layer."""

    buffers: tuple[Buffer, ...]

    def read(self, layer: int, part: str) -> Buffer:
        return self.buffers[2 * layer + (part == "v")]


def copied(context: Context, layers: int) -> Context:
    """The context with each segment's KV in memory of its own: a segment that is kept then keeps no whole frame."""
    names = [(layer, part) for layer in range(layers) for part in ("k", "v")]

    def copy(segment: Segment) -> Segment:
        buffers = (segment.read(layer, part) for layer, part in names)
        return replace(segment, tensors=_Copy(tuple(Buffer(each.dtype, each.array.copy()) for each in buffers)))

    return replace(context, segments=tuple(map(copy, context.segments)))


def read_shape(frame: Frame, limits: Limits) -> Shape:
    """The shape of a KV payload, which is as long as it says and agrees with the metadata.

    Raises:
        TruncatedBundle, LimitExceeded, UnsupportedBundle, BundleError: see `avp.errors`.
    """
    payload, metadata = frame.payload, frame.metadata
    if len(payload) < _SHAPE.size:
        raise TruncatedBundle(f"the KV payload has {len(payload)} bytes; its shape alone takes {_SHAPE.size}. {_ASK}")
    layers, kv_heads, head_dim, positions, code = _SHAPE.unpack(payload[: _SHAPE.size])
    if code not in KV_DTYPES.values():
        raise UnsupportedBundle(f"the KV is of the unknown dtype {code}. Fix: ask for one of {', '.join(KV_DTYPES)}.")
    if layers > limits.layers or positions > limits.tokens:
        raise LimitExceeded(
            f"the KV payload declares {layers} layers and {positions} positions; at most {limits.layers} and "
            f"{limits.tokens} are allowed. Fix: raise Limits.layers or Limits.tokens."
        )
    shape = Shape(layers, kv_heads, head_dim, positions, DataType(code).label)
    if len(payload) - _SHAPE.size != shape.nbytes:
        error = TruncatedBundle if len(payload) - _SHAPE.size < shape.nbytes else BundleError
        raise error(
            f"the KV payload has {len(payload) - _SHAPE.size} bytes of tensors where its shape needs {shape.nbytes}. "
            f"{_ASK}"
        )
    # 0 is what an absent field reads as.
    if metadata.num_layers not in (0, layers) or metadata.dtype not in (0, code):
        raise BundleError(
            f"the metadata say {metadata.num_layers} layers of {metadata.dtype.label}, the KV payload {layers} of "
            f"{shape.dtype}. {_ASK}"
        )
    return shape


def one_layer(layout: CacheLayout, name: str) -> LayerLayout:
    """The layout that all layers of the model `name` have.

    Raises:
        UnsupportedCache: sliding windows, or layers of different shapes.
    """
    first = layout.layers[0]
    if any(layer.window for layer in layout.layers):
        raise UnsupportedCache(
            f"{name} has sliding-window layers, whose KV a frame of AVP 0.4 does not carry. Fix: hand over a bundle "
            "(Context.to_bytes), or text."
        )
    if any((layer.kv_heads, layer.head_dim) != (first.kv_heads, first.head_dim) for layer in layout.layers):
        raise UnsupportedCache(
            f"{name} has layers of different shapes, and a frame of AVP 0.4 has one for all. Fix: hand over a bundle "
            "(Context.to_bytes), or text."
        )
    return first


def kv_payload(context: Context, model: ModelIdentity) -> tuple[Shape, list[memoryview]]:
    """The shape, and the payload's bytes in order, as views of the segments.

    Raises:
        UnsupportedCache: as `one_layer`. UsageError: pending ids, missing segments, mixed dtypes, more than 4 GiB.
    """
    layer = one_layer(model.layout, model.describe())
    if context.pending:
        raise UsageError(
            f"{len(context.pending)} ids of the context are not computed yet, and a frame of AVP 0.4 holds KV only: "
            'its receiver would go on without them. Fix: connector.prefill("", context=context) computes them first.'
        )
    covered = 0
    for segment in context.segments:
        covered = segment.stop if segment.start == covered else -1
    if covered != len(context):
        raise UsageError(
            "the context lacks segments, and a frame of AVP 0.4 holds all positions. Fix: fetch the missing segments "
            "first."
        )
    dtypes = {segment.dtype for segment in context.segments} or {"float32"}
    if len(dtypes) > 1 or not dtypes <= set(KV_DTYPES):
        raise UsageError(
            f"the context's KV is of {' and '.join(sorted(dtypes))}, and a frame of AVP 0.4 has one dtype of "
            f"{', '.join(KV_DTYPES)}. Fix: prefill the context in one of them."
        )
    shape = Shape(len(model.layout.layers), layer.kv_heads, layer.head_dim, len(context), dtypes.pop())
    check_size(_SHAPE.size + shape.nbytes)
    head = _SHAPE.pack(shape.layers, shape.kv_heads, shape.head_dim, shape.positions, KV_DTYPES[shape.dtype])
    return shape, [memoryview(head), *_runs(context, shape)]


def _runs(context: Context, shape: Shape) -> Iterator[memoryview]:
    """K and V of each layer: head by head, the segments' rows of it."""
    for layer in range(shape.layers):
        for part in ("k", "v"):
            buffers = [segment.read(layer, part) for segment in context.segments]
            for head in range(shape.kv_heads):
                for buffer in buffers:
                    yield from Buffer(buffer.dtype, buffer.array[head : head + 1]).runs()
