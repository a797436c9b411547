"""HTTP/2 as either end sees it: streams with flow control of their own over one connection.

A stream's bytes are acknowledged when they are used, not when they come. So one that is read slowly, or not at all,
holds up neither the connection nor the answer that goes the other way; servers that acknowledge at once cannot say so.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
from h2.settings import SettingCodes, Settings

from avp.errors import ConnectionFailed

Fields = Sequence[tuple[bytes, bytes]]

_FRAME = 1 << 18  # bytes of the largest frame that we take
_CAREFUL = 16  # streams that are opened before the other end says how many it allows
_FIELDS = (1, 9)  # types of frames that hold header fields
PREFACE = 24  # bytes before a client's first frame
_RESETS = 200  # streams that a client may cancel on one connection


@dataclass(frozen=True, slots=True)
class Windows:
    """Bytes that may be under way, not yet used, on a stream and on the whole connection; streams at once."""

    stream: int = 1 << 20
    connection: int = 1 << 23
    streams: int = 32
    header: int = 1 << 15


class Stream:
    """One request and its answer."""

    def __init__(self, connection: Http2, number: int, fields: Fields | None = None) -> None:
        self.number = number
        self.fields = fields  # what the other end opened its half with
        self.lost = ""  # why nothing can be sent or read any more
        self._connection = connection
        self._inbox: deque[tuple[bytes, int]] = deque()
        self._ended = False  # the other end sends no more
        self._sent_all = False
        self._news, self._credit = asyncio.Event(), asyncio.Event()

    @property
    def finished(self) -> bool:
        """Whether both halves were ended in order."""
        return self._ended and self._sent_all

    async def head(self) -> Fields | None:
        """The fields that the other end opens its half with; None where it never does."""
        while self.fields is None and not self.lost and not self._ended:
            await self._wait()
        return self.fields

    async def read(self) -> bytes | None:
        """Some bytes of the other half; None at its end.

        Raises:
            ConnectionFailed: it was cut off.
        """
        while not self._inbox:
            if self._ended:
                return None
            if self.lost:
                raise ConnectionFailed(f"{self.lost}. Fix: call again.")
            await self._wait()
        data, size = self._inbox.popleft()
        self._connection.used(self.number, size)
        return data

    async def until_lost(self) -> None:
        """Wait until the other end is gone or no longer wants this stream."""
        while not self.lost:
            await self._wait()

    async def write(self, data: bytes | memoryview) -> None:
        """Send the bytes; returns when there is room for more.

        Raises:
            ConnectionFailed: the other end wants no more.
        """
        view, start = memoryview(data), 0
        while start < len(view):
            if self.lost:
                raise ConnectionFailed(f"{self.lost}. Fix: call again.")
            taken = self._connection.send(self.number, view[start:])
            start += taken
            if taken:
                await self._connection.drain()
            else:
                self._credit.clear()
                await self._credit.wait()

    def respond(self, fields: Fields) -> None:
        """Open our half of a stream that the other end began."""
        if not self.lost:
            self._connection.send_fields(self.number, fields)

    def end(self) -> None:
        """Say that our half is complete."""
        if not self.lost and not self._sent_all:
            self._sent_all = True
            self._connection.send_end(self.number)

    def drop(self, code: h2.errors.ErrorCodes = h2.errors.ErrorCodes.CANCEL) -> None:
        """Let go of the stream; the other end hears of it unless both halves were complete."""
        self._connection.drop(self, None if self.finished or self.lost else code)
        self.lose("the stream was closed")

    # What the connection says.

    def begin(self, fields: Fields) -> None:
        """The other half begins with these fields."""
        self.fields = fields
        self._news.set()

    def came(self, data: bytes, size: int) -> None:
        """Bytes of the other half."""
        self._inbox.append((data, size))
        self._news.set()

    def complete(self) -> None:
        """The other half is."""
        self._ended = True
        self._news.set()

    def lose(self, reason: str) -> None:
        """Nothing more goes either way."""
        self.lost = self.lost or reason
        self._news.set()
        self._credit.set()

    def wake(self) -> None:
        """There may be room to send."""
        self._credit.set()

    @property
    def unused(self) -> int:
        """Bytes that came and nobody read."""
        return sum(size for _, size in self._inbox)

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()


class Frames:
    """Finds the frames in a row of bytes, and what belongs to which stream."""

    def __init__(self, *, skip: int, header: int = _FRAME) -> None:
        self._header = header
        self._head = bytearray()
        self._left = skip  # bytes of the frame that is going by
        self._number = 0
        self.overlong = False  # one is longer than it may be: h2 would say so when it has all of it

    def feed(self, data: bytes) -> dict[int, int]:
        """Bytes by stream; those of the connection itself under 0."""
        counts: dict[int, int] = {}
        start = 0
        while start < len(data):
            if self._left:
                taken = min(self._left, len(data) - start)
                self._left -= taken
            else:
                taken = min(9 - len(self._head), len(data) - start)
                self._head += data[start : start + taken]
                if len(self._head) < 9:
                    counts[0] = counts.get(0, 0) + taken  # a frame's head in two pieces, a few bytes
                    return counts
                self._begin()
            counts[self._number] = counts.get(self._number, 0) + taken
            start += taken
        return counts

    def _begin(self) -> None:
        self._left = int.from_bytes(self._head[:3], "big")
        self._number = int.from_bytes(self._head[5:9], "big") & 0x7FFFFFFF
        most = self._header if self._head[3] in _FIELDS else _FRAME
        self.overlong = self.overlong or self._left > most
        self._head.clear()


class Http2:
    """A connection. `write` puts bytes on the socket; `opened` is called with each stream that the other end begins."""

    def __init__(
        self,
        *,
        client: bool,
        write: Callable[[bytes], None],
        drain: Callable[[], Awaitable[object]],
        opened: Callable[[Stream], None] | None = None,
        windows: Windows,
    ) -> None:
        config = h2.config.H2Configuration(client_side=client, header_encoding=None)
        self.streams: dict[int, Stream] = {}
        self.closing = ""  # why no new stream may be opened
        self._h2 = h2.connection.H2Connection(config=config)
        self._write, self.drain = write, drain
        self._opened = opened
        self._frames = Frames(skip=0 if client else PREFACE, header=windows.header)
        self.ended = False  # by us
        self._resets = 0
        self._settled = False  # the other end said what it allows
        self._start(client, windows)

    def _start(self, client: bool, windows: Windows) -> None:
        values = {
            SettingCodes.MAX_CONCURRENT_STREAMS: windows.streams,
            SettingCodes.INITIAL_WINDOW_SIZE: windows.stream,
            SettingCodes.MAX_FRAME_SIZE: _FRAME,
            SettingCodes.MAX_HEADER_LIST_SIZE: windows.header,
        } | ({SettingCodes.ENABLE_PUSH: 0} if client else {})
        self._h2.local_settings = Settings(client=client, initial_values=values)
        self._h2.max_inbound_frame_size = _FRAME
        self._h2.decoder.max_header_list_size = windows.header
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(windows.connection - 65535)
        self.flush()

    def receive(self, data: bytes) -> dict[int, int]:
        """Bytes from the socket; how many of them belong to which stream, 0 being the connection itself.

        Raises:
            ConnectionFailed: they are no HTTP/2; nothing more can be done with the connection.
        """
        counts = self._frames.feed(data)
        try:
            if self._frames.overlong:
                self.close(h2.errors.ErrorCodes.FRAME_SIZE_ERROR)
                raise h2.exceptions.FrameTooLargeError
            events = self._h2.receive_data(data)
            for event in events:
                self._handle(event)
            self.flush()
        except h2.exceptions.ProtocolError as error:
            self.lose("the other end broke the rules of HTTP/2")
            self.flush()  # says why
            raise ConnectionFailed(
                f"what came is no valid HTTP/2 ({type(error).__name__}). Fix: check that the other end speaks it."
            ) from error
        return counts

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RemoteSettingsChanged | h2.events.WindowUpdated):
            self._settled = self._settled or isinstance(event, h2.events.RemoteSettingsChanged)
            for stream in self.streams.values():
                stream.wake()
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.closing = "the other end is closing the connection"
            for number, stream in list(self.streams.items()):
                if number > (event.last_stream_id or 0) or event.error_code:
                    stream.lose(self.closing)
        elif isinstance(event, h2.events.RequestReceived) and self._opened:
            stream = self.streams[event.stream_id] = Stream(self, event.stream_id, event.headers)
            self._opened(stream)
        else:
            self._handle_stream(event)

    def _handle_stream(self, event: h2.events.Event) -> None:
        stream = self.streams.get(event.stream_id) if isinstance(event, _OF_A_STREAM) else None
        if isinstance(event, h2.events.DataReceived):
            if stream is None or not event.data:
                self.used(event.stream_id, event.flow_controlled_length)
            else:
                stream.came(event.data, event.flow_controlled_length)
        elif isinstance(event, h2.events.StreamReset):
            self._resets += 1
            if self._opened and self._resets > _RESETS:
                self.close(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
            if stream:
                stream.lose("the other end broke off")
        elif stream and isinstance(event, h2.events.ResponseReceived):
            stream.begin(event.headers)
        elif stream and isinstance(event, h2.events.StreamEnded):
            stream.complete()

    def open(self, fields: Fields) -> Stream:
        """Begin a stream with these fields.

        Raises:
            ConnectionFailed: the connection takes no more.
        """
        if self.closing:
            raise ConnectionFailed(f"{self.closing}. Fix: call again.")
        try:
            number = self._h2.get_next_available_stream_id()
            stream = self.streams[number] = Stream(self, number)
            self._h2.send_headers(number, fields)
        except h2.exceptions.ProtocolError as error:
            raise ConnectionFailed(f"no stream can be opened ({type(error).__name__}). Fix: call again.") from error
        return stream

    @property
    def room(self) -> int:
        """How many more streams the other end allows."""
        allowed = self._h2.remote_settings.max_concurrent_streams if self._settled else _CAREFUL
        return 0 if self.closing else int(allowed) - len(self.streams)

    def send(self, number: int, data: memoryview) -> int:
        """Send as much as there is credit for; how much that was."""
        size = min(self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size, len(data))
        if size > 0:
            self._h2.send_data(number, data[:size])
            self.flush()
        return max(size, 0)

    def send_fields(self, number: int, fields: Fields) -> None:
        """Open our half of a stream."""
        self._h2.send_headers(number, fields)
        self.flush()

    def send_end(self, number: int) -> None:
        """Complete our half of a stream."""
        self._h2.end_stream(number)
        self.flush()

    def used(self, number: int, size: int) -> None:
        """Give the other end credit for bytes that were used."""
        if size and not self.closing:
            self._h2.acknowledge_received_data(size, number)
            self.flush()

    def drop(self, stream: Stream, code: h2.errors.ErrorCodes | None) -> None:
        """Forget a stream; tell the other end where `code` is given."""
        if self.streams.pop(stream.number, None) is None:
            return
        self.used(stream.number, stream.unused)
        if code is not None:
            try:
                self._h2.reset_stream(stream.number, code)
            except h2.exceptions.ProtocolError:
                return  # it was closed meanwhile
        self.flush()

    def close(self, code: h2.errors.ErrorCodes = h2.errors.ErrorCodes.NO_ERROR) -> None:
        """Say good-bye; streams that are open are lost."""
        self.ended = True
        with suppress(h2.exceptions.ProtocolError):
            self._h2.close_connection(code)
        self.flush()
        self.lose("the connection was closed")

    def lose(self, reason: str) -> None:
        """The socket is gone."""
        self.closing = self.closing or reason
        for stream in list(self.streams.values()):
            stream.lose(reason)

    def flush(self) -> None:
        """Put on the socket what waits to be sent."""
        data = self._h2.data_to_send()
        if data:
            self._write(data)


_OF_A_STREAM = (
    h2.events.DataReceived,
    h2.events.StreamReset,
    h2.events.ResponseReceived,
    h2.events.StreamEnded,
)
