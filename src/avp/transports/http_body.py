"""The body of a request: read a little ahead, given to the endpoint as it asks, watched for the client's leaving."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine

from starlette.types import Receive

from avp.direct import ended
from avp.errors import AVPError, ConnectionFailed, TimedOut
from avp.manifest import Limits
from avp.protocols import Item
from avp.wire import decode

_AHEAD = 1 << 16  # bytes that are read before they are asked for, so that the client's leaving is noticed


class Body:
    """What a client sends, and whether it is still there."""

    def __init__(self, receive: Receive, *, idle: float) -> None:
        self._receive, self._idle = receive, idle
        self._ahead: deque[bytes] = deque()
        self._waiting = 0  # bytes in it
        self._end: AVPError | None = None
        self._complete = False  # nothing comes after what is in `_ahead`, or `_end` does
        self._came, self._taken = asyncio.Event(), asyncio.Event()
        self._failure: AVPError | None = None

    def status_of(self, error: AVPError) -> int | None:
        """The status to answer with where the request itself is at fault."""
        if error is not self._failure:
            return None
        return 408 if isinstance(error, TimedOut) else 400 if type(error) is ConnectionFailed else None

    async def items(self, limits: Limits) -> AsyncIterator[Item]:
        """What the body carries.

        Raises:
            TimedOut: nothing came for too long. AVPError: see `avp.wire.Decoder`.
        """
        try:
            async with ended(self._chunks()) as chunks, ended(decode(chunks, limits=limits)) as items:
                async for item in items:
                    yield item
        except AVPError as error:
            self._failure = error
            raise

    async def while_connected(self, work: Coroutine[object, object, None]) -> None:
        """Do the work, and cancel it when the client leaves."""
        task, watch = asyncio.create_task(work), asyncio.create_task(self._watch())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not task.done():
                task.cancel()
            await asyncio.wait({task, watch})
        if not task.cancelled():
            task.result()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            while self._ahead:
                chunk = self._ahead.popleft()
                self._waiting -= len(chunk)
                self._taken.set()
                yield chunk
            if self._end is not None:
                raise self._end
            if self._complete:
                return
            self._came.clear()
            await self._came.wait()

    async def _watch(self) -> None:
        while True:
            while self._waiting >= _AHEAD and not self._complete:
                self._taken.clear()
                await self._taken.wait()
            try:
                async with asyncio.timeout(None if self._complete else self._idle):
                    message = await self._receive()
            except TimeoutError:
                self._end = TimedOut(
                    f"the request's body brought nothing for {self._idle:g} s. Fix: send it without such pauses."
                )
                self._complete = True
            else:
                if message["type"] == "http.disconnect":
                    return
                self._take(message.get("body", b""), more=message.get("more_body", False))
            self._came.set()

    def _take(self, body: bytes, *, more: bool) -> None:
        if body and not self._complete:
            self._ahead.append(body)
            self._waiting += len(body)
        self._complete = self._complete or not more
