"""Frames of 0.4: the published vectors, what is refused, and at what cost."""

from __future__ import annotations

import mmap
import struct
import sys
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from avp.errors import (
    AVPError,
    BundleError,
    DigestMismatch,
    LimitExceeded,
    MissingExtra,
    TruncatedBundle,
    UnsupportedBundle,
    UsageError,
)
from avp.interop.avp04 import Frame, model_hash, read_frame, tokenizer_hash, write_frame
from avp.interop.avp04_proto import Metadata, PayloadType, metadata_bytes
from avp.manifest import Limits

from .wire import attempt, kv_frame

# Published with the spec: hex, metadata, float32 values.
VECTORS = [
    (
        "415601002a0000001a00000012076167656e742d61220a746573742d6d6f64656c28044a0104cdcccc3dcdcc4c3e9a99993ecdcccc3e",
        Metadata(source_agent_id="agent-a", model_id="test-model", hidden_dim=4, tensor_shape=(4,)),
        (0.1, 0.2, 0.3, 0.4),
    ),
    ("415601000d0000000500000028024a01020000803f00000040", Metadata(hidden_dim=2, tensor_shape=(2,)), (1.0, 2.0)),
]
SMALL = write_frame(Metadata(session_id="s", hidden_dim=2, tensor_shape=(2,)), struct.pack("<2f", 1, 2))


def _packed(content: bytes, **how: bool) -> bytes:
    """A frame of a payload that the library compressed."""
    return _frame(zstandard.ZstdCompressor(**how).compress(content), flags=1)


def _frame(payload: bytes, metadata: bytes = b"", *, flags: int = 0, size: int | None = None) -> bytes:
    size = len(metadata) + len(payload) if size is None else size
    return struct.pack("<2sBBII", b"AV", 1, flags, size, len(metadata)) + metadata + payload


@pytest.mark.parametrize(("text", "metadata", "values"), VECTORS)
def test_the_published_vectors_are_read_and_written(text: str, metadata: Metadata, values: tuple[float, ...]) -> None:
    data = bytes.fromhex(text)
    payload = struct.pack(f"<{len(values)}f", *values)
    frame = read_frame(data)
    assert (frame.metadata, bytes(frame.payload)) == (metadata, payload)
    assert write_frame(metadata, payload, checksum="") == data


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["", "zstd"]), st.sampled_from(["", "crc32"]), st.text(max_size=9))
def test_a_frame_reads_as_what_was_written(payload: bytes, compression: str, checksum: str, name: str) -> None:
    metadata = Metadata(session_id=name, payload_type=PayloadType.KV_CACHE, avp_map_id=name)
    half = memoryview(payload)[: len(payload) // 2], memoryview(payload)[len(payload) // 2 :]
    data = write_frame(metadata, payload, compression=compression, checksum=checksum)
    assert read_frame(write_frame(metadata, half, compression=compression, checksum=checksum)).payload == payload
    frame = read_frame(data)
    assert frame.payload == payload
    assert frame.metadata.session_id == name
    assert frame.metadata.compression == (compression or None)
    assert frame.metadata.payload_checksum == (zlib.crc32(payload) if checksum else None)
    assert data[3] == 4 | (2 if name else 0) | (1 if compression else 0)


def test_only_the_first_flag_matters_to_a_reader() -> None:
    for flags in range(2, 256, 2):
        changed = SMALL[:3] + bytes([flags]) + SMALL[4:]
        assert read_frame(changed) == read_frame(SMALL)


def test_an_uncompressed_payload_is_a_read_only_view_of_the_data() -> None:
    data = bytearray(SMALL)
    payload = read_frame(data).payload
    assert payload.readonly
    assert payload.obj is data


@pytest.mark.parametrize("data", [SMALL, kv_frame(tokens=3, layers=1), _packed(b"content" * 9)])
def test_every_truncation_and_every_addition_is_refused(data: bytes) -> None:
    for length in range(len(data)):
        with pytest.raises(TruncatedBundle, match="Fix: "):
            read_frame(data[:length])
    with pytest.raises(BundleError, match="Fix: send the whole frame, and only it"):
        read_frame(data + b"\0")


@pytest.mark.parametrize("data", [SMALL, write_frame(Metadata(hidden_dim=2), bytes(range(64)), compression="zstd")])
def test_every_flipped_bit_is_an_error_or_spares_the_payload(data: bytes) -> None:
    before = read_frame(data)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        frame = attempt(lambda changed=changed: read_frame(changed))  # type: ignore[misc]
        if isinstance(frame, AVPError):
            assert "Fix: " in str(frame)
        else:
            assert frame.payload == before.payload or frame.metadata.payload_checksum is None


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_crash_a_reader(data: bytes) -> None:
    for candidate in (data, b"AV\1" + data, _frame(data), _frame(data, flags=1), _frame(b"", data)):
        found = attempt(lambda candidate=candidate: read_frame(candidate))  # type: ignore[misc]
        assert isinstance(found, Frame) or "Fix: " in str(found)


@pytest.mark.parametrize(
    ("data", "error", "what"),
    [
        (b"AV" + bytes(10), UnsupportedBundle, "version 0"),
        (b"AV\2" + SMALL[3:], UnsupportedBundle, "version 2"),
        (b"VA" + SMALL[2:], BundleError, "no frame of AVP 0.4"),
        (struct.pack("<2sBBII", b"AV", 1, 0, 0, 1), BundleError, "1 bytes of metadata within 0"),
        (_frame(b"", size=2**32 - 1), TruncatedBundle, "declares 4294967295"),
        (_frame(b"x", metadata_bytes(Metadata(payload_checksum=0))), DigestMismatch, "CRC-32 differs"),
        (SMALL[:-1] + b"\xff", DigestMismatch, "CRC-32 differs"),
        (_frame(b"x", metadata_bytes(Metadata(compression="lz4")), flags=1), UnsupportedBundle, "'lz4'"),
        (_frame(b"no zstd at all", flags=1), BundleError, "no zstd frame"),
        (_frame(b"", flags=1), BundleError, "no zstd frame"),
        (_frame(zstandard.compress(b"content")[:-1], flags=1), BundleError, "no zstd frame"),
        (_frame(zstandard.compress(b"content") + b"\0", flags=1), BundleError, "no zstd frame"),
        (_packed(b"content", write_content_size=False), BundleError, "does not tell its size"),
    ],
)
def test_a_wrong_frame_is_refused_with_the_reason(data: bytes, error: type[BundleError], what: str) -> None:
    with pytest.raises(error, match=what) as caught:
        read_frame(data)
    assert type(caught.value) is error
    assert "Fix: " in str(caught.value)


def _claim(size: int) -> bytes:
    return _frame(b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"\x01\x00\x00", flags=1)


@pytest.mark.parametrize("limits", [Limits(), Limits(ratio=2**40, bytes=2**20)])
@pytest.mark.parametrize(
    "data",
    [
        _packed(bytes(2**28)),
        _packed(bytes(2**28), write_content_size=False),
        _claim(2**28),
        _claim(2**40),
        _claim(2**64 - 3),
        _frame(b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstandard.compress(bytes(2**28)), flags=1),
    ],
    ids=["told", "untold", "claim", "large claim", "largest claim", "after a skippable frame"],
)
def test_a_bomb_is_refused_and_nothing_is_allocated_for_it(data: bytes, limits: Limits) -> None:
    assert len(data) < 9000
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match="Fix: "):
            read_frame(data, limits=limits)
        assert tracemalloc.get_traced_memory()[1] < 2**17
    finally:
        tracemalloc.stop()


