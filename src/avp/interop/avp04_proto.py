"""The metadata of an AVP 0.4 frame: a proto3 message of 14 fields, read strictly and written without a library.

Unknown fields are skipped, as proto3 says. Stricter than proto3: a known field of another wire type, a number beyond
its 32 bits, a group, a map entry with more than key and value, and an enum value that nobody knows are errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType

from avp.errors import BundleError, LimitExceeded, TruncatedBundle, UnsupportedBundle, UsageError

METADATA_BYTES = 2**16  # longer metadata are refused: the SDK's take some 300 bytes
_RANK = 8  # dimensions of `tensor_shape`
_ASK = "Fix: ask the sender for a valid frame."
_NOTHING: Mapping[str, str] = MappingProxyType({})


class PayloadType(IntEnum):
    """What the payload is. An older spec had 2, EMBEDDING; the SDK refuses it, and so do we."""

    HIDDEN_STATE = 0
    KV_CACHE = 1


class Mode(IntEnum):
    """How the peers agreed to talk. An older spec had 1 for HYBRID and 2 for JSON."""

    LATENT = 0
    JSON = 1


class DataType(IntEnum):
    """Numbers of the payload."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    INT8 = 3

    @property
    def label(self) -> str:
        """Name of the dtype as a Buffer has it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Metadata:
    """Fields 1 to 15 of the message `avp.Metadata`; `compression` and `payload_checksum` may be absent (None)."""

    session_id: str = ""
    source_agent_id: str = ""
    target_agent_id: str = ""
    model_id: str = ""
    hidden_dim: int = 0
    num_layers: int = 0
    payload_type: PayloadType = PayloadType.HIDDEN_STATE
    dtype: DataType = DataType.FLOAT32
    tensor_shape: tuple[int, ...] = ()
    mode: Mode = Mode.LATENT
    compression: str | None = None
    avp_map_id: str = ""
    extra: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    payload_checksum: int | None = None


# --- reading

_STRINGS = frozenset({1, 2, 3, 4, 11, 13})
_NUMBERS = frozenset({5, 6, 7, 8, 10, 15})
_SHAPE, _EXTRA = 9, 14
_FIXED: Mapping[int, int] = MappingProxyType({1: 8, 5: 4})  # wire type -> bytes


def check_metadata_size(size: int) -> None:
    """Whether so many bytes of metadata are read; raises LimitExceeded."""
    if size > METADATA_BYTES:
        raise LimitExceeded(
            f"the frame's metadata take {size} bytes; at most {METADATA_BYTES} are read. Fix: send less in extra."
        )


def parse_metadata(data: memoryview) -> Metadata:
    """The message in `data` (all of it).

    Raises:
        TruncatedBundle: a field ends beyond the data. LimitExceeded: more than `METADATA_BYTES`.
        UnsupportedBundle: an unknown payload type, dtype or mode. BundleError: no such message.
    """
    check_metadata_size(len(data))
    strings: dict[int, str] = {}
    numbers: dict[int, int] = {}
    shape: list[int] = []
    extra: dict[str, str] = {}
    for number, value in _fields(data):
        if number in _STRINGS:
            strings[number] = _text(number, value)
        elif number in _NUMBERS:
            numbers[number] = _uint32(number, value)
        elif number == _SHAPE:
            _add_sizes(shape, value)
        elif number == _EXTRA:
            key, text = _entry(value)
            extra[key] = text
    return Metadata(
        session_id=strings.get(1, ""),
        source_agent_id=strings.get(2, ""),
        target_agent_id=strings.get(3, ""),
        model_id=strings.get(4, ""),
        hidden_dim=numbers.get(5, 0),
        num_layers=numbers.get(6, 0),
        payload_type=PayloadType(_known(PayloadType, "payload type", numbers.get(7, 0))),
        dtype=DataType(_known(DataType, "dtype", numbers.get(8, 0))),
        tensor_shape=tuple(shape),
        mode=Mode(_known(Mode, "mode", numbers.get(10, 0))),
        compression=strings.get(11),
        avp_map_id=strings.get(13, ""),
        extra=MappingProxyType(extra),
        payload_checksum=numbers.get(15),
    )


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview | None]]:
    """Number and value of each field: a varint, bytes, or None for a number of fixed width, which we have none of."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 2**29:
            raise BundleError(f"the frame's metadata hold a field of number {number}. {_ASK}")
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:
            raise BundleError(f"field {number} of the frame's metadata has the wire type {wire}. {_ASK}")
        if size > len(data) - at:
            raise TruncatedBundle(
                f"field {number} of the frame's metadata takes {size} bytes where {len(data) - at} are left. {_ASK}"
            )
        yield number, data[at : at + size] if wire == 2 else None
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at == len(data):
            raise TruncatedBundle(f"the frame's metadata end within a number. {_ASK}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, at
    raise BundleError(f"the frame's metadata hold a number of more than 64 bits. {_ASK}")


def _uint32(number: int, value: int | memoryview | None) -> int:
    if not isinstance(value, int) or value >= 2**32:
        raise BundleError(f"field {number} of the frame's metadata is no number of 32 bits. {_ASK}")
    return value


def _text(number: int, value: int | memoryview | None) -> str:
    if not isinstance(value, memoryview):
        raise BundleError(f"field {number} of the frame's metadata is no string. {_ASK}")
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"field {number} of the frame's metadata is not UTF-8. {_ASK}") from error


