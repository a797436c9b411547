"""The server's side of HTTP/2: an ASGI application for each stream."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast
from urllib.parse import unquote

import h2.errors
from starlette.types import ASGIApp, Message, Scope

from avp.errors import ConnectionFailed
from avp.transports.http2 import Http2, Stream, Windows
from avp.transports.http_wire import keep_alive

_UNREAD = 1 << 25  # bytes that a client may have us send without reading them: answers to its pings, say
_DROPPED = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})


class Connection(Protocol):
    """What a listener knows of a connection, whatever it speaks."""

    transport: asyncio.Transport

    def shutdown(self) -> None:
        """Let calls under way end, then close."""
        ...


class Http2Protocol(asyncio.Protocol):
    """One connection of a client."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        connections: set[Connection],
        tasks: set[asyncio.Task[None]],
        head: float,
        idle: float,
        header: int,
    ) -> None:
        self._app, self._connections, self._tasks = app, connections, tasks
        self._head, self._idle, self._header = head, idle, header
        self._timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._leaving = False
        self.transport: asyncio.Transport
        self._engine: Http2

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client."""
        self.transport = cast(asyncio.Transport, transport)
        self._connections.add(self)
        keep_alive(transport)
        self._writable.set()
        self._engine = Http2(
            client=False,
            write=self._write,
            drain=self._writable.wait,
            opened=self._opened,
            windows=Windows(header=self._header),
        )
        self._wait(self._head)

    def data_received(self, data: bytes) -> None:
        """Frames."""
        try:
            self._engine.receive(data)
        except ConnectionFailed:
            self.transport.close()
        if self._engine.ended:
            self.transport.close()
        if self.transport.get_write_buffer_size() > _UNREAD:
            self.transport.abort()

    def eof_received(self) -> None:
        """The client left."""
        self._engine.lose("the client left")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left."""
        self._connections.discard(self)
        self._engine.lose("the client left")
        self._writable.set()
        self._wait(None)

    def pause_writing(self) -> None:
        """The socket is full."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """There is room again."""
        self._writable.set()

    def shutdown(self) -> None:
        """Let streams under way end, then close."""
        self._leaving = True
        if not self._engine.streams:
            self._close()

    def _write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def _wait(self, seconds: float | None) -> None:
        """Close in so many seconds unless a request comes."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._close) if seconds is not None else None

    def _close(self) -> None:
        self._engine.close()
        self.transport.close()

    def _opened(self, stream: Stream) -> None:
        self._wait(None)
        task = asyncio.get_running_loop().create_task(self._run(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, stream: Stream) -> None:
        call = _Call(stream)
        code = h2.errors.ErrorCodes.INTERNAL_ERROR
        try:
            await self._app(self._scope(stream), call.receive, call.send)
            if call.answered:
                code = h2.errors.ErrorCodes.NO_ERROR  # and we need not see the rest of the request
        finally:
            stream.drop(code)
            if self._leaving and not self._engine.streams:
                self._close()
            elif not self._engine.streams and not self.transport.is_closing():
                self._wait(self._idle)

    def _scope(self, stream: Stream) -> Scope:
        named = {bytes(name): bytes(value) for name, value in stream.fields or ()}
        raw, _, query = named.get(b":path", b"/").partition(b"?")
        fields = [(name, value) for name, value in named.items() if not name.startswith(b":")]
        client, server = (self.transport.get_extra_info(name) for name in ("peername", "sockname"))
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "2",
            "method": named.get(b":method", b"").decode("latin-1"),
            "scheme": "https" if self.transport.get_extra_info("sslcontext") else "http",
            "path": unquote(raw.decode("latin-1")),
            "raw_path": raw,
            "query_string": query,
            "root_path": "",
            "headers": [(b"host", named.get(b":authority", b"")), *fields],
            "client": tuple(client[:2]) if isinstance(client, tuple) else None,
            "server": tuple(server[:2]) if isinstance(server, tuple) else None,
            "state": {},
        }


class _Call:
    """A stream, as an ASGI application sees it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._more = True  # of the request
        self.answered = False

    async def receive(self) -> Message:
        if self._more:
            try:
                data = await self._stream.read()
            except ConnectionFailed:
                return {"type": "http.disconnect"}
            self._more = data is not None
            return {"type": "http.request", "body": data or b"", "more_body": self._more}
        await self._stream.until_lost()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            fields = [(name.lower(), value) for name, value in message.get("headers", [])]
            kept = [(name, value) for name, value in fields if name not in _DROPPED]
            self._stream.respond([(b":status", str(message["status"]).encode()), *kept])
            return
        try:
            await self._stream.write(message.get("body", b""))
        except ConnectionFailed:
            return  # as ASGI wants it; `receive` says that the client is gone
        if not message.get("more_body", False):
            self._stream.end()
            self.answered = True