def test_more_bytes_than_the_limits_allow_are_refused_and_a_trusted_ratio_is_not() -> None:
    with pytest.raises(LimitExceeded, match=r"Fix: raise Limits\.bytes"):
        read_frame(SMALL, limits=Limits(bytes=len(SMALL) - 1))
    zeros = _packed(bytes(2**20))
    with pytest.raises(LimitExceeded, match=r"Fix: raise Limits\.ratio"):
        read_frame(zeros)
    assert len(read_frame(zeros, limits=Limits(ratio=2**16)).payload) == 2**20


def test_four_gibibytes_are_refused_before_they_are_read() -> None:
    with mmap.mmap(-1, 2**32) as empty:
        view = memoryview(empty)
        with pytest.raises(UsageError, match=r"4294967296 bytes do not fit .* Fix: hand over a bundle"):
            write_frame(Metadata(), view)
        with pytest.raises(UsageError, match="do not fit"):
            write_frame(Metadata(session_id="s"), view[: 2**32 - 2], checksum="")
        view.release()


@pytest.mark.parametrize("how", [{"compression": "lz4"}, {"checksum": "md5"}])
def test_an_unknown_compression_or_checksum_is_a_wrong_call(how: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="Fix: pass"):
        write_frame(Metadata(), b"", **how)


def test_without_zstandard_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _packed(b"content")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for call in (lambda: read_frame(data), lambda: write_frame(Metadata(), b"x", compression="zstd")):
        with pytest.raises(MissingExtra, match=r'pip install "avp\[zstd\]"'):
            call()
    assert read_frame(SMALL).metadata.session_id == "s"


def test_the_hashes_of_a_peer_depend_on_content_and_not_on_order() -> None:
    assert model_hash({"b": 1, "a": [None, 2.5]}) == model_hash({"a": [None, 2.5], "b": 1})
    assert tokenizer_hash({"b": 1, "a": 2}) == tokenizer_hash({"a": 2, "b": 1}) != tokenizer_hash({"a": 1, "b": 2})
    with pytest.raises(AVPError, match="Fix: pass"):
        model_hash({"a": {1, 2}})
