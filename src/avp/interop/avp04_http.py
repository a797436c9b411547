"""The HTTP binding of AVP 0.4 as Starlette routes: `/avp/v2/handshake`, `/avp/v2/transmit`, `/avp/v2/text`.

`GET /health` is the one that the HTTP transport has. Errors are answered as those of our own verbs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from avp.errors import (
    AVPError,
    ConnectionFailed,
    ContextTooLong,
    IdentityMismatch,
    TimedOut,
    UnsupportedCache,
    UsageError,
)
from avp.interop.avp04 import CONTENT_TYPE
from avp.interop.avp04_endpoint import SPEC, Endpoint04
from avp.protocols import Event
from avp.security import Caller, Security
from avp.transports.answers import fault
from avp.transports.http_server import admit, send_error

Work: TypeAlias = Callable[[AsyncIterable[bytes], Caller], Awaitable[Event]]
_STATUS: Sequence[tuple[type[AVPError], int]] = (
    (IdentityMismatch, 409),
    (UnsupportedCache, 409),
    (ContextTooLong, 413),
    (TimedOut, 408),
)


def routes(endpoint: Endpoint04, *, security: Security, idle: float) -> list[BaseRoute]:
    """The routes; idle: seconds without a byte of a body that is waited for."""
    calls: Sequence[tuple[str, str, Work]] = (
        ("handshake", "application/json", endpoint.handshake),
        ("transmit", CONTENT_TYPE, endpoint.transmit),
        ("text", "application/json", endpoint.text),
    )
    return [
        Route(f"/avp/v2/{name}", Call(endpoint, security, idle, name, kind, work), methods=["POST"])
        for name, kind, work in calls
    ]


@dataclass(frozen=True, slots=True)
class Call:
    """One route: a body of one content type, answered by JSON."""

    endpoint: Endpoint04
    security: Security
    idle: float
    name: str
    kind: str
    work: Work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        fields = Headers(scope=scope)
        try:
            caller = admit(self.endpoint, self.security, scope)
            self._check_version(fields)
            if fields.get("content-type", "").partition(";")[0].strip().lower() != self.kind:
                error = UsageError(f"/avp/v2/{self.name} takes {self.kind}. Fix: send it with that Content-Type.")
                await send_error(send, error, status=415)
                return
            answer = await self._answer(receive, caller)
        except AVPError as error:
            known = (status for kind, status in _STATUS if isinstance(error, kind))
            await send_error(send, error, status=next(known, None))
            return
        await JSONResponse(answer, headers={"cache-control": "no-store"})(scope, receive, send)

    def _check_version(self, fields: Headers) -> None:
        version = fields.get("avp-version", "")
        if version != SPEC:
            raise UsageError(
                f"the header AVP-Version is {version[:20] or '(none)'!r}, and /avp/v2 speaks {SPEC}. "
                f"Fix: send AVP-Version: {SPEC}, or use /avp/v1."
            )

    async def _answer(self, receive: Receive, caller: Caller) -> Event:
        try:
            async with aclosing(_chunks(receive, idle=self.idle)) as body:
                return await self.work(body, caller)
        except AVPError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the server lives on
            raise fault(self.name, error) from None


async def _chunks(receive: Receive, *, idle: float) -> AsyncGenerator[bytes]:
    """The body of a request as it comes.

    Raises:
        TimedOut: nothing came for too long. ConnectionFailed: the client left.
    """
    more = True
    while more:
        try:
            async with asyncio.timeout(idle):
                message = await receive()
        except TimeoutError as error:
            raise TimedOut(
                f"the request's body brought nothing for {idle:g} s. Fix: send it without such pauses."
            ) from error
        if message["type"] == "http.disconnect":
            raise ConnectionFailed("the client left before its request was complete. Fix: send it again.")
        more = message.get("more_body", False)
        yield message.get("body", b"")
