"""The frames of AVP spec 0.4: 12 bytes, metadata, payload. For peers that speak nothing newer.

| bytes | field |
|---|---|
| 0-1 | "AV" |
| 2 | version, 1 |
| 3 | flags; bit 0: the payload is zstd. Spec and SDK differ in the others: written as the SDK does, never read |
| 4-7 | uint32 LE: bytes of metadata and payload |
| 8-11 | uint32 LE: bytes of metadata |
| 12.. | metadata (`avp04_proto`), then the payload |
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from avp import registry
from avp.errors import BundleError, DigestMismatch, LimitExceeded, TruncatedBundle, UnsupportedBundle, UsageError
from avp.interop.avp04_proto import Metadata, PayloadType, check_metadata_size, metadata_bytes, parse_metadata
from avp.manifest import Limits

CONTENT_TYPE = "application/avp+binary"
VERSION = 1
_HEADER = struct.Struct("<2sBBII")
_MAGIC = b"AV"
_ZSTD, _MAP, _KV = 1, 2, 4  # flags, as the SDK sets them
_LEVEL = 3  # of zstd; the SDK's "balanced"
_FREE = 2**16  # a payload may expand to this many bytes whatever `Limits.ratio` says
_ASK = "Fix: ask the sender for a valid frame."


@dataclass(frozen=True, slots=True)
class Frame:
    """One message of 0.4: its metadata, and the payload's bytes, decompressed and read-only."""

    metadata: Metadata
    payload: memoryview


def read_frame(data: bytes | bytearray | memoryview, *, limits: Limits | None = None) -> Frame:
    """The frame in `data`; an uncompressed payload is a view of it. The CRC-32 is checked where there is one.

    Raises:
        TruncatedBundle: the data end too early. LimitExceeded: more bytes, or a payload that expands to more, than
            `limits` allow. DigestMismatch: the CRC-32 differs. UnsupportedBundle: another version, or an unknown value.
        BundleError: no frame, or more than one. MissingExtra: zstandard is not installed.
    """
    limits = limits or Limits()
    view = memoryview(data).toreadonly().cast("B")
    _check_limit(len(view), limits)
    flags, metadata, payload = _take_apart(view)
    if flags & _ZSTD:
        if metadata.compression not in (None, "zstd"):
            raise UnsupportedBundle(
                f"the payload is compressed with {metadata.compression[:40]!r}, and 0.4 knows zstd only. {_ASK}"
            )
        payload = _decompress(payload, limits)
    expected = metadata.payload_checksum
    if expected is not None and zlib.crc32(payload) != expected:
        raise DigestMismatch(
            f"the {len(payload)} bytes of the payload are not those that were written (CRC-32 differs). "
            "Nothing of them was used. Fix: fetch the frame again."
        )
    return Frame(metadata, payload)


def peek_frame(data: bytes | bytearray | memoryview, *, limits: Limits | None = None) -> tuple[int, Metadata] | None:
    """Bytes of the frame that begins so, and its metadata; None as long as `data` end within them.

    Raises:
        LimitExceeded: more bytes than `limits` allow, or more metadata than are read. Else as `read_frame`.
    """
    view = memoryview(data).cast("B")
    if len(view) < _HEADER.size:
        return None
    _, size, metadata_size = _read_head(view)
    _check_limit(_HEADER.size + size, limits or Limits())
    check_metadata_size(metadata_size)
    metadata = view[_HEADER.size : _HEADER.size + metadata_size]
    return (_HEADER.size + size, parse_metadata(metadata)) if len(metadata) == metadata_size else None


def expanded_size(data: bytes | bytearray | memoryview, *, limits: Limits | None = None) -> int:
    """Bytes that a compressed payload takes besides the frame once it is decompressed; 0 where nothing is compressed.

    Raises as `read_frame`.
    """
    flags, _, payload = _take_apart(memoryview(data).cast("B"))
    return _content_size(payload, limits or Limits()) if flags & _ZSTD else 0


def _check_limit(size: int, limits: Limits) -> None:
    if size > limits.bytes:
        raise LimitExceeded(f"the frame has {size} bytes; at most {limits.bytes} are allowed. Fix: raise Limits.bytes.")


def _take_apart(view: memoryview) -> tuple[int, Metadata, memoryview]:
    """Flags, metadata, and the payload as it was sent."""
    flags, size, metadata_size = _read_head(view)
    body = view[_HEADER.size :]
    if len(body) != size:
        error = TruncatedBundle if len(body) < size else BundleError
        raise error(
            f"{len(body)} bytes follow the frame's header where it declares {size}. "
            "Fix: send the whole frame, and only it."
        )
    return flags, parse_metadata(body[:metadata_size]), body[metadata_size:]


