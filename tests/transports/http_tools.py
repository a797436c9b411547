"""What tests of HTTP share: a raw client, a relay that counts, a server that is none of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from avp.protocols import Endpoint
from avp.security import Security
from avp.testing.echo import ask
from avp.transports.http import TRANSPORT, HttpTransport


def run(scenario: Coroutine[object, object, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario

    asyncio.run(bounded())


@asynccontextmanager
async def serving(
    endpoint: Endpoint, *, security: Security | None = None, rules: HttpTransport | None = None
) -> AsyncIterator[str]:
    rules = rules or HttpTransport(grace=0.2)
    listener = await rules.serve(endpoint, f"{rules.scheme}://127.0.0.1:0", security=security or Security())
    try:
        yield listener.url
    finally:
        await listener.close()


@dataclass
class Answer:
    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def open_raw(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


async def raw(url: str, head: bytes, body: bytes = b"") -> Answer:
    reader, writer = await open_raw(url)
    writer.write(head + body)
    try:
        return await read_answer(reader, bodyless=head.startswith(b"HEAD"))
    finally:
        writer.close()
        await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader, *, bodyless: bool = False) -> Answer:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    size = 0 if bodyless else int(fields.get("content-length", 0))
    return Answer(int(first.split()[1]), fields, await reader.readexactly(size))


async def get(url: str, path: str, fields: bytes = b"") -> Answer:
    return await raw(url, f"GET {path} HTTP/1.1\r\nHost: x\r\n".encode() + fields + b"\r\n")


async def lives(url: str) -> None:
    channel = TRANSPORT.connect(url, security=Security())
    assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
    await channel.close()


async def drip(writer: asyncio.StreamWriter, more: bytes) -> None:
    while True:  # a byte now and then does not help
        await asyncio.sleep(0.05)
        writer.write(more)


class Relay:
    """Stands between a client and a server, and counts."""

    def __init__(self, url: str) -> None:
        self.sent = self.received = self.connections = 0
        self._target = urlsplit(url)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        await self.ended()

    async def ended(self) -> None:
        self.cut()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        far_reader, far_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        both = {writer, far_writer}
        self._writers |= both
        await asyncio.gather(self._pass(reader, far_writer, "sent"), self._pass(far_reader, writer, "received"))
        self._writers -= both
        await asyncio.gather(*(each.wait_closed() for each in both), return_exceptions=True)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, name: str) -> None:
        try:
            while data := await source.read(1 << 16):
                setattr(self, name, getattr(self, name) + len(data))
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        sink.close()


class Stranger:
    """A server that answers whatever comes with the same bytes, and closes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._gone = asyncio.Event()

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        await self._gone.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(self._answer)
        with suppress(OSError):
            writer.write_eof()
            while await reader.read(1 << 20):
                pass
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        self._gone.set()
