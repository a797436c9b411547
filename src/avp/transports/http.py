"""HTTP and HTTPS: `POST {url}/avp/v1/{verb}`, a stream of `avp.wire` both ways. docs/spec/protocol.md."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from urllib.parse import quote, urlsplit

from hpack import NeverIndexedHeaderTuple

from avp.direct import ended
from avp.errors import AVPError, ConnectionFailed, UsageError
from avp.manifest import Limits
from avp.protocols import Endpoint, Item, Listener, Meter
from avp.security import Security
from avp.transports.address import authority, host_and_port
from avp.transports.http1 import Head, Http1Exchange
from avp.transports.http2_client import Http2Connection, Http2Exchange
from avp.transports.http_wire import Wire, connect, spare_mmap
from avp.wire import CONTENT_TYPE, decode, encode, error_from_json

BASE = "/avp/v1"
_PORTS = {"http": 80, "https": 443}
VERB = re.compile(r"[a-z][a-z0-9-]{0,63}")
_IDLE = 8  # connections that wait for the next call
_STALE = 30.0  # seconds after which one that waited is not used again
_ERROR = 1 << 20  # bytes of an answer that is an error


class HttpChannel:
    """The near end of calls over HTTP; connections are kept for the next call."""

    def __init__(self, scheme: str, url: str, *, security: Security) -> None:
        self._host, self._port = host_and_port(url, default=_PORTS[scheme])
        self._scheme = scheme
        self._authority = authority(self._host, self._port)
        self._path = quote(urlsplit(url).path.rstrip("/"), safe="/%:@!$&'()*+,;=-._~") + BASE
        self._tls = client_context(security) if scheme == "https" else None
        self._fields = _fields(security)
        self._http2 = security.http2
        self._idle: list[tuple[Wire, float]] = []
        self._shared: list[Http2Connection] = []
        self._connecting = asyncio.Lock()

    @asynccontextmanager
    async def call(self, verb: str, items: AsyncIterable[Item], *, meter: Meter) -> AsyncIterator[AsyncIterator[Item]]:
        """Send the verb and the items; see `avp.protocols.Channel`."""
        if not VERB.fullmatch(verb):
            raise UsageError(f"{verb!r} is no verb. Fix: use lower case letters, digits and dashes.")
        body = _body(items)
        if self._http2 and (connection := await self._share(meter)):
            exchange: Http1Exchange | Http2Exchange = self._begin2(connection, verb, meter)
            wire = None
        else:
            exchange, wire = await self._begin1(verb, meter)
        exchange.start(body)
        try:
            async with aclosing(self._answer(exchange)) as answer:
                yield answer
        finally:
            if await exchange.close() and wire is not None:
                self._keep(wire)

    async def close(self) -> None:
        """End all connections."""
        while self._idle:
            self._idle.pop()[0].close()
        while self._shared:
            await self._shared.pop().close()

    async def _begin1(self, verb: str, meter: Meter) -> tuple[Http1Exchange, Wire]:
        fields = [("Host", self._authority), *self._fields]
        target = f"{self._path}/{verb}"
        while wire := await self._kept():
            wire.meter = meter
            exchange = Http1Exchange(wire, target=target, fields=fields)
            try:
                await exchange.open()
                await asyncio.sleep(0)
                if not wire.closed:
                    return exchange, wire
            except ConnectionFailed:
                pass
            wire.abort()  # nothing of the call's body was asked for yet, so another connection can carry it
        wire = await connect(self._host, self._port, meter=meter, tls=self._tls)
        exchange = Http1Exchange(wire, target=target, fields=fields)
        try:
            await exchange.open()
        except BaseException:
            wire.abort()
            raise
        return exchange, wire

    def _begin2(self, connection: Http2Connection, verb: str, meter: Meter) -> Http2Exchange:
        fields = [
            (":method", "POST"),
            (":scheme", self._scheme),
            (":authority", self._authority),
            (":path", f"{self._path}/{verb}"),
            *((name.lower(), value) for name, value in self._fields),
        ]
        raw = [(name.encode(), value.encode("latin-1")) for name, value in fields]
        raw = [NeverIndexedHeaderTuple(*each) if each[0] == b"authorization" else each for each in raw]
        return Http2Exchange(connection, connection.open(raw, meter=meter))

    async def _share(self, meter: Meter) -> Http2Connection | None:
        """The connection for calls side by side; None where the server does not speak HTTP/2 over TLS."""
        async with self._connecting:
            for connection in list(self._shared):
                if connection.usable:
                    return connection
                if not connection.engine.streams:
                    self._shared.remove(connection)
                    await connection.close()
            wire = await connect(self._host, self._port, meter=meter, tls=self._tls)
            if self._tls is not None and not wire.http2:
                self._http2 = False
                self._keep(wire)
                return None
            self._shared.append(Http2Connection(wire))
            return self._shared[-1]

    async def _kept(self) -> Wire | None:
        while self._idle:
            wire, since = self._idle.pop()
            for _ in range(3):  # the loop looks at the socket: did the server close it?
                await asyncio.sleep(0)
            if not wire.closed and monotonic() - since < _STALE:
                return wire
            wire.abort()
        return None

    def _keep(self, wire: Wire) -> None:
        wire.meter = None
        self._idle.append((wire, monotonic()))
        if len(self._idle) > _IDLE:
            self._idle.pop(0)[0].close()

    async def _answer(self, exchange: Http1Exchange | Http2Exchange) -> AsyncGenerator[Item, None]:
        head = await exchange.head()
        pieces = exchange.pieces()
        if head.status != 200 or not head.fields.get("content-type", "").startswith(CONTENT_TYPE):
            raise await self._failure(head, pieces)
        async with ended(decode(pieces, limits=Limits())) as items:
            async for item in items:
                yield item

    async def _failure(self, head: Head, pieces: AsyncIterator[bytes]) -> AVPError:
        """What an answer says that is no stream: the endpoint's error, or a stranger's page."""
        text = bytearray()
        async for piece in pieces:
            text += piece
            if len(text) > _ERROR:
                break
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and "error" in value and head.status >= 400:
            return error_from_json(value["error"])
        kind = head.fields.get("content-type", "no content type")[:80]
        where = f", to {head.fields['location'][:200]}" if "location" in head.fields else ""
        return ConnectionFailed(
            f"{self._scheme}://{self._authority}{self._path} answered with status {head.status}{where} and {kind}: "
            f"{bytes(text[:120])!r}. That is no AVP endpoint, or something stands before it. "
            "Fix: check the URL (without /avp/v1) and any proxy."
        )


async def _body(items: AsyncIterable[Item]) -> AsyncGenerator[bytes | memoryview, None]:
    try:
        async with ended(encode(items)) as chunks:
            async for chunk in chunks:
                yield chunk
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


def _fields(security: Security) -> list[tuple[str, str]]:
    fields = [("Content-Type", CONTENT_TYPE), ("Accept", f"{CONTENT_TYPE}, application/json"), ("User-Agent", "avp")]
    if security.token:
        if not re.fullmatch(r"[!-~]+", security.token):
            raise UsageError("the token holds spaces or other than ASCII. Fix: use letters, digits and punctuation.")
        fields.append(("Authorization", f"Bearer {security.token}"))
    return fields


def client_context(security: Security) -> ssl.SSLContext:
    """TLS of a client: whom it trusts, who it is.

    Raises:
        UsageError: a file cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=security.ca)
        if security.cert is not None:
            context.load_cert_chain(security.cert, security.key)
    except (OSError, ssl.SSLError) as error:
        raise unreadable(error, security) from error
    context.set_alpn_protocols(["h2", "http/1.1"] if security.http2 else ["http/1.1"])
    return context