def _read_head(view: memoryview) -> tuple[int, int, int]:
    """Flags, and the bytes of metadata and payload, and of metadata alone."""
    if len(view) < _HEADER.size:
        raise TruncatedBundle(
            f"the frame has {len(view)} bytes; its header alone takes {_HEADER.size}. Fix: send the whole frame."
        )
    magic, version, flags, size, metadata_size = _HEADER.unpack(view[: _HEADER.size])
    if magic != _MAGIC:
        raise BundleError(f'the bytes begin with {magic!r}, not with "AV": this is no frame of AVP 0.4. {_ASK}')
    if version != VERSION:
        raise UnsupportedBundle(f"the frame has version {version}; this reader knows {VERSION}. Fix: upgrade avp.")
    if metadata_size > size:
        raise BundleError(f"the frame declares {metadata_size} bytes of metadata within {size}. {_ASK}")
    return flags, size, metadata_size


def _decompress(packed: memoryview, limits: Limits) -> memoryview:
    """The content of one zstd frame, whose size it tells and the limits allow; both are checked before it is made."""
    size = _content_size(packed, limits)
    import zstandard

    try:
        content = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _no_zstd(error) from error
    return memoryview(content)


def _content_size(packed: memoryview, limits: Limits) -> int:
    """The size that one zstd frame tells, which the limits allow."""
    try:
        import zstandard
    except ImportError as error:
        raise registry.missing_extra(error, feature="a compressed frame of AVP 0.4") from error
    try:
        size = zstandard.frame_content_size(packed)
    except zstandard.ZstdError as error:
        raise _no_zstd(error) from error
    if size < 0:
        raise BundleError(f"the payload's zstd frame does not tell its size. {_ASK}")
    if size > limits.bytes or size > max(limits.ratio * len(packed), _FREE):
        raise LimitExceeded(
            f"the payload would expand from {len(packed)} to {size} bytes, more than {limits.ratio} times or than "
            f"{limits.bytes} bytes. Fix: raise Limits.ratio or Limits.bytes if the sender is trusted."
        )
    return size


def _no_zstd(error: Exception) -> BundleError:
    return BundleError(f"the payload is no zstd frame: {error}. {_ASK}")


def write_frame(
    metadata: Metadata,
    payload: bytes | bytearray | memoryview | Sequence[memoryview],
    *,
    compression: str = "",
    checksum: str = "crc32",
) -> bytes:
    """One frame; the payload, whole or in runs, is copied once, into the result.

    compression: "" or "zstd". checksum: "crc32", as the SDK writes, or "" for none. Both overrule the metadata.

    Raises:
        UsageError: another compression or checksum; more than 4 GiB; a number or a text that the metadata cannot hold.
        MissingExtra: zstandard is not installed.
    """
    if compression not in ("", "zstd"):
        raise UsageError(f'compression is {compression!r}. Fix: pass "" or "zstd".')
    if checksum not in ("", "crc32"):
        raise UsageError(f'checksum is {checksum!r}. Fix: pass "" or "crc32".')
    given = (memoryview(payload),) if isinstance(payload, bytes | bytearray | memoryview) else payload
    runs = [run.cast("B") for run in given]
    if not compression:
        check_size(sum(map(len, runs)))
    crc = 0
    for run in runs if checksum else ():
        crc = zlib.crc32(run, crc)
    if compression:
        runs = [memoryview(_compress(runs))]
    flags = (_ZSTD if compression else 0) | (_MAP if metadata.avp_map_id else 0)
    flags |= _KV if metadata.payload_type is PayloadType.KV_CACHE else 0
    head = metadata_bytes(
        replace(metadata, compression=compression or None, payload_checksum=crc if checksum else None)
    )
    size = len(head) + sum(map(len, runs))
    check_size(size)
    return b"".join([_HEADER.pack(_MAGIC, VERSION, flags, size, len(head)), head, *runs])


def check_size(size: int) -> None:
    """Whether a frame can hold so many bytes of metadata and payload.

    Raises:
        UsageError: its length is a uint32.
    """
    if size >= 2**32:
        raise UsageError(
            f"{size} bytes do not fit a frame of AVP 0.4, whose length is a number of 32 bits (4 GiB). "
            "Fix: hand over a bundle (Context.to_bytes), which has no such end, or fewer positions, or bfloat16."
        )


def _compress(runs: list[memoryview]) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise registry.missing_extra(error, feature="compression of a frame of AVP 0.4") from error
    stream = zstandard.ZstdCompressor(level=_LEVEL).compressobj(size=sum(map(len, runs)))
    return b"".join([*(stream.compress(run) for run in runs), stream.flush()])


def model_hash(config: Mapping[str, object]) -> str:
    """What a 0.4 peer calls its model: SHA-256 of the config's JSON (`model.config.to_dict()`), 64 hex digits.

    The config holds the path that the model was loaded from and the version of transformers: equal models may differ
    in it, and different weights may agree.
    """
    return _sha256(config)


def tokenizer_hash(vocabulary: Mapping[str, int]) -> str:
    """What a 0.4 peer calls its tokenizer: SHA-256 of the JSON of the sorted vocabulary, 64 hex digits."""
    return _sha256(sorted(vocabulary.items()))


def _sha256(value: object) -> str:
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the config is not JSON: {error}. Fix: pass model.config.to_dict().") from error
    return hashlib.sha256(text.encode()).hexdigest()