def _add_sizes(shape: list[int], value: int | memoryview | None) -> None:
    """One element of the repeated field, or a packed run of them."""
    at = 0
    while isinstance(value, memoryview) and at < len(value):
        size, at = _varint(value, at)
        shape.append(_uint32(_SHAPE, size))
        if len(shape) > _RANK:
            break
    if not isinstance(value, memoryview):
        shape.append(_uint32(_SHAPE, value))
    if len(shape) > _RANK:
        raise BundleError(f"the frame's tensor_shape has more than {_RANK} dimensions. {_ASK}")


def _entry(value: int | memoryview | None) -> tuple[str, str]:
    """Key and value of a map entry; what is absent is empty."""
    if not isinstance(value, memoryview):
        raise BundleError(f"field {_EXTRA} of the frame's metadata is no map entry. {_ASK}")
    found = {number: _text(_EXTRA, part) for number, part in _fields(value)}
    if not set(found) <= {1, 2}:  # libraries differ: some drop the entry, some the field
        raise BundleError(f"field {_EXTRA} of the frame's metadata holds more than key and value. {_ASK}")
    return found.get(1, ""), found.get(2, "")


def _known(kind: type[IntEnum], name: str, value: int) -> int:
    if value not in {int(each) for each in kind}:
        names = ", ".join(f"{int(each)} {each.name}" for each in kind)
        raise UnsupportedBundle(f"the frame has the unknown {name} {value}. Fix: upgrade avp; known are {names}.")
    return value


# --- writing


def metadata_bytes(metadata: Metadata) -> bytes:
    """The message, fields in order of their numbers, absent and empty ones left out; `extra` in its own order.

    Raises:
        UsageError: a number beyond 32 bits, or a string that is no UTF-8.
    """
    strings = (metadata.session_id, metadata.source_agent_id, metadata.target_agent_id, metadata.model_id)
    numbers = (metadata.hidden_dim, metadata.num_layers, metadata.payload_type, metadata.dtype)
    parts = [_string(number, text) for number, text in enumerate(strings, 1) if text]
    parts += [_number(number, value) for number, value in enumerate(numbers, 5) if value]
    if metadata.tensor_shape:
        parts.append(_bytes(_SHAPE, b"".join(_small(size) for size in metadata.tensor_shape)))
    if metadata.mode:
        parts.append(_number(10, metadata.mode))
    if metadata.compression is not None:
        parts.append(_string(11, metadata.compression))
    if metadata.avp_map_id:
        parts.append(_string(13, metadata.avp_map_id))
    parts += [_bytes(_EXTRA, _string(1, key) + _string(2, text)) for key, text in metadata.extra.items()]
    if metadata.payload_checksum is not None:
        parts.append(_number(15, metadata.payload_checksum))
    return b"".join(parts)


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _small(value: int) -> bytes:
    if not 0 <= value < 2**32:
        raise UsageError(f"{value} is no number of 32 bits, which a 0.4 frame holds. Fix: pass 0 to 2^32-1.")
    return _encode(value)


def _number(number: int, value: int) -> bytes:
    return _encode(number << 3) + _small(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _encode(number << 3 | 2) + _encode(len(value)) + value


def _string(number: int, text: str) -> bytes:
    try:
        return _bytes(number, text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{text[:40]!r} holds half a surrogate pair, which is no text. Fix: pass whole characters."
        ) from error
