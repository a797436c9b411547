"""The client's side of HTTP/1.1: one call at a time on a connection, sending and reading at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import httptools

from avp.errors import ConnectionFailed
from avp.transports.http_wire import Wire

_HEAD = 1 << 16  # bytes that the head of an answer may take
_SMALL = 1 << 16  # a chunk up to this is sent together with its frame


@dataclass(slots=True)
class Head:
    """Status and header fields of an answer, names in lower case."""

    status: int
    fields: dict[str, str] = field(default_factory=dict)


class _Parser:
    """What `httptools` calls."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.done = False
        self.reusable = False  # the connection carries another call
        self.pieces: deque[bytes] = deque()
        self._fields: dict[str, str] = {}
        self._http = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._http.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._http.get_status_code()
        if status >= 200:  # others only announce it
            self.head = Head(status, self._fields)
        self._fields = {}

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)

    def on_message_complete(self) -> None:
        self.done = self.head is not None
        self.reusable = self.done and self._http.should_keep_alive()


class Http1Exchange:
    """One call: its request goes out in a task of its own while the answer is read."""

    def __init__(self, wire: Wire, *, target: str, fields: Sequence[tuple[str, str]]) -> None:
        self._wire = wire
        lines = [f"POST {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields)]
        self._request = ("\r\n".join([*lines, "Transfer-Encoding: chunked"]) + "\r\n\r\n").encode("latin-1")
        self._parser = _Parser()
        self._sending: asyncio.Task[None] | None = None
        self._fault: BaseException | None = None  # of the one who makes the body

    async def open(self) -> None:
        """Send the head of the request.

        Raises:
            ConnectionFailed: the connection is gone.
        """
        await self._wire.write(self._request)

    def start(self, body: AsyncGenerator[bytes | memoryview, None]) -> None:
        """Begin to send the body."""
        self._sending = asyncio.create_task(self._send(body))

    async def head(self) -> Head:
        """Wait for the answer to begin.

        Raises:
            ConnectionFailed: it did not, or is no HTTP.
        """
        taken = 0
        while self._parser.head is None:
            data = await self._read()
            taken += len(data)
            if not data:
                raise ConnectionFailed(f"{self._wire.parting}; no answer came. Fix: look at its log; call again.")
            if taken > _HEAD and self._parser.head is None:
                raise ConnectionFailed("the head of the answer is too long. Fix: check that the URL is an endpoint's.")
        return self._parser.head

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body of the answer; it may also end because the connection did."""
        while True:
            while self._parser.pieces:
                yield self._parser.pieces.popleft()
            if self._parser.done or not await self._read():
                return

    async def close(self) -> bool:
        """End the call at both ends; whether the connection can carry another one."""
        task = self._sending
        if task is not None:
            if self._parser.done and not task.done():
                await asyncio.wait({task}, timeout=0.05)  # the end of the body may be on its way
            sent = task.done()
            task.cancel()
            await asyncio.wait({task})
            if sent and self._fault is None and self._parser.reusable and not self._wire.closed:
                return True
        self._wire.abort()
        return False

    async def _read(self) -> bytes:
        data = await self._wire.read()
        if self._fault is not None:
            raise self._fault
        try:
            if data:
                self._parser.feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise ConnectionFailed(
                f"what came is no HTTP/1.1 ({type(error).__name__}). Fix: check that the URL is an endpoint's."
            ) from error
        return data

    async def _send(self, body: AsyncGenerator[bytes | memoryview, None]) -> None:
        try:
            await self._send_chunks(body)
        except ConnectionFailed:
            pass  # the reader finds out, and there may be an answer to read that says why
        except Exception as error:  # noqa: BLE001 - the caller's own items failed; the caller gets it
            self._fault = error
            self._wire.abort()

    async def _send_chunks(self, body: AsyncGenerator[bytes | memoryview, None]) -> None:
        frame = b"%x\r\n"
        before = b""  # what ends the chunk before
        async with aclosing(body) as chunks:
            async for chunk in chunks:
                lead = before + frame % len(chunk)
                if len(chunk) <= _SMALL:
                    await self._wire.write(b"".join((lead, chunk)))
                else:
                    await self._wire.write(lead, chunk)
                before = b"\r\n"
        await self._wire.write(before + b"0\r\n\r\n")
