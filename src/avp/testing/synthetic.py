"""Contexts without a model: numbers of the right shape, for tests and benchmarks of everything but engines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from avp.buffers import Buffer
from avp.context import Context, Turn
from avp.identity import CacheLayout, LayerLayout, ModelIdentity
from avp.segment import Exactness, cut_segments


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    dtype: str
    keys: tuple[npt.NDArray[np.generic], ...]
    values: tuple[npt.NDArray[np.generic], ...]
    start: int
    stop: int

    def read(self, layer: int, part: str) -> Buffer:
        arrays = self.keys if part == "k" else self.values
        return Buffer(self.dtype, arrays[layer][:, self.start : self.stop])


def synthetic_context(
    *, layers: int = 2, kv_heads: int = 2, tokens: int = 48, head_dim: int = 8, dtype: str = "bfloat16", seed: int = 0
) -> Context:
    """A context of random KV, [kv_heads, tokens, head_dim] a layer for K and V, of a model that does not exist."""
    layout = CacheLayout((LayerLayout(kv_heads, head_dim),) * layers)
    weights = f"{seed:064x}"
    model = ModelIdentity("synthetic", "synthetic", weights, weights, layout)
    random = np.random.default_rng(seed)
    shape = (kv_heads, tokens, head_dim)
    arrays = tuple(_draw(random, shape, dtype) for _ in range(2 * layers))
    ids = tuple(int(i) for i in random.integers(0, 32000, tokens))
    segments = cut_segments(
        model,
        ids,
        dtype=dtype,
        engine="synthetic",
        tensors=lambda start, stop: _Slice(dtype, arrays[:layers], arrays[layers:], start, stop),
        grade=lambda _stop: Exactness.EXACT,
    )
    turns = (Turn({"role": "raw", "content": ""}, (0, tokens)),) if tokens else ()
    return Context("kv", model, ids, tokens, turns, segments=segments)


def _draw(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.generic]:
    """Normal values; for bfloat16 their upper 16 bits."""
    values = random.standard_normal(shape, dtype=np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"float32": np.float32, "float16": np.float16}[dtype])
