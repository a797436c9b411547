"""What a call carries, as bytes: the form that every transport uses that carries a stream of bytes.

A stream is a row of frames. `J`, a uint32 LE and so many bytes of JSON: an event. `B` and a bundle, whose own header
tells its length: a blob or a context. `E`: the end; a stream that stops before it was cut. docs/spec/protocol.md.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping

from avp import errors
from avp.blob import Blob, BundleReader, open_bundle
from avp.bundle import pack
from avp.context import Context
from avp.errors import AVPError, BundleError, Busy, ConnectionFailed, LimitExceeded
from avp.identity import canonical_json
from avp.manifest import Limits, parse_json
from avp.protocols import Event, Item

CONTENT_TYPE = "application/vnd.avp.stream"
CHUNK = 1 << 20  # bytes that go to a socket at once, where they do not lie in larger runs
_LONGEST = 86400.0  # seconds that a far end may ask to wait before the next try
_LENGTH = struct.Struct("<I")
_EVENT, _BUNDLE, _END = b"J", b"B", b"E"


def encode_item(item: Item) -> Iterator[bytes | memoryview]:
    """The frame of one item, in runs; the KV of a blob is not copied."""
    if isinstance(item, Blob):
        yield _BUNDLE
        yield from item.runs
    elif isinstance(item, Context):
        yield _BUNDLE + pack(item)
    else:
        text = canonical_json(dict(item)).encode()
        yield _EVENT + _LENGTH.pack(len(text)) + text


async def encode(items: AsyncIterable[Item]) -> AsyncGenerator[bytes | memoryview]:
    """The whole stream, in pieces of about `CHUNK` bytes; an error that ends the items ends the stream, as an event."""
    try:
        async for item in items:
            for chunk in gather(encode_item(item)):
                yield chunk
    except AVPError as error:
        for run in encode_item({"error": error_to_json(error)}):
            yield run
    yield _END


def gather(runs: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes in fewer pieces: small runs are joined, large ones left alone."""
    waiting: list[bytes | memoryview] = []
    size = 0
    for run in runs:
        if len(run) >= CHUNK:
            if waiting:
                yield b"".join(waiting)
                waiting, size = [], 0
            yield run
            continue
        waiting.append(run)
        size += len(run)
        if size >= CHUNK:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)


class Decoder:
    """Items out of a stream of bytes that comes in pieces of any size.

    Nothing larger than the limits is allocated; of a bundle its header is checked before its memory is.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._bundles = BundleReader(limits)
        self._kind = b""  # tag of the frame that is being read
        self._event = bytearray()
        self.ended = False

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Item]:
        """The items that are complete with these bytes.

        Raises:
            ConnectionFailed: bytes that are no frame. BundleError: a bundle that is not valid.
            AVPError: the far end ended the stream with it.
        """
        piece = memoryview(data).cast("B")
        while piece:
            item, piece = self.take(piece)
            if item is not None:
                yield item

    def take(self, piece: memoryview) -> tuple[Item | None, memoryview]:
        """Use what of the piece belongs to the current frame; the item if it is complete, and the rest. Raises as
        `feed`.
        """
        if not self._kind:
            return None, self._read_tag(piece)
        if self._kind == _BUNDLE:
            memory, piece = self._bundles.feed(piece)
            if memory is None:
                return None, piece
            self._kind = b""
            return open_bundle(memory, limits=self._limits, head=self._bundles.head), piece
        piece, event = self._read_event(piece)
        return event, piece

    @property
    def idle(self) -> bool:
        """Whether the stream stands between two frames."""
        return not self._kind

    def finish(self) -> None:
        """Say that no more bytes come.

        Raises:
            ConnectionFailed: the stream was cut.
        """
        if not self.ended:
            raise ConnectionFailed(
                "the connection ended in the middle of an answer; what was half received was thrown away. "
                "Fix: call again; segments that arrived whole are not sent twice."
            )

    def _read_tag(self, piece: memoryview) -> memoryview:
        tag = bytes(piece[:1])
        if self.ended or tag not in (_EVENT, _BUNDLE, _END):
            raise ConnectionFailed(
                f"byte {tag!r} came where a frame begins. Fix: check that the other end speaks AVP {CONTENT_TYPE}."
            )
        if tag == _END:
            self.ended = True
        else:
            self._kind = tag
        return piece[1:]

    def _read_event(self, piece: memoryview) -> tuple[memoryview, Event | None]:
        need = 4 - len(self._event)
        if need > 0:
            self._event += piece[:need]
            return piece[need:], None
        size = _LENGTH.unpack(self._event[:4])[0]
        if size > self._limits.header:
            raise LimitExceeded(
                f"an event of {size} bytes comes; at most {self._limits.header} are allowed. Fix: raise Limits.header."
            )
        taken = 4 + size - len(self._event)
        self._event += piece[:taken]
        if len(self._event) < 4 + size:
            return piece[taken:], None
        text = bytes(self._event[4:])
        self._kind, self._event = b"", bytearray()
        return piece[taken:], _event(text, self._limits)


def _event(text: bytes, limits: Limits) -> Event:
    try:
        event = parse_json(text, limits)
    except BundleError as error:
        raise ConnectionFailed(
            f"an event came that is no JSON object: {error} Fix: check that the other end speaks AVP."
        ) from error
    if "error" in event:
        raise error_from_json(event["error"])
    return event


async def decode(chunks: AsyncIterable[bytes | bytearray | memoryview], *, limits: Limits) -> AsyncGenerator[Item]:
    """The items of a whole stream; raises as `Decoder`."""
    decoder = Decoder(limits)
    async for chunk in chunks:
        for item in decoder.feed(chunk):
            yield item
    decoder.finish()


def error_to_json(error: AVPError) -> dict[str, object]:
    """An error as it travels: the name of its class, its message, and when to try again."""
    message = str(error).encode(errors="replace").decode()  # it may quote what is no text
    value: dict[str, object] = {"type": type(error).__name__, "message": message}
    if isinstance(error, Busy):
        value["retry_after"] = error.retry_after
    return value


def error_from_json(value: object) -> AVPError:
    """The error that the far end raised, as one of ours."""
    if not isinstance(value, Mapping) or not isinstance(value.get("message"), str):
        return ConnectionFailed("the other end failed without a reason. Fix: look at its log.")
    kind = vars(errors).get(str(value.get("type")))
    message = str(value["message"])[:65536]
    if kind is Busy:
        after = value.get("retry_after")
        sane = isinstance(after, int | float) and not isinstance(after, bool) and 0 <= after <= _LONGEST
        return Busy(message, retry_after=float(after) if sane else 1.0)  # type: ignore[arg-type]  # a number, if sane
    if isinstance(kind, type) and issubclass(kind, AVPError):
        return kind(message)
    return ConnectionFailed(f"the other end failed: {message}")
