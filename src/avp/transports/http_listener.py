"""An HTTP server inside the running event loop: uvicorn's HTTP/1.1, our HTTP/2, and deadlines for both."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from avp.errors import UsageError
from avp.protocols import Endpoint
from avp.security import Security
from avp.transports.address import authority, host_and_port, refuse_open
from avp.transports.http import unreadable
from avp.transports.http2_server import Connection, Http2Protocol
from avp.transports.http_server import app
from avp.transports.http_wire import keep_alive

if TYPE_CHECKING:
    from avp.transports.http import HttpTransport

LOG = logging.getLogger("avp")
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_READ = 1 << 20  # bytes that are read at once
_KEPT = 75  # seconds that a connection may wait for the next request
_FULL = b'{"error": {"type": "Busy", "message": "too many connections. Fix: try again later.", "retry_after": 1.0}}'
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
)
_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class _Http1Protocol(HttpToolsProtocol, asyncio.BufferedProtocol):
    """uvicorn's, with a deadline and a limit for the head of a request, and for what follows an early answer.

    It reads into memory that all connections share, and more at once than asyncio would.
    """

    def __init__(self, *, config: Config, state: ServerState, rules: HttpTransport, memory: memoryview) -> None:
        super().__init__(config, state, {})
        self._memory = memory
        self.logger = LOG
        self.access_log = False
        self._rules = rules
        self._timer: asyncio.TimerHandle | None = None
        self._refused = False
        self._inside = False  # a body comes
        self._head = 0  # bytes of a head that is not complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._memory

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(self._memory[:nbytes])

    def data_received(self, data: bytes | memoryview) -> None:
        if self._refused:
            return
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._begin()
        self._head += 0 if self._inside else len(data)
        super().data_received(cast(bytes, data))
        if self._timer is not None and not self._inside and self._head > self._rules.header:
            self._refuse(_TOO_LONG)

    def on_headers_complete(self) -> None:
        self._stop()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._rules.header:
            self._refuse(_TOO_LONG)
        if not self._refused:
            self._inside = True
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._refused or self.cycle.response_complete:
            return
        cycle = self.cycle
        held: bytes | bytearray = cycle.body
        if not held:
            cycle.body = cast(bytearray, body)  # the whole piece, as it is mostly: passed on without a copy
        else:
            cycle.body = held if isinstance(held, bytearray) else bytearray(held)
            cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self._refused:
            return
        self._inside = False
        if self.cycle.response_complete:  # it was answered before its end, which came now
            self._stop()
            self.timeout_keep_alive_task = self.loop.call_later(_KEPT, self.timeout_keep_alive_handler)
        super().on_message_complete()

    def _begin(self) -> None:
        self._head = 0
        self._timer = asyncio.get_running_loop().call_later(self._rules.head, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._refuse(b"" if self._inside else _TOO_SLOW)  # a body that goes on was answered already

    def _refuse(self, answer: bytes) -> None:
        self._stop()
        self._refused = True
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()


class _Gate(asyncio.Protocol):
    """A new connection: refused if there are too many, else handed to the HTTP that it speaks."""

    def __init__(self, doors: _Doors) -> None:
        self._doors = doors
        self._seen = b""
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        keep_alive(transport)
        rules, count = self._doors.rules, len(self._doors.connections)
        loop = asyncio.get_running_loop()
        if count >= 2 * rules.connections:
            self.transport.abort()
        elif count >= rules.connections:
            self._doors.connections.add(self)
            self._refused = True
            self.transport.write(_REFUSAL)
            self._timer = loop.call_later(1.0, self.transport.close)  # what comes until then does not reset it
        elif (encrypted := transport.get_extra_info("ssl_object")) is not None:
            self._switch(http2=encrypted.selected_alpn_protocol() == "h2")
        elif not self._doors.http2:
            self._switch(http2=False)
        else:
            self._doors.connections.add(self)
            self._timer = loop.call_later(rules.head, self.transport.close)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._seen += data
        if len(self._seen) >= len(_PREFACE) or not _PREFACE.startswith(self._seen):
            self._switch(http2=self._seen.startswith(_PREFACE))

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()

    def shutdown(self) -> None:
        self.transport.close()

    def _leave(self) -> None:
        self._doors.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def _switch(self, *, http2: bool) -> None:
        self._leave()
        protocol = self._doors.protocol(http2=http2)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        if self._seen:
            protocol.data_received(self._seen)


class _Doors:
    """What the connections of a listener share."""

    def __init__(self, web: ASGIApp, *, rules: HttpTransport, http2: bool) -> None:
        self.rules, self.http2 = rules, http2
        self.state = ServerState()
        self.connections = cast("set[Connection]", self.state.connections)
        self._web = web
        self._memory = memoryview(bytearray(_READ))
        self._config = Config(
            web,
            http=HttpToolsProtocol,
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEPT,
        )
        self._config.load()

    def protocol(self, *, http2: bool) -> asyncio.Protocol:
        """The server's side of a connection that speaks HTTP/2, or HTTP/1.1."""
        if not http2:
            return _Http1Protocol(config=self._config, state=self.state, rules=self.rules, memory=self._memory)
        return Http2Protocol(
            self._web,
            connections=self.connections,
            tasks=self.state.tasks,
            head=self.rules.head,
            idle=_KEPT,
            header=self.rules.header,
        )


