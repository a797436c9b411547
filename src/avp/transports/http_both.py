"""Connections that may speak HTTP/2 as well as HTTP/1.1: hypercorn's, with our limits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from inspect import ismethod
from typing import TYPE_CHECKING, cast

from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.typing import ASGIFramework
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avp.transports.http_ends import keep_alive

if TYPE_CHECKING:
    from avp.transports.http import HttpTransport

LOG = logging.getLogger("avp")
_STREAMS = 32  # at once on a connection of HTTP/2
_WINDOW = 1 << 20  # bytes that a client may send ahead on a stream
_FRAME = 1 << 18  # bytes of a frame
_FORGOTTEN = 1.0  # seconds
_CANCELLED = 200  # calls that its client may cancel

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[object, object, None]]


class BothVersions:
    """All connections of a listener."""

    def __init__(self, web: ASGIApp, *, rules: HttpTransport, refusal: bytes) -> None:
        self._web, self._rules, self._refusal = web, rules, refusal
        self._context = WorkerContext(None)
        self._config = Config()
        self._config.accesslog = self._config.errorlog = None
        self._config.include_date_header = self._config.include_server_header = False
        self._config.keep_alive_timeout = 86400  # its clock stops at the first byte; ours does not
        self._config.h11_max_incomplete_size = self._config.h2_max_header_list_size = rules.header
        self._config.h2_max_concurrent_streams = _STREAMS
        self._open: dict[asyncio.Task[None], _Connection] = {}

    def protocol(self) -> asyncio.Protocol:
        """The server's side of a new connection."""
        connection = _Connection(self._web, rules=self._rules)
        return _Socket(asyncio.StreamReader(), partial(self._serve, connection), connection)

    async def close(self) -> None:
        """Let calls under way end, then end them."""
        connections = list(self._open.values())
        for connection in connections:
            connection.closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self._rules.grace):
                for connection in connections:
                    await connection.free.wait()
        await self._context.terminated.set()  # not before: hypercorn then leaves out the end of an answer
        for connection in connections:
            if not connection.free.is_set():
                connection.abort()
        await self._until_ended()
        for task in self._open:
            task.cancel()
        await self._until_ended()

    async def _until_ended(self) -> None:
        if self._open:
            await asyncio.wait(list(self._open), timeout=1.0)

    async def _serve(self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        count, task = len(self._open), asyncio.current_task()
        if task is None or count >= 2 * self._rules.connections:
            writer.transport.abort()
            return
        self._open[task] = connection
        connection.begin(writer.transport)
        try:
            if count >= self._rules.connections:
                await self._refuse(reader, writer)
            else:
                keep_alive(writer.get_extra_info("socket"))
                app, loop = ASGIWrapper(cast(ASGIFramework, connection)), asyncio.get_running_loop()
                await TCPServer(app, loop, self._config, self._context, {}, reader, writer)
        except asyncio.CancelledError:
            return  # the listener is closing
        except Exception as error:  # noqa: BLE001 - hypercorn fails where a client breaks the rules; the server lives on
            LOG.info("a connection was ended: %s", type(error).__name__)
        finally:
            del self._open[task]
            connection.end()
            writer.close()

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._refusal)
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(1.0):
                while await reader.read(1 << 16):  # what comes until then does not reset it
                    pass


class _Socket(asyncio.StreamReaderProtocol):
    """A connection that says when its client left."""

    def __init__(self, reader: asyncio.StreamReader, serve: Serve, connection: _Connection) -> None:
        super().__init__(reader, serve)
        self._connection = connection

    def eof_received(self) -> bool | None:
        self._connection.lose()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.lose()
        super().connection_lost(exc)


