"""`mem:name`: an endpoint in the same process. Blobs and contexts pass as objects, events as they would travel.

Caller and endpoint may run in different event loops, in different threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager
from typing import TypeAlias

from avp.blob import Blob
from avp.context import Context
from avp.errors import AVPError, ConnectionFailed, LimitExceeded, UsageError
from avp.manifest import Limits
from avp.protocols import Channel, Endpoint, Item, Listener, Meter
from avp.security import Security
from avp.transports.answers import answers, read_answer
from avp.wire import Decoder, encode_item, error_from_json, error_to_json

_WINDOW = 8  # items that wait to be read
_Passed: TypeAlias = bytes | Blob | Context  # an event as its frame, anything else as it is


class _Pipe:
    """Items from one event loop to another; whoever puts waits while `_WINDOW` of them have not been read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: deque[_Passed] = deque()
        self._ended = False
        self._error: AVPError | None = None
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    async def put(self, item: Item) -> None:
        passed = item if isinstance(item, Blob | Context) else b"".join(map(bytes, encode_item(item)))
        await self._until(lambda: len(self._items) < _WINDOW)
        with self._lock:
            self._items.append(passed)
            self._wake()

    def end(self, error: AVPError | None = None) -> None:
        """No more items come; the first call counts."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self._error = None if error is None else error_from_json(error_to_json(error))
            self._wake()

    async def read(self, limits: Limits) -> AsyncIterator[Item]:
        """The items, then the error if there is one."""
        while True:
            await self._until(lambda: bool(self._items) or self._ended)
            with self._lock:
                passed = self._items.popleft() if self._items else None
                self._wake()
            if passed is None:
                break
            yield _check(passed, limits)
        if self._error is not None:
            raise self._error

    async def _until(self, ready: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                if ready():
                    return
                changed = loop.create_future()
                self._waiting.append((loop, changed))
            await changed

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for loop, changed in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, changed)


def _settle(changed: asyncio.Future[None]) -> None:
    if not changed.done():
        changed.set_result(None)


def _check(passed: _Passed, limits: Limits) -> Item:
    if isinstance(passed, bytes):
        return next(Decoder(limits).feed(passed))
    if isinstance(passed, Blob) and passed.nbytes > limits.bytes:
        raise LimitExceeded(
            f"a bundle of {passed.nbytes} bytes comes; at most {limits.bytes} are allowed. "
            "Fix: raise Limits.bytes, or send smaller segments."
        )
    return passed


class MemListener:
    """An endpoint under a name."""

    def __init__(self, transport: MemTransport, name: str, endpoint: Endpoint) -> None:
        self._transport, self._name, self._endpoint = transport, name, endpoint
        self._loop = asyncio.get_running_loop()
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where."""
        return f"mem:{self._name}"

    async def close(self) -> None:
        """Forget the name; end the calls under way, after a few seconds by force."""
        self._transport.forget(self._name, self)
        if self._calls:
            await asyncio.wait(self._calls, timeout=self._transport.grace)
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def start(self, verb: str, token: str | None, request: _Pipe, answer: _Pipe) -> Future[None]:
        """Answer a call, in the loop in which the endpoint is served.

        Raises:
            ConnectionFailed: that loop has ended.
        """
        if self._loop.is_closed():
            raise ConnectionFailed(f"the server of {self.url} has ended. Fix: start it again.")
        return asyncio.run_coroutine_threadsafe(self._serve(verb, token, request, answer), self._loop)

    async def _serve(self, verb: str, token: str | None, request: _Pipe, answer: _Pipe) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        error: AVPError | None = ConnectionFailed("the server closed during the call. Fix: call again.")
        try:
            caller = self._endpoint.admit(token, address="in-process")
            items = request.read(self._endpoint.limits)
            async with aclosing(answers(self._endpoint, verb, items, caller=caller)) as found:
                async for item in found:
                    await answer.put(item)
            error = None
        except AVPError as raised:
            error = raised
        finally:
            answer.end(error)


class MemChannel:
    """The near end of calls to a name."""

    def __init__(self, transport: MemTransport, name: str, security: Security) -> None:
        self._transport, self._name, self._security = transport, name, security
        self._calls: set[Future[None]] = set()

    @asynccontextmanager
    async def call(self, verb: str, items: AsyncIterable[Item], *, meter: Meter) -> AsyncIterator[AsyncIterator[Item]]:
        """See `Channel.call`; nothing travels, hence the meter stays as it is."""
        request, answer = _Pipe(), _Pipe()
        call = self._transport.find(self._name).start(verb, self._security.token, request, answer)
        self._calls.add(call)
        sender = asyncio.create_task(_send(items, request))
        try:
            yield read_answer(answer.read(Limits()), sender=sender)
        finally:
            self._calls.discard(call)
            call.cancel()
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def close(self) -> None:
        """End the calls under way."""
        for call in self._calls:
            call.cancel()


async def _send(items: AsyncIterable[Item], request: _Pipe) -> None:
    error: AVPError | None = ConnectionFailed("the caller stopped in the middle of what it sent. Fix: call again.")
    try:
        async for item in items:
            await request.put(item)
        error = None
    except AVPError as raised:
        error = raised
    finally:
        request.end(error)


class MemTransport:
    """The endpoints of this process, by name.

    grace: seconds that calls under way get when a listener closes.
    """

    def __init__(self, *, grace: float = 3.0) -> None:
        self.grace = grace
        self._listeners: dict[str, MemListener] = {}
        self._lock = threading.Lock()

    def connect(self, url: str, *, security: Security) -> Channel:
        """The near end; the name need not be served yet.

        Raises:
            UsageError: not `mem:name`.
        """
        return MemChannel(self, _name(url), security)

    async def serve(self, endpoint: Endpoint, url: str, *, security: Security) -> Listener:
        """Serve under a name; `endpoint.admit` says who may call.

        Raises:
            UsageError: not `mem:name`, or the name is taken.
        """
        name = _name(url)
        listener = MemListener(self, name, endpoint)
        with self._lock:
            if name in self._listeners:
                raise UsageError(f"{url} is being served already. Fix: choose another name, or close that server.")
            self._listeners[name] = listener
        return listener

    def find(self, name: str) -> MemListener:
        """Who is served under the name.

        Raises:
            ConnectionFailed: nobody.
        """
        with self._lock:
            if name not in self._listeners:
                known = ", ".join(sorted(self._listeners)) or "none"
                raise ConnectionFailed(
                    f"nobody is served as mem:{name} in this process. Fix: serve it first (names served now: {known})."
                )
            return self._listeners[name]

    def forget(self, name: str, listener: MemListener) -> None:
        """Free the name, if it is that listener's."""
        with self._lock:
            if self._listeners.get(name) is listener:
                del self._listeners[name]


def _name(url: str) -> str:
    scheme, _, name = url.partition(":")
    if scheme != "mem" or not name or "/" in name:
        raise UsageError(f"{url!r} is no address in this process. Fix: write mem:name.")
    return name


TRANSPORT = MemTransport()
