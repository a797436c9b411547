"""lossless: the exponents of a float apart from the rest, and only they through zstd.

Neighbouring values of a channel have nearly equal exponents (some 2.7 bits of 8), while sign and mantissa are close to
random: compressing those costs time and gains nothing. A value is rotated left by one bit, so that its highest byte is
the whole exponent (float32, bfloat16) or the exponent and the first mantissa bits (float16).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import zstandard

from avp.buffers import Buffer, itemsize
from avp.context import Exactness
from avp.errors import BundleError, UsageError
from avp.protocols import Codec

_WORDS: Mapping[str, np.dtype[np.unsignedinteger]] = {
    "float32": np.dtype("<u4"),
    "float16": np.dtype("<u2"),
    "bfloat16": np.dtype("<u2"),
}


@dataclass(frozen=True, slots=True)
class Lossless:
    """Part "": sign and mantissa, [bytes - 1, *shape]; part ".exp": exponents, zstd of [kv_heads, head_dim, tokens]."""

    name: str = "lossless"
    exactness: Exactness = Exactness.EXACT
    level: int = 1

    def parts(self, dtype: str, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...] | None]]:
        """Sign and mantissa, then the exponents."""
        if dtype not in _WORDS:
            raise UsageError(f"codec lossless does not take {dtype}. Fix: use raw, or one of {', '.join(_WORDS)}.")
        return {"": ("uint8", (itemsize(dtype) - 1, *shape)), ".exp": ("uint8", None)}

    def encode(self, tensor: Buffer) -> Mapping[str, Buffer]:
        """Rotate, split into bytes, compress the highest."""
        self.parts(tensor.dtype, tensor.shape)
        words = np.ascontiguousarray(tensor.array).view(_WORDS[tensor.dtype])
        bits = 8 * words.itemsize
        planes = ((words << 1) | (words >> (bits - 1))).view(np.uint8).reshape(*words.shape, words.itemsize)
        low = np.ascontiguousarray(np.moveaxis(planes[..., :-1], -1, 0))
        high = np.ascontiguousarray(np.swapaxes(planes[..., -1], -1, -2))
        packed = zstandard.ZstdCompressor(level=self.level, write_content_size=True).compress(high.reshape(-1).data)
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
        words = np.empty(shape, _WORDS[dtype])
        planes = words.view(np.uint8).reshape(*shape, words.itemsize)
        planes[..., :-1] = np.moveaxis(low, 0, -1)
        heads, tokens, dim = shape
        planes[..., -1] = np.swapaxes(np.frombuffer(exponents, np.uint8).reshape(heads, dim, tokens), -1, -2)
        bits = 8 * words.itemsize
        restored = (words >> 1) | (words << (bits - 1))
        return Buffer(
            dtype, restored.view(np.float32 if dtype == "float32" else np.float16 if dtype == "float16" else np.uint16)
        )


CODEC: Codec = Lossless()