class _Connection:
    """The application, as one connection calls it; and what hypercorn does not see to.

    An answer waits for the client's credit, and ends only after the request has ended, for hypercorn does not foresee a
    body that goes on; but it waits for that no longer than for a head. A head that is too long is refused, and every
    call once the listener closes. A connection is ended whose calls were cancelled by its client, if there were many or
    nothing follows.
    """

    def __init__(self, app: ASGIApp, *, rules: HttpTransport) -> None:
        self._app, self._rules = app, rules
        self.closing = False
        self.free = asyncio.Event()  # no call is under way
        self.free.set()
        self._calls: set[asyncio.Task[object]] = set()
        self._cancelled = 0
        self._lost = False
        self._transport: asyncio.WriteTransport
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, transport: asyncio.WriteTransport) -> None:
        """It is made."""
        self._transport = transport
        self._wait(self._rules.head, self.abort)

    def abort(self) -> None:
        """End it at once."""
        self._transport.abort()

    def lose(self) -> None:
        """The client left. hypercorn tells the calls; it forgets those that wait for credit."""
        self._lost = True
        self._wait(_FORGOTTEN, self._cancel)

    def end(self) -> None:
        """It has ended."""
        if self._timer is not None:
            self._timer.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on."""
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        self.free.clear()
        if not self._lost:
            self.end()
        try:
            await self._pass(scope, receive, send)
        finally:
            self._calls.discard(task)
            if not self._calls:
                self.free.set()
                if not self._lost:
                    self._wait(self._rules.head, self.abort)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self.end()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def _cancel(self) -> None:
        for task in self._calls:
            task.cancel()

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        call = _Call(receive, send)
        status = self._refusal(scope)
        if status:
            await send({"type": "http.response.start", "status": status, "headers": []})
        else:
            await self._app(scope, call.receive, call.send)
        self._cancelled += call.cancelled
        if self._cancelled > _CANCELLED:
            self.abort()
        await call.finish(self._rules.head)

    def _refusal(self, scope: Scope) -> int:
        size = len(scope["raw_path"]) + sum(len(name) + len(value) for name, value in scope["headers"])
        return 503 if self.closing else 431 if size > self._rules.header else 0


class _Call:
    """A call, as the application sees it."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._more = True  # of the request
        self.cancelled = False
        self._stream = _Stream.of(send)
        if self._stream is not None:
            self._stream.open()

    async def receive(self) -> Message:
        """What the client sends."""
        message = await self._receive()
        self._more = message.get("more_body", False)
        self.cancelled = message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        """Send all of it, but not yet the answer's end."""
        if message["type"] == "http.response.start":
            await self._send(message)
        elif message.get("body"):
            await self._send({**message, "more_body": True})
            if self._stream is not None:
                await self._stream.drain()

    async def finish(self, seconds: float) -> None:
        """End the answer when the request has ended, or in so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._more:
                    await self.receive()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass(frozen=True, slots=True)
class _Stream:
    """hypercorn's side of a stream of HTTP/2."""

    protocol: H2Protocol
    number: int

    @classmethod
    def of(cls, send: Send) -> _Stream | None:
        """The stream whose `send` that is; None over HTTP/1.1."""
        stream = send.__self__ if ismethod(send) else None
        if not isinstance(stream, HTTPStream) or not ismethod(stream.send):
            return None
        protocol = stream.send.__self__
        return cls(protocol, stream.stream_id) if isinstance(protocol, H2Protocol) else None

    def open(self) -> None:
        """Let the client send more than 64 KiB ahead, and more in a frame; what nobody reads stays within it."""
        with suppress(ProtocolError):  # it is closed already
            if self.number == 1:
                self.protocol.connection.update_settings({SettingCodes.MAX_FRAME_SIZE: _FRAME})
            for number in (self.number, None):
                more = _WINDOW - self.protocol.connection.remote_flow_control_window(self.number)
                if more > 0:
                    self.protocol.connection.increment_flow_control_window(more, number)

    async def drain(self) -> None:
        """Wait until all was sent: hypercorn's own waiting ends where the client gives no credit."""
        buffer = self.protocol.stream_buffers.get(self.number)
        if buffer is not None:
            await buffer.drain()
