"""Contexts for tests: any kind, any dtype, latent positions, hidden states, a subset of segments."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from avp.blob import seal
from avp.buffers import Buffer
from avp.context import Context, Turn
from avp.identity import CacheLayout, LayerLayout, ModelIdentity
from avp.segment import LATENT, Exactness, Segment, cut_segments
from avp.shared import MemoryFile, SharedTensors, arena_bytes
from avp.testing import synthetic_context

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
DTYPES = tuple(NUMPY)
CODECS = ("raw", "lossless")
LENGTHS = (0, 1, 31, 32, 33, 255, 256, 257)


@dataclass(frozen=True)
class Rows:
    """KV in memory: arrays[layer][part] is [kv_heads, tokens, head_dim]."""

    dtype: str
    arrays: Sequence[Mapping[str, npt.NDArray[np.generic]]]
    start: int
    stop: int

    def read(self, layer: int, part: str) -> Buffer:
        return Buffer(self.dtype, self.arrays[layer][part][:, self.start : self.stop])


def draw(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.generic]:
    """Any bits at all, NaN and denormals too."""
    return np.frombuffer(random.bytes(int(np.prod(shape)) * NUMPY[dtype]().itemsize), NUMPY[dtype]).reshape(shape)


def kv_context(
    ids: Sequence[int],
    *,
    pending: Sequence[int] = (),
    dtype: str = "float32",
    layers: Sequence[LayerLayout] = (LayerLayout(2, 4), LayerLayout(1, 6, window=16)),
    seed: int = 0,
    turns: tuple[Turn, ...] = (),
    template: Mapping[str, object] | None = None,
) -> Context:
    """A context of `ids` (LATENT where a position has none) with arbitrary bits as KV."""
    random = np.random.default_rng(seed)
    model = ModelIdentity("a/model", "none", f"{seed:064x}", f"{seed + 1:064x}", CacheLayout(tuple(layers)))
    arrays = [
        {part: draw(random, (layer.kv_heads, len(ids), layer.head_dim), dtype) for part in "kv"} for layer in layers
    ]

    def grade(stop: int) -> Exactness:
        return Exactness.APPROXIMATE if LATENT in ids[:stop] else Exactness.EXACT

    segments = cut_segments(
        model,
        ids,
        dtype=dtype,
        engine="synthetic",
        tensors=lambda start, stop: Rows(dtype, arrays, start, stop),
        grade=grade,
    )
    tokens = (*ids, *pending)
    return Context("kv", model, tokens, len(ids), turns, template or {}, segments, None, grade(len(ids)))


def fill_arena(tensors: SharedTensors, *, seed: int) -> None:
    """Write any bits at all into all of the arena in which the tensors lie."""
    random = np.random.default_rng(seed)
    os.pwrite(tensors.file.fd, random.bytes(arena_bytes(tensors.layout, tensors.dtype, tensors.capacity)), 0)


def shared(context: Context, *, capacity: int = 300) -> Context:
    """The same context, its KV in memory that others can map."""
    assert context.model is not None
    layout, dtype = context.model.layout, context.segments[0].dtype
    file = MemoryFile.create(arena_bytes(layout, dtype, capacity))
    segments = []
    for segment in context.segments:
        tensors = SharedTensors.of(file, layout, dtype, capacity, segment.start, segment.stop)
        for layer, offsets in enumerate(tensors.offsets):
            for part, offset in zip("kv", offsets, strict=True):
                rows = segment.read(layer, part).array
                size = rows[0, 0].nbytes  # of one position of one head
                for head, run in enumerate(rows):
                    os.pwrite(file.fd, run.tobytes(), offset + (head * capacity + segment.start) * size)
        segments.append(replace(segment, tensors=tensors))
    return replace(context, segments=tuple(segments))


def hidden_context(tokens: int, dtype: str) -> Context:
    """Hidden states of `tokens` positions, [tokens, 6]."""
    base = synthetic_context(tokens=tokens, dtype=dtype)
    hidden = Buffer(dtype, draw(np.random.default_rng(tokens), (tokens, 6), dtype))
    return Context("hidden", base.model, base.tokens, 0, base.turns, hidden=hidden, exactness=Exactness.APPROXIMATE)


def tokens_context(tokens: int) -> Context:
    """Ids without any state."""
    base = synthetic_context(tokens=tokens)
    return Context("tokens", base.model, base.tokens, 0, base.turns, exactness=Exactness.TEXT)


def subset(context: Context, *kept: int) -> Context:
    """The context with only some of its segments."""
    return replace(context, segments=tuple(context.segments[i] for i in kept))


def pages(context: Context) -> tuple[str, ...]:
    """The ids of all pages, in order."""
    return tuple(page for segment in context.segments for page in segment.pages)


def kv_bytes(context: Context) -> list[bytes]:
    """The bytes of K and V, segment by segment, layer by layer."""
    layers = len(context.model.layout.layers) if context.model else 0
    return [each for segment in context.segments for each in segment_bytes(segment, layers)]


def segment_bytes(segment: Segment, layers: int = 2) -> list[bytes]:
    """The bytes of K and V, layer by layer."""
    return [segment.read(layer, part).tobytes() for layer in range(layers) for part in ("k", "v")]


def named(segment: Segment) -> tuple[object, ...]:
    """Everything of a segment but its KV."""
    head = (segment.start, segment.tokens, segment.parent, segment.pages)
    return (*head, segment.dtype, segment.engine, segment.exactness)


def bundle_of(context: Context, segment: Segment, *, codec: str = "raw") -> bytes:
    """The bundle of one segment."""
    assert context.model is not None
    return b"".join(seal(context.model, segment, codec=codec).runs)


def small_blob(codec: str = "raw") -> bytes:
    """The bundle of a segment of two positions, one layer."""
    tiny = synthetic_context(layers=1, kv_heads=1, head_dim=2, tokens=34, dtype="float32")
    return bundle_of(tiny, tiny.segments[0].cut(32, 34), codec=codec)


def described(context: Context) -> tuple[object, ...]:
    """Everything of a context but its KV: equal for equal contexts."""
    hidden = context.hidden and (context.hidden.dtype, context.hidden.shape, context.hidden.tobytes())
    turns = [(dict(turn.message), turn.opaque) for turn in context.turns]
    segments = [named(each) for each in context.segments]
    head = (context.kind, context.model, context.tokens, context.length, turns, dict(context.template))
    return (*head, segments, hidden, context.exactness)
