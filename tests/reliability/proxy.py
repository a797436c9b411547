"""A TCP proxy that hurts what passes, at bytes that the test chooses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Self
from urllib.parse import urlsplit

Hurt = Callable[[bytes], Awaitable[list[bytes]]]  # what passes instead of these bytes
_CHUNK = 4096  # bytes that a fault concerns, at most


class Cut(Exception):
    """Ends the connection that the bytes came on."""


@dataclass
class Fault:
    """Happens once, to the bytes from `at` on of what goes `up` (to the server) or down, over all connections."""

    hurt: Hurt
    at: int
    up: bool = True
    mark: bytes = b""  # where this is found, instead of `at`
    happened: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Proxy:
    """Stands between clients and the server at `url`, which may move."""

    def __init__(self, url: str, *, faults: Sequence[Fault] = ()) -> None:
        self.target = url
        self.faults = list(faults)
        self.passed = {True: 0, False: 0}  # bytes up and down, since the last `arm`
        self._tasks: set[asyncio.Task[None]] = set()
        self._hurting: set[asyncio.Task[list[bytes]]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = urlsplit(self.target)._replace(netloc=f"127.0.0.1:{port}").geturl()
        return self

    async def __aexit__(self, *problem: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        while going := self._tasks | self._hurting:
            await asyncio.wait(going)

    def arm(self, *faults: Fault) -> None:
        """Count from here, towards these faults alone."""
        self.passed = {True: 0, False: 0}
        self.faults = list(faults)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        place = urlsplit(self.target)
        both = [writer]
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(place.hostname, place.port)
            both.append(far_writer)
            self._writers.add(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, far_writer, up=True))
                group.create_task(self._pass(far_reader, writer, up=False))
        except* (OSError, Cut):
            pass
        finally:
            for each in both:
                each.transport.abort()
                with suppress(OSError):
                    await each.wait_closed()
                self._writers.discard(each)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, up: bool) -> None:
        while data := await source.read(1 << 16):
            async for piece in self._hurt(data, up=up):
                sink.write(piece)
                await sink.drain()
        sink.write_eof()

    def _begin(self, fault: Fault, chunk: bytes) -> asyncio.Task[list[bytes]]:
        """Goes on to its end even where the connection ends before."""
        task = asyncio.create_task(fault.hurt(chunk))

        def over(done: asyncio.Task[list[bytes]]) -> None:
            self._hurting.discard(done)
            done.exception()  # `Cut`, which is for the connection, if that is still there
            fault.over.set()

        self._hurting.add(task)
        task.add_done_callback(over)
        return task

    async def _hurt(self, data: bytes, *, up: bool) -> AsyncIterator[bytes]:
        for fault in self.faults:
            first = data.find(fault.mark) if fault.mark else fault.at - self.passed[up]
            if fault.happened or fault.up is not up or first >= len(data) or (fault.mark and first < 0):
                continue
            fault.happened = True
            first = max(first, 0)
            if first:
                self.passed[up] += first
                yield data[:first]
            chunk, data = data[first : first + _CHUNK], data[first + _CHUNK :]
            self.passed[up] += len(chunk)
            for piece in await asyncio.shield(self._begin(fault, chunk)):
                yield piece
        self.passed[up] += len(data)
        if data:
            yield data


async def delay(chunk: bytes) -> list[bytes]:
    await asyncio.sleep(0.1)
    return [chunk]


async def truncate(chunk: bytes) -> list[bytes]:
    raise Cut


async def duplicate(chunk: bytes) -> list[bytes]:
    return [chunk, chunk]


async def reorder(chunk: bytes) -> list[bytes]:
    half = len(chunk) // 2
    return [chunk[half:], chunk[:half]]


async def flip(chunk: bytes) -> list[bytes]:
    return [bytes([chunk[0] ^ 1]), chunk[1:]]


def place(random: Random, size: int) -> int:
    """A byte of so many: half the time among the first, where heads and events are, else anywhere."""
    if random.random() < 0.5:
        return int(size ** random.random()) - 1
    return random.randrange(size)
