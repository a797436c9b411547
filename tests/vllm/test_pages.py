from __future__ import annotations

import numpy as np
import pytest
import torch

from avp.buffers import Buffer
from avp.connectors.vllm_pages import LAYOUTS, Pages, find_layout
from avp.errors import UnsupportedCache
from avp.identity import CacheLayout, LayerLayout

HEADS, DIM, BLOCKS = 3, 16, 9
LAYOUT = CacheLayout((LayerLayout(HEADS, DIM),) * 2)


def caches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(BLOCKS, HEADS, 32, 2 * DIM, dtype=dtype) for _ in range(2)]


def writer(name: str):  # type: ignore[no-untyped-def]
    """Writes as a backend of that layout does, token by token."""

    def write(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        for rows, view in zip((keys, values), LAYOUTS[name](cache), strict=True):
            for row, slot in zip(rows, slots.tolist(), strict=True):
                view[slot // 32, :, slot % 32] = row

    return write


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layout_is_recognised_by_what_a_backend_writes(name: str, dtype: torch.dtype) -> None:
    cache = caches(dtype)[0]
    assert find_layout(cache, writer(name)) == name
    assert not cache.any()


def test_an_unknown_layout_is_refused() -> None:
    def write(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        writer("side by side")(values, keys, cache, slots)

    with pytest.raises(UnsupportedCache, match="in a layout that AVP does not know"):
        find_layout(caches()[0], write)


def test_the_cpus_pages_hold_k_transposed_before_v() -> None:
    cache = torch.arange(2 * HEADS * 32 * 2 * DIM, dtype=torch.float32).view(2, HEADS, 32, 2 * DIM)
    keys, values = LAYOUTS["transposed"](cache)
    flat = cache.view(2, HEADS, -1)
    assert keys[1, 2, 5, 7] == flat[1, 2, 7 * 32 + 5]
    assert values[1, 2, 5, 7] == flat[1, 2, 32 * DIM + 5 * DIM + 7]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_into_blocks_is_read_from_them(name: str, dtype: torch.dtype) -> None:
    pages = Pages.of(caches(dtype), LAYOUT, LAYOUTS[name])
    storage = np.dtype(np.uint16) if dtype is torch.bfloat16 else np.dtype(np.float32)
    numbers = np.random.default_rng(0).integers(0, 2**15, (2, 2, HEADS, 96, DIM)).astype(storage)
    blocks = (7, 2, 5)
    for layer in range(2):
        for index, part in enumerate("kv"):
            pages.write(layer, part, blocks, Buffer(pages.dtype, numbers[layer, index]))
    for layer, pair in enumerate(pages.read(blocks, 70)):
        for index, buffer in enumerate(pair):
            assert buffer.shape == (HEADS, 70, DIM)
            assert np.array_equal(buffer.array, numbers[layer, index][:, :70])
    others = [block for block in range(BLOCKS) if block not in blocks]
    assert not pages.keys[0][others].any()


def test_kv_of_another_dtype_is_cast() -> None:
    pages = Pages.of(caches(torch.bfloat16), LAYOUT, LAYOUTS["transposed"])
    rows = np.random.default_rng(1).standard_normal((HEADS, 32, DIM)).astype(np.float32)
    pages.write(1, "v", (4,), Buffer("float32", rows))
    assert torch.equal(pages.values[1][4], torch.from_numpy(rows).to(torch.bfloat16))


@pytest.mark.parametrize(
    "wrong",
    [
        caches()[:1],
        [torch.zeros(BLOCKS, HEADS, 16, 2 * DIM)] * 2,
        [torch.zeros(BLOCKS, HEADS + 1, 32, 2 * DIM)] * 2,
        [torch.zeros(BLOCKS, HEADS, 32, 2 * DIM, dtype=torch.float64)] * 2,
        [*caches()[:1], torch.zeros(BLOCKS, HEADS, 32, 2 * DIM, dtype=torch.float16)],
    ],
    ids=["a layer too few", "blocks of 16", "another count of heads", "float64", "two dtypes"],
)
def test_caches_that_are_not_the_models_are_refused(wrong: list[torch.Tensor]) -> None:
    with pytest.raises(UnsupportedCache, match="AVP carries whole layers"):
        Pages.of(wrong, LAYOUT, LAYOUTS["side by side"])
