"""A synthetic context that lies where an engine's does: in one arena, in a file in RAM."""

from __future__ import annotations

from dataclasses import replace
from mmap import mmap

import numpy as np

from avp.bench.peer import Shape
from avp.bench.perf_wire import synthetic
from avp.buffers import STORAGE
from avp.context import Context
from avp.segment import Exactness, cut_segments
from avp.shared import MemoryFile, SharedTensors, arena_bytes

SLACK = 1024  # positions of the arena that are not used


def in_arena(shape: Shape) -> Context:
    """A bfloat16 context of that shape, in memory that another process can map."""
    plain = synthetic(shape)
    if plain.model is None:
        raise AssertionError("a synthetic context has a model")
    layout, dtype, capacity = plain.model.layout, "bfloat16", shape.tokens + SLACK
    file = MemoryFile.create(arena_bytes(layout, dtype, capacity))

    def tensors(start: int, stop: int) -> SharedTensors:
        return SharedTensors.of(file, layout, dtype, capacity, start, stop)

    memory = mmap(file.fd, file.size)
    for layer, offsets in enumerate(tensors(0, shape.tokens).offsets):
        for part, offset in zip(("k", "v"), offsets, strict=True):
            form = (shape.kv_heads, capacity, shape.head_dim)
            rows = np.ndarray(form, STORAGE[dtype], memory, offset)
            for segment in plain.segments:
                rows[:, segment.start : segment.stop] = segment.read(layer, part).array
    segments = cut_segments(
        plain.model, plain.tokens, dtype=dtype, engine="synthetic", tensors=tensors, grade=lambda _stop: Exactness.EXACT
    )
    return replace(plain, segments=segments)
