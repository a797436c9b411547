"""The HTTP binding as an ASGI application: Starlette routes around an endpoint. docs/spec/protocol.md."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol, runtime_checkable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avp.blob import Blob
from avp.context import Context
from avp.direct import ended
from avp.errors import (
    AccessDenied,
    AVPError,
    BundleError,
    Busy,
    ContextTooLong,
    HandleExpired,
    IdentityMismatch,
    LimitExceeded,
    NoAgreement,
    SegmentMissing,
    TimedOut,
    UsageError,
)
from avp.protocols import Endpoint, Event, Item
from avp.security import Caller, Security
from avp.transports.answers import answers
from avp.transports.http_body import Body
from avp.transports.http_downloads import Downloads, ServeBundle
from avp.transports.http_ends import VERB
from avp.wire import CHUNK, CONTENT_TYPE, encode, error_to_json

LOG = logging.getLogger("avp")
_STATUS: Sequence[tuple[type[AVPError], int]] = (
    (AccessDenied, 401),
    (HandleExpired, 404),
    (SegmentMissing, 404),
    (TimedOut, 408),
    (NoAgreement, 409),
    (IdentityMismatch, 409),
    (LimitExceeded, 413),
    (ContextTooLong, 413),
    (BundleError, 400),
    (UsageError, 400),
    (Busy, 503),
)


@runtime_checkable
class Routed(Protocol):
    """An endpoint that is also asked at paths of its own."""

    def routes(self, *, security: Security, idle: float) -> Sequence[BaseRoute]:
        """The routes; security and idle as those of `app`."""
        ...


def app(endpoint: Endpoint, *, security: Security, extra: Sequence[BaseRoute] = (), idle: float = 30.0) -> Starlette:
    """An ASGI application that answers for the endpoint. It can be mounted in another one.

    extra: routes that come before ours. idle: seconds without a byte of a request's body that is waited for.
    """
    routes: list[BaseRoute] = [
        *extra,
        *(endpoint.routes(security=security, idle=idle) if isinstance(endpoint, Routed) else ()),
        Route("/health", _health, methods=["GET"]),
        Route("/avp/v1/hello", Hello(endpoint, security), methods=["GET"]),
        Route("/avp/v1/{verb:str}", Calls(endpoint, security, idle), methods=["POST"]),
    ]
    if isinstance(endpoint, Downloads):
        bundles = ServeBundle(endpoint, lambda scope: admit(endpoint, security, scope), send_error)
        routes.append(Route("/avp/v1/contexts/{handle:str}", bundles, methods=["GET"]))
    return Starlette(routes=routes, middleware=[Middleware(Log)], exception_handlers={HTTPException: _nothing_here})


def admit(endpoint: Endpoint, security: Security, scope: Scope) -> Caller:
    """Who calls; raises `AccessDenied`."""
    value = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    kind, _, rest = value.partition(" ")
    token = rest.strip() if kind.lower() == "bearer" else None
    security.tenant(token)  # whatever the endpoint thinks of it
    client = scope.get("client")
    return endpoint.admit(token, address=str(client[0]) if client else "unknown")


@dataclass(frozen=True, slots=True)
class Calls:
    """`POST /avp/v1/{verb}`: the stream of a call, answered by a stream or, before its first item, by an error."""

    endpoint: Endpoint
    security: Security
    idle: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        verb = scope["path_params"]["verb"]
        try:
            if not VERB.fullmatch(verb):
                raise UsageError("that is no verb. Fix: use lower case letters, digits and dashes.")
            caller = admit(self.endpoint, self.security, scope)
        except AVPError as error:
            await send_error(send, error)
            return
        body = Body(receive, idle=self.idle)
        await body.while_connected(self._answer(verb, body, caller, send))

    async def _answer(self, verb: str, body: Body, caller: Caller, send: Send) -> None:
        async with (
            ended(body.items(self.endpoint.limits)) as items,
            ended(answers(self.endpoint, verb, items, caller=caller)) as answer,
        ):
            try:
                first = await anext(answer, None)
            except AVPError as error:
                await send_error(send, error, status=body.status_of(error))
                return
            await send(_start(200, CONTENT_TYPE))
            async with ended(encode(_rest(first, answer))) as chunks:
                async for chunk in chunks:
                    for start in range(0, len(chunk), CHUNK):  # the server copies each
                        piece = chunk[start : start + CHUNK]
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                        await asyncio.sleep(0)  # `send` need not wait, not even where the client is gone
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass(frozen=True, slots=True)
class Hello:
    """`GET /avp/v1/hello`: what the endpoint is, as JSON for people."""

    endpoint: Endpoint
    security: Security

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            caller = admit(self.endpoint, self.security, scope)
            async with ended(answers(self.endpoint, "hello", _one({}), caller=caller)) as answer:
                found = [item async for item in answer if not isinstance(item, Blob | Context)]
        except AVPError as error:
            await send_error(send, error)
            return
        await _send_json(send, 200, found[0] if found else {})


async def send_error(send: Send, error: AVPError, *, status: int | None = None) -> None:
    """The whole answer to a request that failed."""
    fields: list[tuple[bytes, bytes]] = []
    if isinstance(error, Busy):
        fields.append((b"retry-after", str(max(1, round(error.retry_after))).encode()))
    if isinstance(error, AccessDenied):
        fields.append((b"www-authenticate", b"Bearer"))
    if status == 408:
        fields.append((b"connection", b"close"))
    found = next((number for kind, number in _STATUS if isinstance(error, kind)), 500)
    await _send_json(send, status or found, {"error": error_to_json(error)}, fields)


async def _send_json(send: Send, status: int, value: Event, fields: Sequence[tuple[bytes, bytes]] = ()) -> None:
    body = json.dumps(dict(value), ensure_ascii=False).encode()
    length = (b"content-length", str(len(body)).encode())
    await send(_start(status, "application/json", (length, (b"cache-control", b"no-store"), *fields)))
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _start(status: int, kind: str, fields: Sequence[tuple[bytes, bytes]] = ()) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode()), *fields]}


async def _rest(first: Item | None, answer: AsyncIterator[Item]) -> AsyncIterator[Item]:
    if first is None:
        return
    yield first
    async for item in answer:
        yield item


async def _one(item: Item) -> AsyncIterator[Item]:
    yield item


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _nothing_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = UsageError(
        f"{error.detail.lower()}. Fix: POST to /avp/v1/{{verb}}, or GET /health or /avp/v1/hello, at the server's URL."
    )
    return JSONResponse({"error": error_to_json(problem)}, error.status_code, error.headers)


class Log:
    """A line in the log for each request: no prompt, no token, of a handle its first characters."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, sent, got = monotonic(), 0, 0, 0

        async def counted_send(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            sent += len(message.get("body", b""))
            await send(message)

        async def counted_receive() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            return message

        try:
            await self._app(scope, counted_receive, counted_send)
        except asyncio.CancelledError:
            return  # the listener is closing
        finally:
            seconds = monotonic() - began
            path = _shown(scope["path"])
            LOG.info("%s %s %d in=%d out=%d %.3fs", scope["method"][:16], path, status, got, sent, seconds)


def _shown(path: str) -> str:
    before, found, handle = path.partition("/contexts/")
    if found:
        path = f"{before}{found}{handle[:6]}..."
    return path[:100].encode("ascii", "backslashreplace").decode() if path.isprintable() else "?"