class HttpListener:
    """An endpoint that is served by HTTP."""

    def __init__(self, server: asyncio.Server, doors: _Doors, *, url: str) -> None:
        self._server, self._doors, self._url = server, doors, url

    @property
    def url(self) -> str:
        """Where, with the port that was chosen for 0."""
        return self._url

    async def close(self) -> None:
        """Take no more calls, let those under way end, then end them."""
        self._server.close()
        connections, tasks = self._doors.connections, self._doors.state.tasks
        for connection in list(connections):
            connection.shutdown()
        await self._until_empty(connections, self._doors.rules.grace)
        for connection in list(connections):
            connection.transport.abort()
        await self._until_empty(tasks, 1.0)
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    async def _until_empty(self, things: Collection[object], seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while things:
                    await asyncio.sleep(0.01)


async def listen(endpoint: Endpoint, url: str, *, security: Security, rules: HttpTransport) -> HttpListener:
    """Serve the endpoint at the URL, its path included; see `HttpTransport.serve`."""
    refuse_open(url, security=security)
    host, port = host_and_port(url, default={"http": 80, "https": 443}[rules.scheme])
    path = urlsplit(url).path.rstrip("/")
    tls = _server_context(security) if rules.scheme == "https" else None
    if tls is None and (security.cert is not None or security.ca is not None):
        raise UsageError("http shows no certificates and checks none. Fix: listen at an https URL, or leave them out.")
    web: ASGIApp = app(endpoint, security=security, idle=rules.idle)
    if path:
        web = Starlette(routes=[Mount(path, app=web)])
    doors = _Doors(web, rules=rules, http2=security.http2)
    loop = asyncio.get_running_loop()
    sock = await _bind(host, port, url)
    server = await loop.create_server(
        lambda: _Gate(doors),
        sock=sock,
        ssl=tls,
        ssl_handshake_timeout=rules.head if tls else None,
        ssl_shutdown_timeout=1.0 if tls else None,
    )
    found = authority(host, sock.getsockname()[1])
    return HttpListener(server, doors, url=f"{rules.scheme}://{found}{path}")


async def _bind(host: str, port: int, url: str) -> socket.socket:
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = infos[0]
        sock = socket.create_server(cast("tuple[str, int]", address[:2]), family=family, backlog=512)
    except OSError as error:
        raise UsageError(
            f"{url} cannot be listened at: {error.strerror or error}. "
            "Fix: use an address of this machine and a free port; port 0 takes any."
        ) from error
    sock.setblocking(False)
    return sock


def _server_context(security: Security) -> ssl.SSLContext:
    if security.cert is None:
        raise UsageError("a server for https needs a certificate. Fix: give cert and key, PEM files.")
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=security.ca)
        context.load_cert_chain(security.cert, security.key)
    except (OSError, ssl.SSLError) as error:
        raise unreadable(error, security) from error
    if security.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2", "http/1.1"] if security.http2 else ["http/1.1"])
    return context
