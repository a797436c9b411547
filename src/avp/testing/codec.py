"""The laws of a codec, as tests that any codec inherits.

```python
class TestMine(CodecConformance):
    def codec(self): return CODEC
```
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from avp.buffers import STORAGE, Buffer, itemsize
from avp.errors import AVPError, BundleError, UsageError
from avp.protocols import Codec
from avp.segment import Exactness

# One bit pattern each: zeros, least and greatest denormal, one, greatest finite, infinities, quiet and signalling NaN.
_SPECIAL: Mapping[str, Sequence[int]] = {
    "float32": (0, 1 << 31, 1, 0x7FFFFF, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFA00001),
    "float16": (0, 1 << 15, 1, 0x3FF, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFD01),
    "bfloat16": (0, 1 << 15, 1, 0x7F, 0x3F80, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFA1),
}
_SLACK = 2**16  # bytes that decoding may take beside the tensor, whatever its size


class CodecConformance:
    """Subclass it and say what to test; every `test_…` is a law."""

    dtypes: Sequence[str] = ("float32", "float16", "bfloat16")
    shapes: Sequence[tuple[int, int, int]] = ((2, 33, 8), (1, 1, 1), (3, 1, 5), (1, 32, 7), (2, 256, 16), (2, 0, 8))
    tolerance = 0.1  # of a lossy codec: greatest error over greatest value
    temporaries = 8  # arrays of the tensor's size that decoding may hold at once

    def codec(self) -> Codec:
        """The codec under test."""
        raise NotImplementedError

    def test_a_codec_has_a_name_and_says_what_is_left_of_a_tensor(self) -> None:
        codec = self.codec()
        assert codec.name
        assert codec.exactness in (Exactness.EXACT, Exactness.BOUNDED)

    def test_a_tensor_comes_back_as_the_codec_declares(self) -> None:
        for tensor in self._tensors():
            self._check(tensor, self._round_trip(tensor))

    def test_infinities_nans_and_denormals_come_back_or_are_refused(self) -> None:
        for dtype in self.dtypes:
            tensor = Buffer(dtype, _words(_SPECIAL[dtype], dtype).reshape(1, 2, 5))
            try:
                back = self._round_trip(tensor)
            except UsageError:
                assert self.codec().exactness is not Exactness.EXACT
                continue
            self._check(tensor, back, finite=False)

    def test_every_bit_of_an_exact_codec_comes_back(self) -> None:
        if self.codec().exactness is Exactness.EXACT:
            for dtype in self.dtypes:
                raw = np.random.default_rng(0).bytes(2 * 64 * 16 * itemsize(dtype))
                tensor = Buffer(dtype, np.frombuffer(raw, STORAGE[dtype]).reshape(2, 64, 16))
                self._check(tensor, self._round_trip(tensor))

    def test_parts_are_those_that_encode_writes(self) -> None:
        codec = self.codec()
        for tensor in self._tensors():
            parts, encoded = codec.parts(tensor.dtype, tensor.shape), codec.encode(tensor)
            assert list(encoded) == list(parts)
            for suffix, (dtype, shape) in parts.items():
                assert encoded[suffix].dtype == dtype
                assert encoded[suffix].array.dtype == STORAGE[dtype]
                assert len(encoded[suffix].shape) == 1 if shape is None else encoded[suffix].shape == shape

    def test_equal_tensors_give_equal_bytes(self) -> None:
        for tensor in self._tensors():
            assert _bytes(self.codec().encode(tensor)) == _bytes(self.codec().encode(tensor))

    def test_a_tensor_is_not_changed_by_encoding_it(self) -> None:
        for tensor in self._tensors():
            before = tensor.tobytes()
            self.codec().encode(tensor)
            assert tensor.tobytes() == before

    def test_a_view_of_a_larger_cache_gives_the_bytes_of_its_copy(self) -> None:
        for dtype in self.dtypes:
            whole = _normal(dtype, (3, 40, 8))
            for view in (whole[:, 3:20], whole[:, ::2], whole[::-1], whole.transpose(0, 2, 1)):
                copied = self.codec().encode(Buffer(dtype, np.array(view, order="C")))
                assert _bytes(self.codec().encode(Buffer(dtype, view))) == _bytes(copied)

    def test_read_only_unaligned_bytes_are_decoded(self) -> None:
        codec = self.codec()
        for tensor in self._tensors():
            encoded = codec.encode(tensor)
            shifted = {suffix: _unaligned(part) for suffix, part in encoded.items()}
            back = codec.decode(shifted, tensor.dtype, tensor.shape)
            assert back.tobytes() == codec.decode(encoded, tensor.dtype, tensor.shape).tobytes()

    def test_a_dtype_that_the_codec_does_not_take_is_refused(self) -> None:
        for dtype in {"float32", "float16", "bfloat16"} - set(self.dtypes):
            assert isinstance(_raised(lambda dtype=dtype: self.codec().parts(dtype, (1, 2, 3))), UsageError)  # type: ignore[misc]

    def test_parts_of_a_wrong_length_are_refused(self) -> None:
        for encoded, suffix, tensor in self._free_parts():
            data = encoded[suffix].tobytes()
            for wrong in (b"", data[:1], data[: len(data) // 2], data[:-1], data + b"\0", data + data):
                error = self._decode_hostile({**encoded, suffix: _raw(wrong)}, tensor)
                assert isinstance(error, BundleError), f"{len(wrong)} of {len(data)} bytes: {error!r}"

    def test_a_bomb_is_refused_before_it_expands(self) -> None:
        for encoded, suffix, tensor in self._free_parts():
            for bomb in _bombs():
                error = self._decode_hostile({**encoded, suffix: _raw(bomb)}, tensor)
                assert isinstance(error, BundleError), repr(error)

    def test_hostile_parts_are_refused_or_are_some_tensor_of_the_shape(self) -> None:
        random = np.random.default_rng(1)
        for tensor in self._tensors():
            encoded = self.codec().encode(tensor)
            for suffix, part in encoded.items():
                noise = np.frombuffer(random.bytes(part.nbytes), part.array.dtype).reshape(part.shape)
                self._decode_hostile({**encoded, suffix: Buffer(part.dtype, noise)}, tensor)
                self._decode_hostile({**encoded, suffix: Buffer(part.dtype, np.zeros_like(part.array))}, tensor)

    def _tensors(self) -> Iterator[Buffer]:
        for dtype in self.dtypes:
            for shape in self.shapes:
                yield Buffer(dtype, _normal(dtype, shape))
            yield Buffer(dtype, np.zeros((2, 64, 8), STORAGE[dtype]))

    def _free_parts(self) -> Iterator[tuple[Mapping[str, Buffer], str, Buffer]]:
        """Parts whose length the reader must take from the bundle."""
        for tensor in self._tensors():
            encoded = self.codec().encode(tensor)
            for suffix, (_, shape) in self.codec().parts(tensor.dtype, tensor.shape).items():
                if shape is None and tensor.nbytes:  # of an empty tensor nothing can be lost
                    yield encoded, suffix, tensor

    def _round_trip(self, tensor: Buffer) -> Buffer:
        codec = self.codec()
        return codec.decode(codec.encode(tensor), tensor.dtype, tensor.shape)

    def _check(self, tensor: Buffer, back: Buffer, *, finite: bool = True) -> None:
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert back.array.dtype == STORAGE[tensor.dtype]
        if self.codec().exactness is Exactness.EXACT:
            assert back.tobytes() == tensor.tobytes()
        elif finite and tensor.nbytes:
            wanted, found = _values(tensor), _values(back)
            assert float(np.abs(found - wanted).max()) <= self.tolerance * float(np.abs(wanted).max())

    def _decode_hostile(self, parts: Mapping[str, Buffer], tensor: Buffer) -> AVPError | None:
        """What decoding raises, if anything; a result has the shape, and no more was allocated than it needs."""
        codec = self.codec()
        tracemalloc.start()
        try:
            back = codec.decode(parts, tensor.dtype, tensor.shape)
        except BundleError as error:
            return error
        else:
            assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
            return None
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            came = sum(part.nbytes for part in parts.values())
            assert peak <= self.temporaries * (tensor.nbytes + came) + _SLACK, f"{peak} bytes for {tensor.nbytes}"


def _normal(dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    values = np.random.default_rng(prod(shape)).standard_normal(shape, dtype=np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(STORAGE[dtype])


def _words(bits: Sequence[int], dtype: str) -> npt.NDArray[np.generic]:
    return np.array(bits, f"<u{itemsize(dtype)}").view(STORAGE[dtype])


def _values(buffer: Buffer) -> npt.NDArray[np.float32]:
    if buffer.dtype == "bfloat16":
        return (buffer.array.astype(np.uint32) << 16).view(np.float32)
    return buffer.array.astype(np.float32)


def _bytes(parts: Mapping[str, Buffer]) -> dict[str, bytes]:
    return {suffix: part.tobytes() for suffix, part in parts.items()}


def _raw(data: bytes) -> Buffer:
    return Buffer("uint8", np.frombuffer(data, np.uint8))


def _unaligned(part: Buffer) -> Buffer:
    memory = memoryview(b"\0" + part.tobytes())[1:]
    return Buffer(part.dtype, np.frombuffer(memory, part.array.dtype).reshape(part.shape))


def _bombs() -> Iterator[bytes]:
    """Small zstd frames of much: 16 MiB with and without the size told, and headers that claim 2^40 and 2^64 - 1."""
    import zstandard  # only a codec with parts of free length needs it

    for write_size in (True, False):
        yield zstandard.ZstdCompressor(write_content_size=write_size).compress(bytes(2**24))
    for claimed in (2**40, 2**64 - 1):
        yield b"\x28\xb5\x2f\xfd\xe0" + claimed.to_bytes(8, "little") + b"\x01\x00\x00"


def _raised(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the type is what the law is about
        return error
    return None
