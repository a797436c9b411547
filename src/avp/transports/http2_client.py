"""The client's side of HTTP/2: calls side by side on one connection, each with its own count of bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from avp.errors import AVPError, Busy, ConnectionFailed
from avp.protocols import Meter
from avp.transports.http1 import Head
from avp.transports.http2 import PREFACE, Frames, Http2, Stream, Windows
from avp.transports.http_wire import Wire

_WINDOWS = Windows(stream=1 << 21, connection=1 << 27, streams=64, header=1 << 16)


class Http2Connection:
    """A connection that many calls use."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._meters: dict[int, Meter] = {}
        self._opener = wire.meter or Meter()  # pays for what belongs to no call
        wire.meter = None
        self._frames = Frames(skip=PREFACE)
        self.engine = Http2(client=True, write=self._write, drain=wire.drain, windows=_WINDOWS)
        self._reading = asyncio.create_task(self._read())
        self.failure: AVPError | None = None

    @property
    def usable(self) -> bool:
        """Whether another call may begin on it."""
        return not self._wire.closed and self.engine.room > 0

    def open(self, fields: Sequence[tuple[bytes, bytes]], *, meter: Meter) -> Stream:
        """Begin a call; raises `ConnectionFailed`."""
        self._opener = meter
        stream = self.engine.open(fields)
        self._meters[stream.number] = meter
        self.engine.flush()
        return stream

    def forget(self, stream: Stream) -> None:
        """The call ended; what else comes on its stream counts for another."""
        stream.drop()
        self._meters.pop(stream.number, None)

    async def close(self) -> None:
        """End the connection and every call on it."""
        self.engine.close()
        self._wire.close()
        self._reading.cancel()
        await asyncio.wait({self._reading})

    def _write(self, data: bytes) -> None:
        for number, size in self._frames.feed(data).items():
            self._meters.get(number, self._opener).sent += size
        try:
            self._wire.send(data)
        except AVPError as error:
            self.failure = error

    async def _read(self) -> None:
        first = True
        try:
            while data := await self._wire.read():
                if first and data.startswith(b"HTTP/1."):
                    raise _no_http2(data)
                first = False
                for number, size in self.engine.receive(data).items():
                    self._meters.get(number, self._opener).received += size
        except AVPError as error:
            self.failure = error
        self.engine.lose(self._wire.parting)
        self._wire.close()


class Http2Exchange:
    """One call; the connection is shared."""

    def __init__(self, connection: Http2Connection, stream: Stream) -> None:
        self._connection, self._stream = connection, stream
        self._sending: asyncio.Task[None] | None = None
        self._fault: BaseException | None = None

    def start(self, body: AsyncGenerator[bytes | memoryview, None]) -> None:
        """Begin to send the body."""
        self._sending = asyncio.create_task(self._send(body))

    async def head(self) -> Head:
        """Wait for the answer to begin; raises `ConnectionFailed` where it does not."""
        fields = await self._stream.head()
        self._check()
        if fields is None:
            raise ConnectionFailed(
                f"{self._stream.lost or 'the server gave no answer'}. Fix: look at its log; call again."
            )
        named = {bytes(name).decode("latin-1"): bytes(value).decode("latin-1") for name, value in fields}
        status = named.pop(":status", "")
        return Head(int(status) if status.isdecimal() else 0, named)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body of the answer.

        Raises:
            ConnectionFailed: it was cut off.
        """
        while True:
            try:
                data = await self._stream.read()
            except ConnectionFailed:
                self._check()
                raise
            if data is None:
                return
            yield data

    async def close(self) -> bool:
        """End the call at both ends; the connection lives on."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait({self._sending})
        self._connection.forget(self._stream)
        return False

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self._connection.failure is not None:
            raise self._connection.failure

    async def _send(self, body: AsyncGenerator[bytes | memoryview, None]) -> None:
        try:
            async with aclosing(body) as chunks:
                async for chunk in chunks:
                    await self._stream.write(chunk)
            self._stream.end()
        except ConnectionFailed:
            pass  # the reader finds out, and there may be an answer to read that says why
        except Exception as error:  # noqa: BLE001 - the caller's own items failed; the caller gets it
            self._fault = error
            self._stream.drop()


def _no_http2(data: bytes) -> AVPError:
    if data[9:12] == b"503":
        return Busy("the server has too many connections. Fix: try again later.")
    return ConnectionFailed("the server speaks HTTP/1.1 only. Fix: connect without http2=True.")
