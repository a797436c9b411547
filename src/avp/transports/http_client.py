"""The client's side of HTTP: httpx over counted sockets."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import httpcore2
import httpx2

from avp.direct import ended
from avp.errors import AVPError, ConnectionFailed, UsageError
from avp.manifest import Limits
from avp.protocols import Item, Meter
from avp.security import Security
from avp.transports.address import authority, host_and_port
from avp.transports.http_ends import BASE, VERB
from avp.transports.http_net import Net
from avp.wire import CHUNK, CONTENT_TYPE, decode, encode, error_from_json

_PORTS = {"http": 80, "https": 443}
_CONNECT = 10.0  # seconds
_IDLE = 8  # connections that wait for the next call
_STALE = 30.0  # seconds after which one that waited is not used again
_ERROR = 1 << 20  # bytes of an answer that is an error


@dataclass(slots=True)
class _Line:
    """A client with one connection, for one call at a time."""

    client: httpx2.AsyncClient
    net: Net
    whole: bool = False  # the answer was read to its end


class HttpChannel:
    """The near end of calls over HTTP.

    Each call under way has a connection of its own, over HTTP/2 too: its bytes are counted, and the far end sees by its
    closing that the call was left. Afterwards it is kept for the next call.
    """

    def __init__(self, url: str, *, security: Security, tls: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        self._place = authority(*host_and_port(url, default=_PORTS[parts.scheme]))
        path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=-._~")
        self._base = f"{parts.scheme}://{self._place}{path}{BASE}"
        self._fields = _fields(security)
        self._tls, self._http2 = tls, security.http2
        self._idle: list[_Line] = []

    @asynccontextmanager
    async def call(self, verb: str, items: AsyncIterable[Item], *, meter: Meter) -> AsyncIterator[AsyncIterator[Item]]:
        """Send the verb and the items; see `avp.protocols.Channel`. The answer is read when all was sent."""
        if not VERB.fullmatch(verb):
            raise UsageError(f"{verb!r} is no verb. Fix: use lower case letters, digits and dashes.")
        line = await self._take()
        line.whole = False
        line.net.begin(meter)
        request = line.client.build_request("POST", f"{self._base}/{verb}", content=_body(items, line.net))
        sending = asyncio.create_task(line.client.send(request, stream=True))
        try:
            async with aclosing(self._answer(sending, line)) as answer:
                yield answer
        finally:
            sending.cancel()
            await asyncio.wait([sending])
            await self._keep(line)

    async def close(self) -> None:
        """End all connections."""
        while self._idle:
            await self._idle.pop().client.aclose()

    async def _take(self) -> _Line:
        while self._idle:
            line = self._idle.pop()
            if line.net.wire is not None and line.net.wire.quiet:
                return line
            await line.client.aclose()
        net = Net(http2=self._http2)
        return _Line(_client(net, fields=self._fields, tls=self._tls, http2=self._http2), net)

    async def _keep(self, line: _Line) -> None:
        """Keep the connection of a call that came to its end; end that of another."""
        if line.whole and len(self._idle) < _IDLE:
            self._idle.append(line)
        else:
            await line.client.aclose()

    async def _answer(self, sending: asyncio.Task[httpx2.Response], line: _Line) -> AsyncGenerator[Item]:
        try:
            response = await asyncio.shield(sending)
        except httpx2.TransportError as error:
            raise ConnectionFailed(
                f"no answer came from {self._place}, or what came is no HTTP: {_why(error)}.{_parting(line.net)} "
                "Fix: check the URL, look at the server's log, call again."
            ) from error
        async with aclosing(self._pieces(response, line)) as pieces:
            if response.status_code != 200 or not response.headers.get("content-type", "").startswith(CONTENT_TYPE):
                raise await self._failure(response, pieces)
            async with ended(decode(pieces, limits=Limits())) as items:
                async for item in items:
                    yield item

    async def _pieces(self, response: httpx2.Response, line: _Line) -> AsyncGenerator[bytes]:
        """The body of the answer.

        Raises:
            ConnectionFailed: it was cut.
        """
        try:
            async with aclosing(response.aiter_raw()) as pieces:
                async for piece in pieces:
                    yield piece
            line.whole = True
        except httpx2.TransportError as error:
            raise ConnectionFailed(
                f"the connection to {self._place} ended in the middle of an answer: {_why(error)}. What was half "
                "received was thrown away. Fix: call again; segments that arrived whole are not sent twice."
            ) from error

    async def _failure(self, response: httpx2.Response, pieces: AsyncIterator[bytes]) -> AVPError:
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
        if isinstance(value, dict) and "error" in value and response.status_code >= 400:
            return error_from_json(value["error"])
        kind = response.headers.get("content-type", "no content type")[:80]
        where = f", to {response.headers['location'][:200]}" if "location" in response.headers else ""
        return ConnectionFailed(
            f"{self._base} answered with status {response.status_code}{where} and {kind}: {bytes(text[:120])!r}. "
            "That is no AVP endpoint, or something stands before it. "
            "Fix: check the URL (without /avp/v1) and any proxy."
        )


async def _body(items: AsyncIterable[Item], net: Net) -> AsyncGenerator[bytes]:
    """The stream of a call; its rest is left out where the server refused it, and the client then reads why."""
    try:
        async with ended(encode(items)) as chunks:
            async for chunk in chunks:
                for start in range(0, len(chunk), CHUNK):
                    if net.refused:
                        return
                    yield chunk[start : start + CHUNK]  # type: ignore[misc]  # a memoryview will do; h11 copies it once
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


def _why(error: httpx2.TransportError) -> str:
    return str(error).rstrip(".") or type(error).__name__


def _parting(net: Net) -> str:
    if net.wire is None or net.wire.heard or net.wire.get_extra_info("ssl_object") is None:
        return ""
    return " Maybe it wants a client certificate (cert and key)."


def _fields(security: Security) -> dict[str, str]:
    fields = {
        "content-type": CONTENT_TYPE,
        "accept": f"{CONTENT_TYPE}, application/json",
        "accept-encoding": "identity",
        "user-agent": "avp",
    }
    if security.token:
        if not re.fullmatch(r"[!-~]+", security.token):
            raise UsageError("the token holds spaces or other than ASCII. Fix: use letters, digits and punctuation.")
        fields["authorization"] = f"Bearer {security.token}"
    return fields


def _client(net: Net, *, fields: dict[str, str], tls: ssl.SSLContext | None, http2: bool) -> httpx2.AsyncClient:
    """httpx takes no sockets of others; its transport's pool does, so the pool is ours."""
    context = tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    transport = httpx2.AsyncHTTPTransport(verify=context, trust_env=False)
    transport._pool = httpcore2.AsyncConnectionPool(
        ssl_context=context,
        max_connections=1,
        keepalive_expiry=_STALE,
        http1=tls is not None or not http2,  # without TLS, HTTP/2 is spoken by prior knowledge
        http2=http2,
        network_backend=net,
    )
    return httpx2.AsyncClient(
        transport=transport, headers=fields, timeout=httpx2.Timeout(None, connect=_CONNECT), trust_env=False
    )
