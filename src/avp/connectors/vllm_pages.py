"""vLLM's paged cache and canonical KV: which layout the pages have, and rows copied out of them and into them.

A layer's cache is [blocks, kv_heads, block, 2 x head_dim] by shape; what lies where within a block is the attention
backend's own affair. It is found out by letting the backend write, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from avp.buffers import Buffer
from avp.errors import UnsupportedCache
from avp.identity import CacheLayout
from avp.segment import PAGE

DTYPES: Mapping[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}

# key [tokens, heads, dim], value, cache, slots: what a backend does with the KV that it computed
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
Views = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _transposed(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The CPU's pages: of each block and head first K as [dim, block], then V as [block, dim]."""
    blocks, heads, size, width = cache.shape
    flat = cache.view(blocks, heads, size * width)
    half = size * width // 2
    keys = flat[..., :half].view(blocks, heads, width // 2, size).transpose(-1, -2)
    return keys, flat[..., half:].view(blocks, heads, size, width // 2)


def _side_by_side(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a token beside each other, as FlashAttention has them."""
    width = cache.shape[-1] // 2
    return cache[..., :width], cache[..., width:]


LAYOUTS: Mapping[str, Views] = {"side by side": _side_by_side, "transposed": _transposed}


def find_layout(cache: torch.Tensor, write: Write) -> str:
    """The name of the layout in which `write` fills pages like those of `cache`, which is not touched.

    Raises:
        UnsupportedCache: it is none that is known here.
    """
    trial = torch.zeros_like(cache[:2])
    blocks, heads, size, width = trial.shape
    count = blocks * size * heads * (width // 2)
    # Small whole numbers, which every dtype holds, of a period that is no divisor of any stride.
    numbers = (torch.arange(2 * count, device=cache.device) % 251).to(cache.dtype)
    keys, values = numbers.view(2, blocks * size, heads, width // 2)
    write(keys, values, trial, torch.arange(blocks * size, device=cache.device))
    for name, views in LAYOUTS.items():
        if all(torch.equal(_by_token(view), rows) for view, rows in zip(views(trial), (keys, values), strict=True)):
            return name
    raise UnsupportedCache(
        f"vLLM's attention backend writes pages of shape {list(cache.shape[1:])} in a layout that AVP does not know. "
        f"Known are: {', '.join(LAYOUTS)}. Fix: use another attention backend."
    )


def _by_token(view: torch.Tensor) -> torch.Tensor:
    """[blocks, heads, block, dim] as [tokens, heads, dim]."""
    return view.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """The paged caches of all layers, in order, as views [blocks, kv_heads, 32, head_dim] of K and of V."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    dtype: str

    @classmethod
    def of(cls, caches: Sequence[torch.Tensor], layout: CacheLayout, views: Views) -> Pages:
        """The caches of a model with that layout.

        Raises:
            UnsupportedCache: they are others.
        """
        shapes = [tuple(cache.shape[1:]) for cache in caches]
        expected = [(layer.kv_heads, PAGE, 2 * layer.head_dim) for layer in layout.layers]
        dtypes = {cache.dtype for cache in caches}
        if shapes != expected or len(dtypes) != 1 or not dtypes <= set(DTYPES):
            raise UnsupportedCache(
                f"vLLM keeps {len(caches)} layers of pages {sorted(set(shapes))} in {sorted(map(str, dtypes))}; the "
                f"model has {len(expected)} of {sorted(set(expected))}. AVP carries whole layers in float32, float16 "
                "or bfloat16. Fix: run it on one worker, block_size=32, kv_cache_dtype=auto, no draft model."
            )
        pairs = [views(cache) for cache in caches]
        return cls(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs), DTYPES[dtypes.pop()])

    def read(self, blocks: Sequence[int], tokens: int) -> list[tuple[Buffer, Buffer]]:
        """A copy of the first `tokens` positions of these blocks: K and V of each layer, [kv_heads, tokens, dim]."""
        return [
            (_rows(keys, blocks, tokens), _rows(values, blocks, tokens))
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def settle(self) -> None:
        """Wait until what was written is there: a device works behind the thread that tells it to."""
        if self.keys[0].device.type != "cpu":
            torch.accelerator.synchronize()

    def write(self, layer: int, part: str, blocks: Sequence[int], rows: Buffer) -> None:
        """Fill these blocks of a layer with `rows`, [kv_heads, 32 x blocks, dim], cast where the dtypes differ."""
        pages = self.keys[layer] if part == "k" else self.values[layer]
        heads, _, dim = rows.shape
        shape = (heads, len(blocks), PAGE, dim)
        if pages.device.type == "cpu" and rows.dtype == self.dtype:
            _numpy(pages)[list(blocks)] = rows.array.reshape(shape).swapaxes(0, 1)
            return
        source = torch.from_numpy(np.array(rows.array))  # a copy: torch wants memory that may be written
        source = source.view(torch.bfloat16) if rows.dtype == "bfloat16" else source
        where = torch.tensor(list(blocks), device=pages.device)
        pages[where] = source.to(pages.device, _TORCH[self.dtype]).view(shape).transpose(0, 1)


def _rows(pages: torch.Tensor, blocks: Sequence[int], tokens: int) -> Buffer:
    if pages.device.type == "cpu":
        picked = _numpy(pages)[list(blocks)]
    else:
        picked = _numpy(pages[torch.tensor(list(blocks), device=pages.device)].cpu())
    count, heads, size, dim = picked.shape
    array = picked.swapaxes(0, 1).reshape(heads, count * size, dim)[:, :tokens]
    array.flags.writeable = False
    return Buffer(DTYPES[pages.dtype], array)


def _numpy(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """The same memory; numpy has no bfloat16, so it shows as 16-bit integers."""
    view: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
    view = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return view
