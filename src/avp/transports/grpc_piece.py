"""What both ends of a gRPC call share: pieces of the stream as messages, errors as statuses (docs/spec/avp.proto)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Mapping
from urllib.parse import quote

from grpc import StatusCode

from avp import errors, wire
from avp.errors import AVPError, Busy, ConnectionFailed
from avp.protocols import Item

SERVICE = "avp.v1.Agent"
METHOD = "Call"
VERB = "avp-verb"
AUTHORIZATION = "authorization"
RETRY = "retry-after"  # seconds, in the trailing metadata
PIECE = 1 << 20  # bytes of the stream in a message; measured best
MESSAGE_LIMIT = 8 << 20  # bytes that either end takes in one message
WINDOW = (  # of fixed size: one that grows with the line's speed lets 40 MiB pile up before a slow reader
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 << 20),
)
_DETAILS = 4096  # bytes of a message as they travel: peers refuse 8 KiB of metadata
_END = b"E"
_TAG = 0x0A  # field 1, length-delimited
_VISIBLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")  # travels as it is, the rest as %XX

_CODES: Mapping[type[AVPError], StatusCode] = {
    errors.UsageError: StatusCode.INVALID_ARGUMENT,
    errors.MissingExtra: StatusCode.UNIMPLEMENTED,
    errors.ModelNotFound: StatusCode.NOT_FOUND,
    errors.IdentityMismatch: StatusCode.FAILED_PRECONDITION,
    errors.UnsupportedCache: StatusCode.FAILED_PRECONDITION,
    errors.ContextTooLong: StatusCode.OUT_OF_RANGE,
    errors.NoAgreement: StatusCode.FAILED_PRECONDITION,
    errors.HandleExpired: StatusCode.NOT_FOUND,
    errors.SegmentMissing: StatusCode.NOT_FOUND,
    errors.StoreFailed: StatusCode.INTERNAL,
    errors.AccessDenied: StatusCode.UNAUTHENTICATED,
    errors.Busy: StatusCode.RESOURCE_EXHAUSTED,
    errors.TimedOut: StatusCode.DEADLINE_EXCEEDED,
    errors.ConnectionFailed: StatusCode.UNAVAILABLE,
    errors.BundleError: StatusCode.INVALID_ARGUMENT,
}


def status_of(error: AVPError) -> StatusCode:
    """What a client that does not know AVP sees of the error."""
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), StatusCode.UNKNOWN)


def details_of(error: AVPError) -> str:
    """The error's message for such a client, shortened to what every peer takes as metadata."""
    text = str(error)
    while len(quote(text, safe=_VISIBLE)) > _DETAILS:
        text = text[: len(text) * 3 // 4] + "…"
    return text


def trailer_of(error: AVPError) -> tuple[tuple[str, str], ...]:
    """The rest of it: when to try again."""
    return ((RETRY, f"{error.retry_after:g}"),) if isinstance(error, Busy) else ()


async def request(items: AsyncIterable[Item]) -> AsyncGenerator[bytes]:
    """As `pieces`; an error that ends the items ends the stream, as an event."""
    try:
        async for piece in pieces(items):
            yield piece
    except AVPError as error:
        yield error_piece(error)


async def pieces(items: AsyncIterable[Item]) -> AsyncGenerator[bytes]:
    """The stream of the items as messages, ready to be sent; raises what `items` raises."""
    async for item in items:
        for piece in pieces_of(item):
            yield piece
    yield make_piece([_END])


def error_piece(error: AVPError) -> bytes:
    """The message that ends a stream with an error."""
    return make_piece([*wire.encode_item({"error": wire.error_to_json(error)}), _END])


def pieces_of(item: Item) -> Iterator[bytes]:
    """The messages that carry the frame of one item; its bytes are copied once."""
    waiting: list[bytes | memoryview] = []
    room = PIECE
    for run in wire.encode_item(item):
        view = memoryview(run)
        while len(view) >= room:
            waiting.append(view[:room])
            yield make_piece(waiting)
            view, waiting, room = view[room:], [], PIECE
        if view:
            waiting.append(view)
            room -= len(view)
    if waiting:
        yield make_piece(waiting)


def make_piece(runs: list[bytes | memoryview]) -> bytes:
    """`Piece { bytes data = 1; }` of these bytes, serialised."""
    size = sum(map(len, runs))
    head = bytearray([_TAG])
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return b"".join((head, *runs))


def read_piece(message: bytes) -> memoryview:
    """The data of a serialised `Piece`, not copied.

    Raises:
        ConnectionFailed: it is none, or has another field.
    """
    if not message:
        return memoryview(b"")
    size = 0
    for at, byte in enumerate(message[1:6]):
        size |= (byte & 0x7F) << 7 * at
        if byte < 0x80:
            if message[0] != _TAG or size != len(message) - at - 2:
                break
            return memoryview(message)[at + 2 :]
    raise ConnectionFailed(
        "a gRPC message came that is no avp.v1.Piece. Fix: send what docs/spec/avp.proto describes, "
        "without other fields."
    )
