"""lossless: the exponents of a float apart from the rest, and only they through zstd.

Neighbouring values of a channel have nearly equal exponents (some 2.7 bits of 8), while sign and mantissa are close to
random: compressing those costs time and gains nothing. A value is rotated left by one bit, so that its highest byte is
the whole exponent (float32, bfloat16) or the exponent and the first mantissa bits (float16).

zstd serves as an entropy coder: exponents have next to no repeats, so the smallest hash table and the longest match
that the fast strategy knows make it twice as fast as level 1, and 9 % smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import zstandard

from avp.buffers import STORAGE, Buffer, itemsize
from avp.errors import BundleError, UsageError
from avp.protocols import Codec
from avp.segment import Exactness

_WORDS: Mapping[str, np.dtype[np.unsignedinteger]] = {
    "float32": np.dtype("<u4"),
    "float16": np.dtype("<u2"),
    "bfloat16": np.dtype("<u2"),
}


def compressor(level: int | None = None) -> zstandard.ZstdCompressor:
    """A compressor of exponents; `level`: by one of zstd's own settings instead, to compare with.

    Our parameters are fixed, so that a tensor's form does not depend on its size.
    """
    if level is not None:
        return zstandard.ZstdCompressor(level=level)
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            window_log=17,
            chain_log=6,
            hash_log=6,
            search_log=1,
            min_match=7,
            write_content_size=True,
        )
    )


@dataclass(frozen=True, slots=True)
class Lossless:
    """Part "": sign and mantissa, [bytes - 1, *shape]; part ".exp": exponents, zstd of [kv_heads, head_dim, tokens]."""

    name: str = "lossless"
    exactness: Exactness = Exactness.EXACT

    def parts(self, dtype: str, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...] | None]]:
        """Sign and mantissa, then the exponents."""
        if dtype not in _WORDS:
            raise UsageError(f"codec lossless does not take {dtype}. Fix: use raw, or one of {', '.join(_WORDS)}.")
        return {"": ("uint8", (itemsize(dtype) - 1, *shape)), ".exp": ("uint8", None)}

    def encode(self, tensor: Buffer) -> Mapping[str, Buffer]:
        """Rotate, split into bytes, compress the highest."""
        self.parts(tensor.dtype, tensor.shape)
        words = tensor.array.view(_WORDS[tensor.dtype])
        bits = 8 * words.itemsize
        high = (np.swapaxes(words, -1, -2) >> (bits - 9)).astype(np.uint8, order="C")
        rotated = (words << 1) | (words >> (bits - 1))
        low = np.empty((words.itemsize - 1, *words.shape), np.uint8)
        for index, plane in enumerate(low):
            plane[...] = rotated >> (8 * index) if index else rotated
        packed = compressor().compress(high.reshape(-1).data)
        return {"": Buffer("uint8", low), ".exp": Buffer("uint8", np.frombuffer(packed, np.uint8))}

    def decode(self, parts: Mapping[str, Buffer], dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Undo `encode`; the exponents may decompress to just one byte a value."""
        low, packed = parts[""].array, np.ascontiguousarray(parts[".exp"].array).data
        try:
            if zstandard.frame_content_size(packed) != prod(shape):
                raise BundleError(
                    "the exponents do not decompress to one byte a value. Fix: ask the sender for a valid bundle."
                )
            exponents = zstandard.ZstdDecompressor().decompress(
                packed, max_output_size=prod(shape), allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise BundleError(
                f"the exponents are no zstd frame: {error}. Fix: ask the sender for a valid bundle."
            ) from error
        heads, tokens, dim = shape
        high = np.frombuffer(exponents, np.uint8).reshape(heads, dim, tokens)
        words = np.swapaxes(high, -1, -2).astype(_WORDS[dtype], order="C")
        bits = 8 * words.itemsize
        words <<= bits - 8
        for index, plane in enumerate(low):
            words |= plane.astype(words.dtype) << (8 * index)
        restored = (words >> 1) | (words << (bits - 1))
        return Buffer(dtype, restored.view(STORAGE[dtype]))


CODEC: Codec = Lossless()
