"""The metadata of 0.4: as the protobuf library reads and writes them, and stricter."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from avp.errors import AVPError, BundleError, LimitExceeded, TruncatedBundle, UnsupportedBundle, UsageError
from avp.interop.avp04_proto import (
    METADATA_BYTES,
    DataType,
    Metadata,
    Mode,
    PayloadType,
    metadata_bytes,
    parse_metadata,
)

from .wire import attempt

descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2", reason="protobuf is not installed")
from google.protobuf import descriptor_pool, message, message_factory  # noqa: E402

_NUMBER, _TEXT, _MESSAGE = 13, 9, 11  # FieldDescriptorProto.Type: uint32 (an enum is the same on the wire), string
_FIELDS = [
    ("session_id", 1, _TEXT),
    ("source_agent_id", 2, _TEXT),
    ("target_agent_id", 3, _TEXT),
    ("model_id", 4, _TEXT),
    ("hidden_dim", 5, _NUMBER),
    ("num_layers", 6, _NUMBER),
    ("payload_type", 7, _NUMBER),
    ("dtype", 8, _NUMBER),
    ("tensor_shape", 9, _NUMBER),
    ("mode", 10, _NUMBER),
    ("compression", 11, _TEXT),
    ("avp_map_id", 13, _TEXT),
    ("extra", 14, _MESSAGE),
    ("payload_checksum", 15, _NUMBER),
]


def _library() -> type[message.Message]:
    """The message class that the protobuf library makes of the spec's fields."""
    file = descriptor_pb2.FileDescriptorProto(name="avp04_test.proto", package="avp04_test", syntax="proto3")
    whole = file.message_type.add(name="Metadata")
    entry = whole.nested_type.add(name="ExtraEntry", options=descriptor_pb2.MessageOptions(map_entry=True))
    for name, number in (("key", 1), ("value", 2)):
        entry.field.add(name=name, number=number, type=_TEXT, label=1)
    for name, number, kind in _FIELDS:
        made = whole.field.add(name=name, number=number, type=kind, label=3 if number in (9, 14) else 1)
        if number == 14:
            made.type_name = ".avp04_test.Metadata.ExtraEntry"
        if number in (11, 15):
            made.proto3_optional = True
            made.oneof_index = len(whole.oneof_decl)
            whole.oneof_decl.add(name=f"_{name}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("avp04_test.Metadata"))


LIBRARY = _library()


def _by_library(data: bytes) -> Metadata:
    """What the library reads, as our value."""
    found = LIBRARY.FromString(data)
    plain = {name: getattr(found, name) for name, number, _ in _FIELDS if number not in (7, 8, 9, 10, 14)}
    for name in ("compression", "payload_checksum"):
        plain[name] = plain[name] if found.HasField(name) else None
    return Metadata(
        **plain,
        payload_type=PayloadType(found.payload_type),
        dtype=DataType(found.dtype),
        mode=Mode(found.mode),
        tensor_shape=tuple(found.tensor_shape),
        extra=dict(found.extra),
    )


_texts = st.text(max_size=20)
_uint32 = st.integers(0, 2**32 - 1)
METADATA = st.builds(
    Metadata,
    _texts,
    _texts,
    _texts,
    _texts,
    _uint32,
    _uint32,
    st.sampled_from(PayloadType),
    st.sampled_from(DataType),
    st.lists(_uint32, max_size=8).map(tuple),
    st.sampled_from(Mode),
    st.none() | st.sampled_from(["", "zstd"]),
    _texts,
    st.dictionaries(_texts, _texts, max_size=4).map(MappingProxyType),
    st.none() | _uint32,
)


def _plain(metadata: Metadata) -> Metadata:
    return replace(metadata, extra=dict(metadata.extra))


@settings(deadline=None)
@given(METADATA)
def test_what_we_write_the_library_reads_and_so_do_we(metadata: Metadata) -> None:
    data = metadata_bytes(metadata)
    assert _plain(parse_metadata(memoryview(data))) == _plain(metadata)
    assert _by_library(data) == _plain(metadata)


@settings(deadline=None)
@given(METADATA)
def test_what_the_library_writes_we_read_and_write_again_byte_for_byte(metadata: Metadata) -> None:
    theirs = LIBRARY(**{name: getattr(metadata, name) for name, *_ in _FIELDS if getattr(metadata, name) is not None})
    data = theirs.SerializeToString()
    found = parse_metadata(memoryview(data))
    assert _plain(found) == _plain(metadata)
    assert metadata_bytes(found) == data


@settings(deadline=None)
@given(st.binary(max_size=40))
@example(b"\x48\x05\x48\x06")  # tensor_shape, not packed
@example(b"\x4a\x01\x05\x48\x06\x4a\x00")  # packed, not packed, empty
@example(b"\x28\x01\x28\x02")  # a field twice: the last holds
@example(b"\x72\x00\x72\x04\x0a\x00\x12\x00")  # map entries without key and value
@example(b"\x60\x07\xa2\x06\x01x\xa5\x06abcd\xa1\x06abcdefgh")  # the reserved field and unknown ones of each wire type
@example(b"\x28\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00")  # padded to ten bytes
def test_what_we_accept_the_library_reads_the_same(data: bytes) -> None:
    found = attempt(lambda: parse_metadata(memoryview(data)))
    if isinstance(found, AVPError):
        assert "Fix: " in str(found)
    else:
        assert _plain(found) == _by_library(data)


@settings(deadline=None)
@given(METADATA, st.data())
def test_a_flipped_bit_is_an_error_or_reads_as_the_library_reads_it(metadata: Metadata, data: st.DataObject) -> None:
    raw = bytearray(metadata_bytes(metadata))
    if raw:
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
    test_what_we_accept_the_library_reads_the_same.hypothesis.inner_test(bytes(raw))


def test_unknown_fields_are_skipped() -> None:
    known = metadata_bytes(Metadata(session_id="s"))
    for more in (b"\x60\x07", b"\xa2\x06\x03abc", b"\xa5\x06abcd", b"\xa1\x06abcdefgh"):
        assert parse_metadata(memoryview(more + known)) == parse_metadata(memoryview(known))


@pytest.mark.parametrize(
    ("data", "error", "what"),
    [
        (b"\x28", TruncatedBundle, "end within a number"),
        (b"\x28\xff", TruncatedBundle, "end within a number"),
        (b"\x0a\x05abc", TruncatedBundle, "takes 5 bytes where 3 are left"),
        (b"\x0a\xff\xff\xff\xff\x0f", TruncatedBundle, "takes 4294967295 bytes where 0 are left"),
        (b"\xa5\x06abc", TruncatedBundle, "takes 4 bytes where 3 are left"),
        (b"\x28" + b"\xff" * 10 + b"\x01", BundleError, "more than 64 bits"),
        (b"\x28" + b"\xff" * 9 + b"\x7f", BundleError, "more than 64 bits"),
        (b"\x28\x80\x80\x80\x80\x10", BundleError, "field 5 .* is no number of 32 bits"),
        (b"\x2a\x00", BundleError, "field 5 .* is no number of 32 bits"),
        (b"\x2d\x00\x00\x00\x00", BundleError, "field 5 .* is no number of 32 bits"),
        (b"\x08\x00", BundleError, "field 1 .* is no string"),
        (b"\x0a\x01\xff", BundleError, "field 1 .* is not UTF-8"),
        (b"\x0a\x03\xed\xa0\x80", BundleError, "field 1 .* is not UTF-8"),
        (b"\x70\x00", BundleError, "no map entry"),
        (b"\x72\x02\x08\x00", BundleError, "field 14 .* is no string"),
        (b"\x72\x04\x10\x30\x12\x00", BundleError, "field 14 .* is no string"),
        (b"\x72\x02\x1a\x00", BundleError, "more than key and value"),
        (b"\x4a\x09" + b"\x01" * 9, BundleError, "more than 8 dimensions"),
        (b"\x48\x01" * 9, BundleError, "more than 8 dimensions"),
        (b"\x4a\x01\x80", TruncatedBundle, "end within a number"),
        (b"\x00\x00", BundleError, "a field of number 0"),
        (b"\x80\x80\x80\x80\x10\x00", BundleError, "a field of number 536870912"),
        (b"\x0b\x0c", BundleError, "wire type 3"),
        (b"\x0f", BundleError, "wire type 7"),
        (b"\x38\x02", UnsupportedBundle, "unknown payload type 2"),
        (b"\x40\x04", UnsupportedBundle, "unknown dtype 4"),
        (b"\x50\x02", UnsupportedBundle, "unknown mode 2"),
        (b"\x0a\xfe\xff\x03" + b"a" * (METADATA_BYTES - 2), LimitExceeded, "at most 65536 are read"),
    ],
)
def test_wrong_metadata_are_refused_with_the_reason(data: bytes, error: type[BundleError], what: str) -> None:
    with pytest.raises(error, match=what) as caught:
        parse_metadata(memoryview(data))
    assert type(caught.value) is error
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize(
    "metadata", [Metadata(hidden_dim=2**32), Metadata(num_layers=-1), Metadata(session_id="\ud800")]
)
def test_what_the_message_cannot_hold_is_not_written(metadata: Metadata) -> None:
    with pytest.raises(UsageError, match="Fix: "):
        metadata_bytes(metadata)
