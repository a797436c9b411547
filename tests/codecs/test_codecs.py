"""The built-in codecs obey the laws of a codec; raw copies nothing, lossless has the bits that its page says."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard

from avp import registry
from avp.buffers import STORAGE, Buffer
from avp.errors import BundleError, UsageError
from avp.protocols import Codec
from avp.segment import Exactness
from avp.testing import CodecConformance


class TestRaw(CodecConformance):
    def codec(self) -> Codec:
        return registry.codec("raw")

    def test_nothing_is_copied(self) -> None:
        tensor = Buffer("float32", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
        encoded = self.codec().encode(tensor)
        assert encoded[""] is tensor
        assert self.codec().decode(encoded, "float32", (2, 3, 4)) is tensor

    @pytest.mark.parametrize("dtype", STORAGE)
    def test_every_dtype_is_taken(self, dtype: str) -> None:
        assert self.codec().parts(dtype, (1, 2, 3)) == {"": (dtype, (1, 2, 3))}


class TestLossless(CodecConformance):
    def codec(self) -> Codec:
        return registry.codec("lossless")

    def test_integers_are_refused_by_name(self) -> None:
        for dtype in ("uint8", "int8"):
            with pytest.raises(UsageError, match=f"codec lossless does not take {dtype}. Fix: use raw"):
                self.codec().parts(dtype, (1, 2, 3))

    @pytest.mark.parametrize(
        ("dtype", "word", "low", "high"),
        [
            # sign 1, exponent 0x81, mantissa 0x4ABCDE: rotated left by one bit it is 81 95 79 BD
            ("float32", 0xC0CABCDE, [0xBD, 0x79, 0x95], 0x81),
            # sign 1, exponent 10010, mantissa 1011001101: rotated left it is 10010101 10011011
            ("float16", 0b1_10010_1011001101, [0b10011011], 0b10010101),
            # sign 1, exponent 0x81, mantissa 0x4A: rotated left it is 81 95
            ("bfloat16", 0xC0CA, [0x95], 0x81),
        ],
    )
    def test_a_value_has_the_bits_of_the_specification(self, dtype: str, word: int, low: list[int], high: int) -> None:
        array = np.array([word], f"<u{len(low) + 1}").view(STORAGE[dtype]).reshape(1, 1, 1)
        encoded = self.codec().encode(Buffer(dtype, array))
        assert encoded[""].shape == (len(low), 1, 1, 1)
        assert encoded[""].array.ravel().tolist() == low
        assert zstandard.decompress(encoded[".exp"].tobytes()) == bytes([high])

    def test_exponents_are_written_channel_by_channel(self) -> None:
        words = (np.arange(24, dtype=np.uint16) << 7).reshape(2, 3, 4)  # bfloat16 whose exponent counts up
        encoded = self.codec().encode(Buffer("bfloat16", words))
        order = np.arange(24).reshape(2, 3, 4).swapaxes(1, 2).ravel().tolist()
        assert list(zstandard.decompress(encoded[".exp"].tobytes())) == order

    def test_a_frame_of_another_compressor_is_read(self) -> None:
        tensor = Buffer("float32", np.random.default_rng(0).standard_normal((2, 40, 8), dtype=np.float32))
        encoded = self.codec().encode(tensor)
        exponents = zstandard.decompress(encoded[".exp"].tobytes())
        for level in (1, 19):
            frame = zstandard.ZstdCompressor(level=level, write_checksum=True).compress(exponents)
            parts = {"": encoded[""], ".exp": Buffer("uint8", np.frombuffer(frame, np.uint8))}
            assert self.codec().decode(parts, "float32", (2, 40, 8)).tobytes() == tensor.tobytes()

    def test_errors_say_what_is_wrong_with_the_frame(self) -> None:
        encoded = self.codec().encode(Buffer("bfloat16", np.zeros((1, 2, 3), np.uint16)))
        for frame, message in (
            (b"not zstd", "no zstd frame"),
            (zstandard.compress(b"12345"), "do not decompress to one byte a value"),
        ):
            parts = {**encoded, ".exp": Buffer("uint8", np.frombuffer(frame, np.uint8))}
            with pytest.raises(BundleError, match=message):
                self.codec().decode(parts, "bfloat16", (1, 2, 3))


class _Rounding:
    """A lossy codec: float32 with its lower half cut off."""

    name = "rounding"
    exactness = Exactness.BOUNDED

    def parts(self, dtype: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...] | None]]:
        if dtype != "float32":
            raise UsageError("only float32")
        return {"": ("bfloat16", shape)}

    def encode(self, tensor: Buffer) -> dict[str, Buffer]:
        if not np.isfinite(tensor.array.astype(np.float32)).all():
            raise UsageError("only finite values")
        words = np.ascontiguousarray(tensor.array).view(np.uint32)
        return {"": Buffer("bfloat16", (words >> 16).astype(np.uint16))}

    def decode(self, parts: dict[str, Buffer], dtype: str, shape: tuple[int, ...]) -> Buffer:
        return Buffer(dtype, (parts[""].array.astype(np.uint32) << 16).view(np.float32))


class TestALossyCodec(CodecConformance):
    dtypes = ("float32",)
    tolerance = 0.01

    def codec(self) -> Codec:
        return _Rounding()


class _Greedy(_Rounding):
    """A codec that allocates what the bytes tell it to, and claims to be exact."""

    exactness = Exactness.EXACT

    def parts(self, dtype: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...] | None]]:
        return {"": ("uint8", None)}

    def encode(self, tensor: Buffer) -> dict[str, Buffer]:
        return {"": Buffer("uint8", np.frombuffer(zstandard.compress(tensor.tobytes()), np.uint8))}

    def decode(self, parts: dict[str, Buffer], dtype: str, shape: tuple[int, ...]) -> Buffer:
        try:
            raw = zstandard.ZstdDecompressor().decompress(parts[""].tobytes(), max_output_size=2**24)
        except zstandard.ZstdError as error:
            raise BundleError("no") from error
        size = int(np.prod(shape))
        if len(raw) < 4 * size:
            raise BundleError("too short")
        return Buffer(dtype, np.frombuffer(raw[: 4 * size], np.float32).reshape(shape))


class _Suite(CodecConformance):
    __test__ = False
    dtypes = ("float32",)

    def codec(self) -> Codec:
        return _Greedy()


def test_the_suite_catches_a_codec_that_takes_trailing_bytes_and_bombs() -> None:
    suite = _Suite()
    suite.test_a_tensor_comes_back_as_the_codec_declares()
    with pytest.raises(AssertionError):
        suite.test_parts_of_a_wrong_length_are_refused()
    with pytest.raises(AssertionError):
        suite.test_a_bomb_is_refused_before_it_expands()


def test_the_suite_catches_a_lossy_codec_that_calls_itself_exact() -> None:
    class Liar(_Rounding):
        exactness = Exactness.EXACT

    class Suite(_Suite):
        def codec(self) -> Codec:
            return Liar()

    with pytest.raises(AssertionError):
        Suite().test_a_tensor_comes_back_as_the_codec_declares()
    with pytest.raises(AssertionError):
        Suite().test_infinities_nans_and_denormals_come_back_or_are_refused()


def test_a_suite_without_a_codec_says_so() -> None:
    with pytest.raises(NotImplementedError):
        CodecConformance().codec()
