"""An HTTP server inside the running event loop: uvicorn's, or hypercorn's where HTTP/2 is wanted too; with limits."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, cast
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
from avp.transports.http_both import BothVersions
from avp.transports.http_ends import keep_alive, unreadable
from avp.transports.http_server import app

if TYPE_CHECKING:
    from avp.transports.http import HttpTransport

LOG = logging.getLogger("avp")
_READ = 1 << 20  # bytes that are read at once
_KEPT = 75  # seconds that a connection may wait for the next request
_FULL = b'{"error": {"type": "Busy", "message": "too many connections. Fix: try again later.", "retry_after": 1.0}}'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
)
_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class _Http1Protocol(HttpToolsProtocol, asyncio.BufferedProtocol):
    """uvicorn's, with a deadline and a limit for the head of a request, and for what follows an early answer.

    It reads into memory that all connections share, and more at once than asyncio would.
    """

    def __init__(self, config: Config, state: ServerState, *, rules: HttpTransport, memory: memoryview) -> None:
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
        count = len(self.connections)
        super().connection_made(transport)
        if count >= 2 * self._rules.connections:
            transport.abort()
        elif count >= self._rules.connections:
            self._refused = True
            transport.write(REFUSAL)
            self._timer = self.loop.call_later(1.0, transport.close)  # what comes until then does not reset it
        else:
            keep_alive(transport.get_extra_info("socket"))
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


class _Connections(Protocol):
    """All connections of a listener."""

    def protocol(self) -> asyncio.Protocol:
        """The server's side of a new one."""
        ...

    async def close(self) -> None:
        """Let calls under way end, then end them."""
        ...


class _Http1Connections:
    """Those that speak HTTP/1.1."""

    def __init__(self, web: ASGIApp, *, rules: HttpTransport) -> None:
        self._rules = rules
        self._state = ServerState()
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

    def protocol(self) -> asyncio.Protocol:
        """See `_Connections`."""
        return _Http1Protocol(self._config, self._state, rules=self._rules, memory=self._memory)

    async def close(self) -> None:
        """See `_Connections`."""
        connections = cast("set[_Http1Protocol]", self._state.connections)
        for connection in list(connections):
            connection.shutdown()
        await _until_empty(connections, self._rules.grace)
        for connection in list(connections):
            connection.transport.abort()
        await _until_empty(self._state.tasks, 1.0)
        for task in list(self._state.tasks):
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=1.0)


async def _until_empty(things: Collection[object], seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while things:
                await asyncio.sleep(0.01)


class HttpListener:
    """An endpoint that is served by HTTP."""

    def __init__(self, server: asyncio.Server, connections: _Connections, *, url: str) -> None:
        self._server, self._connections, self._url = server, connections, url

    @property
    def url(self) -> str:
        """Where, with the port that was chosen for 0."""
        return self._url

    async def close(self) -> None:
        """Take no more calls, let those under way end, then end them."""
        self._server.close()
        await self._connections.close()


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
    connections: _Connections = (
        BothVersions(web, rules=rules, refusal=REFUSAL) if security.http2 else _Http1Connections(web, rules=rules)
    )
    sock = await _bind(host, port, url)
    server = await asyncio.get_running_loop().create_server(
        connections.protocol,
        sock=sock,
        ssl=tls,
        ssl_handshake_timeout=rules.head if tls else None,
        ssl_shutdown_timeout=1.0 if tls else None,
    )
    found = authority(host, sock.getsockname()[1])
    return HttpListener(server, connections, url=f"{rules.scheme}://{found}{path}")


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
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets have it too; asyncio does not set it
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
