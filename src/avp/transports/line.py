"""Line: a connected unix socket that carries items both ways, in any event loop."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterable, Callable
from contextlib import suppress

from avp.blob import Blob
from avp.errors import AVPError, ConnectionFailed
from avp.manifest import Limits
from avp.protocols import Item, Meter
from avp.transports.answers import log
from avp.transports.fds import (
    TAKEN,
    WINDOW,
    Got,
    Inbox,
    Outbox,
    Packet,
    close_all,
    packet,
    peer_is_us,
    receive,
    send,
    taken,
)
from avp.wire import encode_item, error_to_json

_READ = 1 << 18  # bytes that are taken from the socket at once
_END = b"E"


class Line:
    """Items that come, by iterating; items that go, by `send` and `end`.

    Of each direction at most `WINDOW` items are on the way that the reader has not taken, so that the socket is always
    read, whoever is slow.
    """

    def __init__(self, connected: socket.socket, *, limits: Limits, meter: Meter, greeting: bool = False) -> None:
        trusted = peer_is_us(connected)
        self._socket, self._meter = connected, meter
        self._inbox = Inbox(limits=limits, trusted=trusted, greeting=greeting)
        self._outbox = Outbox(trusted)
        self._came: deque[Item] = deque()
        self._untaken = 0  # items of the other end's window that came and were not acknowledged
        self._error: AVPError | None = None  # what the items end with
        self._going: deque[Packet] = deque()
        self._credit = WINDOW
        self._deaf = False  # the other end does not read any more
        self._changed = asyncio.Event()
        self.reader = asyncio.create_task(self._read())
        self._writer = asyncio.create_task(self._write())

    def __aiter__(self) -> Line:
        return self

    async def __anext__(self) -> Item:
        """The next item; raises what the items end with."""
        await self._until(lambda: bool(self._came) or self._inbox.ended or self._error is not None)
        if self._came:
            self._untaken += 1
            if self._untaken == WINDOW // 2:
                self._untaken = 0
                self._push(taken())
            return self._came.popleft()
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    async def send(self, item: Item) -> None:
        """Send an item once the other end has room for it.

        Raises:
            ConnectionFailed: it has gone.
        """
        await self._until(lambda: self._credit > 0 or self._deaf)
        if self._deaf:
            raise ConnectionFailed("the other end has gone. Fix: call again.")
        self._credit -= 1
        if self._outbox.copies(item):
            self._push(await asyncio.to_thread(self._outbox.pack, item))
        else:
            self._push(self._outbox.pack(item))

    async def end(self, error: AVPError | None = None) -> None:
        """Say that no more items go, and why if there is a reason; returns once it is on its way."""
        if error is not None:
            self._push(packet(*encode_item({"error": error_to_json(error)})))
        self._push(packet(_END))
        await self._until(lambda: not self._going or self._deaf)

    async def send_all(self, items: AsyncIterable[Item]) -> None:
        """Send a caller's items; an error among them is what they end with at the other end."""
        error: AVPError | None = ConnectionFailed("the caller stopped in the middle of what it sent. Fix: call again.")
        try:
            async for item in items:
                await self.send(item)
            error = None
        except AVPError as raised:
            error = raised
        finally:
            await self.end(error)

    async def close(self) -> None:
        """Break the connection off; what is on its way is lost."""
        self.reader.cancel()
        self._writer.cancel()
        for fault in await asyncio.gather(self.reader, self._writer, return_exceptions=True):
            if isinstance(fault, Exception):
                log.error("a connection ended with a fault of our own: %s", type(fault).__name__)
        for each in self._going:
            each.close()
        self._inbox.close()
        self._socket.close()

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self._changed.clear()
            await self._changed.wait()

    def _push(self, going: Packet) -> None:
        self._going.append(going)
        self._changed.set()

    async def _write(self) -> None:
        try:
            while True:
                await self._until(lambda: bool(self._going))
                while self._going[0].runs:
                    try:
                        self._meter.sent += send(self._socket, self._going[0])
                    except BlockingIOError:
                        await _writable(self._socket)
                self._going.popleft()
                self._changed.set()
        except OSError:  # why, is for the reader to say: what the other end said before may still be there
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        finally:
            self._deaf = True
            self._changed.set()

    async def _read(self) -> None:
        buffer = memoryview(bytearray(_READ))
        try:
            while True:
                try:
                    count, fds = receive(self._socket, buffer)
                except BlockingIOError:
                    await _readable(self._socket)
                    continue
                self._meter.received += count
                await self._take(buffer[:count], fds)
                if not count:
                    break
                await asyncio.sleep(0)  # others run, however fast bytes come
        except AVPError as error:
            self._fail(error)
        except OSError as error:
            self._fail(_broken(error.strerror))
        finally:
            self._deaf = True
            self._fail(_broken("it was closed"))

    async def _take(self, piece: memoryview, fds: list[int]) -> None:
        """Make items of what came. After an error nothing is looked at any more, yet read: so the end is noticed."""
        if self._error is not None:
            close_all(fds)
            return
        try:
            for got in self._inbox.feed(piece, fds):
                self._receive(got)
                if isinstance(got, Blob):
                    self._changed.set()
                    await asyncio.sleep(0)  # it is worked on while the next one is read
        except AVPError as error:
            self._inbox.close()
            self._fail(error)
        self._changed.set()

    def _receive(self, got: Got) -> None:
        if got is TAKEN:
            self._credit += WINDOW // 2
        else:
            self._came.append(got)
        if self._credit > WINDOW or len(self._came) + self._untaken > WINDOW:
            raise ConnectionFailed("the other end does not keep to the window. Fix: use one version of AVP.")

    def _fail(self, error: AVPError) -> None:
        """The items end with this, unless they have ended already."""
        if self._error is None and not self._inbox.ended:
            self._error = error
        self._changed.set()


def _broken(reason: str | None) -> ConnectionFailed:
    return ConnectionFailed(
        f"the connection ended in the middle of a call: {reason}; what was half received was thrown away. "
        "Fix: call again; segments that arrived whole are not sent twice."
    )


async def _readable(connected: socket.socket) -> None:
    loop, fd = asyncio.get_running_loop(), connected.fileno()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


async def _writable(connected: socket.socket) -> None:
    loop, fd = asyncio.get_running_loop(), connected.fileno()
    ready = asyncio.Event()
    loop.add_writer(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(fd)
