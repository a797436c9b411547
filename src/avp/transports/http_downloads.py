"""A whole context as one file over HTTP, in ranges, so that a download that broke off can go on."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from blake3 import blake3
from starlette.types import Receive, Scope, Send

from avp.bundle import header_size
from avp.errors import AVPError
from avp.security import Caller
from avp.transports.http_body import Body
from avp.wire import CHUNK

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@runtime_checkable
class Downloads(Protocol):
    """An endpoint that hands out whole contexts."""

    async def bundle(self, handle: str, *, caller: Caller) -> tuple[bytes | memoryview, ...]:
        """Runs whose concatenation is the bundle, the same bytes each time.

        Raises:
            HandleExpired: no such handle, or not the caller's.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServeBundle:
    """`GET /avp/v1/contexts/{handle}`: the bundle, or a range of it."""

    endpoint: Downloads
    admit: Callable[[Scope], Caller]
    refuse: Callable[[Send, AVPError], Awaitable[None]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        handle = scope["path_params"]["handle"]
        try:
            runs = await self.endpoint.bundle(handle, caller=self.admit(scope))
        except AVPError as error:
            await self.refuse(send, error)
            return
        body = Body(receive, idle=30.0)
        await body.while_connected(_send(scope, send, [memoryview(run).cast("B") for run in runs], handle[:16]))


async def _send(scope: Scope, send: Send, runs: Sequence[memoryview], name: str) -> None:
    size, tag = sum(map(len, runs)), etag(runs)
    fields = {bytes(key): bytes(value).decode("latin-1") for key, value in scope["headers"]}
    asked = fields.get(b"range")
    if asked is not None and fields.get(b"if-range", tag) != tag:
        asked = None  # it was a range of other bytes
    status, start, stop = find_range(asked, size)
    safe = re.sub(r"[^0-9A-Za-z_-]", "", name) or "context"
    headers = {
        "content-type": "application/vnd.avp.bundle",
        "content-length": str(stop - start),
        "accept-ranges": "bytes",
        "etag": tag,
        "content-disposition": f'attachment; filename="{safe}.avp"',
        "cache-control": "private",
    }
    if status == 206:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    elif status == 416:
        headers["content-range"] = f"bytes */{size}"
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    if scope["method"] != "HEAD":
        for piece in _between(runs, start, stop):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # `send` need not wait, not even where the client is gone
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def etag(runs: Sequence[memoryview]) -> str:
    """A strong tag of a bundle: its header holds the digests of all that follows, so the header's digest will do."""
    head, size = b"", sum(map(len, runs))
    for piece in _between(runs, 0, 8):
        head += piece
    stop = min(header_size(head), size) if len(head) == 8 else size
    digest = blake3(str(size).encode() + b"\0")
    for piece in _between(runs, 0, stop):
        digest.update(piece)
    return f'"{digest.hexdigest()[:32]}"'


def find_range(asked: str | None, size: int) -> tuple[int, int, int]:
    """Status, start and stop of what a Range header asks for; one that is not a single range of bytes is ignored."""
    found = _RANGE.fullmatch(asked.strip()) if asked else None
    if found is None or not (found[1] or found[2]):
        return 200, 0, size
    if not found[1]:  # the last so many bytes
        start, stop = max(size - int(found[2]), 0), size
    else:
        start = int(found[1])
        if found[2] and int(found[2]) < start:
            return 200, 0, size
        stop = min(int(found[2]) + 1, size) if found[2] else size
    return (206, start, stop) if start < stop else (416, 0, 0)


def _between(runs: Sequence[memoryview], start: int, stop: int) -> Iterator[memoryview]:
    """The bytes [start, stop) of the runs, in pieces of at most `CHUNK`."""
    offset = 0
    for run in runs:
        first, last = max(start - offset, 0), min(stop - offset, len(run))
        for position in range(first, last, CHUNK):
            yield run[position : min(position + CHUNK, last)]
        offset += len(run)