def unreadable(error: OSError, security: Security) -> UsageError:
    """The error of a certificate file that cannot be used."""
    files = ", ".join(str(path) for path in (security.ca, security.cert, security.key) if path)
    return UsageError(
        f"a certificate cannot be used ({error.strerror or error}): {files}. Fix: give PEM files; key belongs to cert."
    )


@dataclass(frozen=True, slots=True)
class HttpTransport:
    """HTTP at a URL of its scheme. What a server allows:

    head: seconds until a request's head is complete. idle: seconds without a byte of a body that is waited for.
    grace: seconds that calls under way get when a listener is closed. connections: at once. header: bytes of a head.
    """

    scheme: str = "http"
    head: float = 10.0
    idle: float = 30.0
    grace: float = 5.0
    connections: int = 512
    header: int = 1 << 15

    def connect(self, url: str, *, security: Security) -> HttpChannel:
        """The near end of calls to the endpoint at `url`, which may have a path; sends nothing yet.

        Raises:
            UsageError: the URL is none of this scheme, or a certificate cannot be read.
        """
        self._check(url)
        spare_mmap()
        return HttpChannel(self.scheme, url, security=security)

    async def serve(self, endpoint: Endpoint, url: str, *, security: Security) -> Listener:
        """Serve the endpoint in the running event loop.

        Raises:
            UsageError: not an address of this machine, beyond loopback without authentication, or a certificate is
                missing or cannot be read.
        """
        from avp.transports.http_listener import listen  # a client needs no server

        self._check(url)
        spare_mmap()
        return await listen(endpoint, url, security=security, rules=self)

    def _check(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != self.scheme or parts.query or parts.fragment or parts.username:
            raise UsageError(
                f"{url!r} is no address of an endpoint. Fix: write it as {self.scheme}://host:port, maybe with a path."
            )


TRANSPORT = HttpTransport()
SECURE = HttpTransport("https")
