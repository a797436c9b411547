"""llama.cpp's state blobs to canonical KV and back, and what is refused; needs no llama.cpp."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp.buffers import Buffer
from avp.connectors.llamacpp_state import MAGIC, Layer, StateShape, filler, from_canonical, to_canonical
from avp.errors import UnsupportedCache
from avp.identity import CacheLayout, LayerLayout

FULL = CacheLayout((LayerLayout(2, 16), LayerLayout(2, 16), LayerLayout(2, 16)))
SLIDING = CacheLayout((LayerLayout(1, 32, window=64), LayerLayout(1, 32), LayerLayout(1, 32, window=64)))
SHAPES = [
    StateShape(layout, cache, interleaved)
    for layout in (FULL, SLIDING)
    for cache in ("float16", "float32", "q8_0")
    for interleaved in (True, False)
]
COUNT = 45


def layers_of(shape: StateShape, count: int = COUNT, dtype: str = "") -> tuple[Layer, ...]:
    rng = np.random.default_rng(7)
    kind = np.float32 if (dtype or shape.dtype) == "float32" else np.float16
    return tuple(
        (
            rng.normal(size=(layer.kv_heads, count, layer.head_dim)).astype(kind),
            rng.normal(size=(layer.kv_heads, count, layer.head_dim)).astype(kind),
        )
        for layer in shape.layout.layers
    )


def blob_of(shape: StateShape, layers: tuple[Layer, ...], dtype: str = "", cuts: tuple[int, ...] = (0,)) -> np.ndarray:
    def runs(layer: int, part: str) -> Iterator[tuple[int, Buffer]]:
        array = layers[layer][part == "v"]
        for start, stop in zip(cuts, [*cuts[1:], array.shape[1]], strict=True):
            yield start, Buffer(dtype or shape.dtype, array[:, start:stop])

    return from_canonical(runs, shape=shape, count=layers[0][0].shape[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_written_comes_back(shape: StateShape) -> None:
    layers = layers_of(shape)
    blob = blob_of(shape, layers, cuts=(0, 7, 32))
    for wanted, found in zip(layers, to_canonical(blob, shape=shape, start=0, stop=COUNT), strict=True):
        for one, other in zip(wanted, found, strict=True):
            assert other.dtype == one.dtype
            if shape.cache == "q8_0":
                assert np.abs(one.astype(np.float32) - other).max() <= np.abs(one).max() / 127
            else:
                assert np.array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kv_of_any_dtype_goes_in(dtype: str) -> None:
    shape = StateShape(FULL, "float16", interleaved=True)
    layers = layers_of(shape, dtype="float32")
    given_layers = layers
    if dtype == "float16":
        given_layers = tuple((k.astype(np.float16), v.astype(np.float16)) for k, v in layers)
    if dtype == "bfloat16":
        given_layers = tuple(
            ((k.view(np.uint32) >> 16).astype(np.uint16), (v.view(np.uint32) >> 16).astype(np.uint16))
            for k, v in layers
        )
    found = to_canonical(blob_of(shape, given_layers, dtype), shape=shape, start=0, stop=COUNT)
    for (k, v), (other_k, other_v) in zip(layers, found, strict=True):
        assert np.allclose(k, other_k, rtol=0.01, atol=1e-3)
        assert np.allclose(v, other_v, rtol=0.01, atol=1e-3)


def test_numbers_too_large_for_float16_are_infinite_and_warn_nobody() -> None:
    shape = StateShape(FULL, "float16", interleaved=False)
    layers = tuple((np.full_like(k, 1e6), v) for k, v in layers_of(shape, dtype="float32"))
    found = to_canonical(blob_of(shape, layers, "float32"), shape=shape, start=0, stop=COUNT)
    assert np.isinf(found[0][0]).all()


def test_interleaved_keys_are_dims_0_and_h_first() -> None:
    shape = StateShape(CacheLayout((LayerLayout(1, 4),)), "float32", interleaved=True)
    key = np.array([[[10, 11, 12, 13]]], np.float32)
    blob = blob_of(shape, ((key, key),))
    rows = blob[8 + 8 + 12 + 8 + 12 :][:16].view(np.float32)
    assert rows.tolist() == [10, 12, 11, 13]


def test_cells_in_any_order_are_put_in_the_order_of_positions() -> None:
    shape = StateShape(FULL, "float16", interleaved=True)
    layers = layers_of(shape)
    order = np.random.default_rng(1).permutation(COUNT)
    blob = blob_of(shape, tuple((k[:, order], v[:, order]) for k, v in layers))
    table = blob[16 : 16 + 12 * COUNT].view(np.int32).reshape(-1, 3)
    table[:, 0] = order + 100
    found = to_canonical(blob, shape=shape, start=100, stop=100 + COUNT)
    for (k, v), (other_k, other_v) in zip(layers, found, strict=True):
        assert np.array_equal(k, other_k)
        assert np.array_equal(v, other_v)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_filler_is_a_valid_state_of_nothing(shape: StateShape) -> None:
    for k, v in to_canonical(filler(shape, 5), shape=shape, start=0, stop=5):
        assert not k.any()
        assert not v.any()


def test_another_magic_is_another_version() -> None:
    shape = SHAPES[0]
    blob = blob_of(shape, layers_of(shape))
    blob[:4] = list(struct.pack("<I", MAGIC + 1))
    with pytest.raises(UnsupportedCache, match=r"magic number that is not known.*\n?.*Fix: use the llama-cpp-python"):
        to_canonical(blob, shape=shape, start=0, stop=COUNT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_byte_that_is_not_kv_is_checked(shape: StateShape) -> None:
    """A changed byte is refused, or it is the number of the sequence, which nobody uses, or KV."""
    layers = layers_of(shape, 3)
    blob = blob_of(shape, layers)
    kv = sum(k.size + v.size for k, v in layers) * {"float16": 2, "float32": 4}.get(shape.cache, 0)
    kv = kv or sum(k.size + v.size for k, v in layers) // 32 * 34
    per_cell = 4 * 3 * len(shape.parts())  # the sequence number of each cell, of each part
    accepted = 0
    for at in range(len(blob)):
        changed = blob.copy()
        changed[at] ^= 0x40
        try:
            to_canonical(changed, shape=shape, start=0, stop=3)
            accepted += 1
        except UnsupportedCache:
            pass
    assert accepted == kv + per_cell + 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wrong", [-1, 1, -COUNT, 1 << 12])
def test_a_blob_of_another_length_is_refused(shape: StateShape, wrong: int) -> None:
    blob = blob_of(shape, layers_of(shape))
    other = blob[:wrong] if wrong < 0 else np.concatenate([blob, np.zeros(wrong, np.uint8)])
    with pytest.raises(UnsupportedCache, match="bytes instead of"):
        to_canonical(other, shape=shape, start=0, stop=COUNT)


def test_the_state_of_other_positions_or_of_another_model_is_refused() -> None:
    shape = SHAPES[0]
    blob = blob_of(shape, layers_of(shape))
    with pytest.raises(UnsupportedCache, match="positions other than 1 to 46"):
        to_canonical(blob, shape=shape, start=1, stop=COUNT + 1)
    with pytest.raises(UnsupportedCache):
        to_canonical(blob, shape=shape, start=0, stop=COUNT - 1)
    for other in SHAPES[2:]:
        with pytest.raises(UnsupportedCache):
            to_canonical(blob, shape=other, start=0, stop=COUNT)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.integers(1, 40))
def test_noise_is_refused(noise: bytes, count: int) -> None:
    blob = np.frombuffer(struct.pack("<I", MAGIC) + noise, np.uint8)
    with pytest.raises(UnsupportedCache):
        to_canonical(blob, shape=SHAPES[0], start=0, stop=count)
