"""What a server must survive: the slow, the huge, the many and the malformed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import h2.config
import h2.connection
import h2.events
import pytest

from avp.errors import Busy
from avp.manifest import Limits
from avp.protocols import Meter
from avp.security import Security
from avp.testing.echo import EchoEndpoint, ask, failure, large_blob, sending
from avp.transports import http2_server
from avp.transports.http import TRANSPORT, HttpTransport
from avp.wire import encode_item

from .http_tools import open_raw, raw, read_answer, run, serving

POST = b"POST /avp/v1/count HTTP/1.1\r\nHost: x\r\n"
RULES = HttpTransport(grace=0.2, head=0.3, idle=0.3, connections=4, header=2000)
HTTP2 = Security(http2=True)


async def lives(url: str) -> None:
    channel = TRANSPORT.connect(url, security=Security())
    assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
    await channel.close()


@pytest.mark.parametrize(
    ("start", "more"), [(b"", b""), (b"", b"\r\n"), (b"POST /avp", b"p"), (POST, b"A"), (POST + b"A: b", b"b")]
)
def test_a_head_that_is_never_complete_is_ended(start: bytes, more: bytes) -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), rules=RULES) as url:
            reader, writer = await open_raw(url)
            writer.write(start)
            drip = asyncio.create_task(_drip(writer, more))
            assert (await read_answer(reader)).status == 408
            assert await reader.read() == b""
            drip.cancel()
            writer.close()
            await lives(url)

    run(scenario())


async def _drip(writer: asyncio.StreamWriter, more: bytes) -> None:
    while True:  # a byte now and then does not help
        await asyncio.sleep(0.05)
        writer.write(more)


def test_a_second_head_has_a_deadline_too() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), rules=RULES) as url:
            reader, writer = await open_raw(url)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await read_answer(reader)).status == 200
            writer.write(b"GET /hea")
            assert (await read_answer(reader)).status == 408
            assert await reader.read() == b""
            writer.close()

    run(scenario())


def test_a_body_that_stops_is_ended() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), rules=RULES) as url:
            reader, writer = await open_raw(url)
            writer.write(POST + b"Content-Length: 100\r\n\r\nJ")
            answer = await read_answer(reader)
            assert (answer.status, answer.json["error"]["type"]) == (408, "TimedOut")
            assert await reader.read() == b""
            writer.close()
            await lives(url)

    run(scenario())


def test_a_body_that_goes_on_after_its_answer_is_ended() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), rules=RULES) as url:
            reader, writer = await open_raw(url)
            writer.write(POST.replace(b"count", b"dance") + b"Content-Length: 1000000000\r\n\r\n")
            assert (await read_answer(reader)).status == 400
            writer.write(b"x" * 10000)  # longer than a head may be: it is no head
            drip = asyncio.create_task(_drip(writer, b"x"))
            assert await reader.read() == b""
            drip.cancel()
            writer.close()

    run(scenario())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_head_that_is_too_long_is_refused(at_once: bool) -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), rules=RULES) as url:
            reader, writer = await open_raw(url)
            writer.write(POST + b"X: " + b"x" * 3000)
            if at_once:
                writer.write(b"\r\nContent-Length: 1\r\n\r\nE")
            assert (await read_answer(reader)).status == 431
            assert await reader.read() == b""
            writer.close()
            await lives(url)

    run(scenario())


def test_more_connections_than_allowed_are_told_to_come_back() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), rules=replace(RULES, head=10)) as url:
            held = [await open_raw(url) for _ in range(4)]
            reader, writer = await open_raw(url)
            answer = await read_answer(reader)
            assert (answer.status, answer.fields["retry-after"]) == (503, "1")
            channel = TRANSPORT.connect(url, security=Security())
            error = await failure(ask(channel, "echo", large_blob()))
            assert isinstance(error, Busy)
            assert error.retry_after == 1.0
            for _, each in [*held, (reader, writer)]:
                each.close()
                await each.wait_closed()
            while isinstance(error, Busy):
                try:
                    error = await failure(ask(channel, "dance"))
                except ConnectionError:
                    continue
            await channel.close()
            await lives(url)

    run(scenario())


GARBAGE = {
    b"\x00\x01\x02\x03\r\n\r\n": 400,
    b"GET / HTTP/9.9\r\n\r\n": 400,
    b"POST /avp/v1/count HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nE": 400,
    b"POST /avp/v1/count HTTP/1.1\r\nContent-Length: -1\r\n\r\n": 400,
    b"POST /avp/v1/a%0Ab HTTP/1.1\r\nContent-Length: 0\r\n\r\n": 400,
    POST + b"Content-Length: 4\r\n\r\nhey!": 400,  # no frame
    POST + b"Content-Length: 0\r\n\r\n": 400,  # a stream without its end
    POST + b"Content-Length: 7\r\n\r\nJ\x01\x00\x00\x00[E": 400,  # no JSON
    POST + b"Content-Length: 2\r\n\r\nEE": 400,  # more after the end
    POST + b"Content-Length: 6\r\n\r\nJ\xff\xff\xff\xff{": 413,  # an event of 4 GiB
    POST + b"Content-Length: 9\r\n\r\nB\xff\xff\xff\xff\xff\xff\xff\x7f": 413,
    POST + b"Content-Length: 20\r\n\r\nB\x0b\0\0\0\0\0\0\0{}         ": 400,  # an empty bundle
}


@pytest.mark.parametrize(("sent", "status"), GARBAGE.items(), ids=range(len(GARBAGE)))
def test_garbage_is_refused(sent: bytes, status: int) -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), rules=RULES) as url:
            assert (await raw(url, sent)).status == status
            await lives(url)

    run(scenario())


def test_what_is_too_large_is_refused_without_waiting_for_it() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(limits=Limits(bytes=2**16)), rules=RULES) as url:
            blob = b"".join(encode_item(large_blob()))
            head = POST + b"Content-Length: 1000000000\r\n\r\n"
            answer = await raw(url, head, blob[:20000])
            assert (answer.status, answer.json["error"]["type"]) == (413, "LimitExceeded")
            await lives(url)

    run(scenario())


def test_a_body_of_tiny_chunks_costs_what_it_should() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), rules=replace(RULES, idle=10)) as url:
            text = b'{"n": "' + b"x" * 300_000 + b'"}'
            body = b"J" + len(text).to_bytes(4, "little") + text + b"E"
            chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
            async with asyncio.timeout(10):
                assert (await raw(url, POST + b"Transfer-Encoding: chunked\r\n\r\n", chunked)).status == 200

    run(scenario())


class Raw2:
    """A client of HTTP/2 that does as it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(validate_outbound_headers=False))
        self.h2.initiate_connection()

    @classmethod
    async def open(cls, url: str) -> Raw2:
        return cls(*await open_raw(url))

    def request(self, number: int, *more: tuple[str, str], end: bool = False, verb: str = "hang") -> None:
        path = (":path", f"/avp/v1/{verb}")
        self.h2.send_headers(
            number, [(":method", "POST"), (":scheme", "http"), (":authority", "x"), path, *more], end_stream=end
        )

    def send(self, data: bytes = b"") -> None:
        self.writer.write(self.h2.data_to_send() + data)

    async def events(self) -> list[h2.events.Event]:
        """All that comes until the server ends the connection."""
        found: list[h2.events.Event] = []
        while data := await self.reader.read(1 << 16):
            found += self.h2.receive_data(data)
        self.writer.close()
        return found

    async def first(self, kind: type[h2.events.Event]) -> h2.events.Event:
        while data := await self.reader.read(1 << 16):
            for event in self.h2.receive_data(data):
                if isinstance(event, kind):
                    return event
        raise AssertionError(f"no {kind.__name__} came")


def test_a_connection_of_http2_without_a_request_is_ended() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=HTTP2, rules=RULES) as url:
            reader, writer = await open_raw(url)
            writer.write(b"PRI * HTTP")
            assert await reader.read() == b""
            writer.close()
            client = await Raw2.open(url)
            client.send()
            assert any(isinstance(event, h2.events.ConnectionTerminated) for event in await client.events())
            await lives(url)

    run(scenario())


def test_a_body_that_stops_is_ended_over_http2() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=HTTP2, rules=RULES) as url:
            client = await Raw2.open(url)
            client.request(1, verb="count")
            client.send()
            event = await client.first(h2.events.ResponseReceived)
            assert isinstance(event, h2.events.ResponseReceived)
            assert dict(event.headers)[b":status"] == b"408"
            client.writer.close()

    run(scenario())


def test_streams_that_are_opened_and_cancelled_without_end_are_ended() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=HTTP2, rules=replace(RULES, head=10)) as url:
            client = await Raw2.open(url)
            for number in range(1, 1001, 2):
                client.request(number)
                client.h2.reset_stream(number)
            client.send()
            ended = [each for each in await client.events() if isinstance(each, h2.events.ConnectionTerminated)]
            assert ended[0].error_code == 11  # ENHANCE_YOUR_CALM
            await lives(url)

    run(scenario())


@pytest.mark.parametrize("what", ["header", "streams", "frame", "garbage"])
def test_what_breaks_the_rules_of_http2_is_ended(what: str) -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=HTTP2, rules=replace(RULES, head=10, idle=10)) as url:
            client = await Raw2.open(url)
            if what == "header":
                client.request(1, ("x", "y" * 3000))
            elif what == "streams":
                for number in range(1, 101, 2):
                    client.request(number)
            frames = {"frame": b"\xff\xff\xff\x00\x00\x00\x00\x00\x01", "garbage": b"x" * 100}
            client.send(frames.get(what, b""))
            assert any(isinstance(event, h2.events.ConnectionTerminated) for event in await client.events())
            await lives(url)

    run(scenario())


def test_empty_frames_are_not_kept() -> None:
    async def scenario() -> None:
        endpoint = EchoEndpoint()
        async with serving(endpoint, security=HTTP2, rules=replace(RULES, idle=10)) as url:
            client = await Raw2.open(url)
            client.request(1)
            for _ in range(20_000):
                client.h2.send_data(1, b"")
            client.h2.reset_stream(1)
            client.send()
            await client.writer.drain()
            assert await asyncio.to_thread(endpoint.left.wait, 10)
            client.writer.close()
            await client.writer.wait_closed()

    run(scenario())


class Full(asyncio.Transport):
    """A socket whose other end reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.aborted = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.held += len(data)

    def get_write_buffer_size(self) -> int:
        return self.held

    def is_closing(self) -> bool:
        return self.aborted > 0

    def abort(self) -> None:
        self.aborted += 1


def test_pings_whose_answers_nobody_reads_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(http2_server, "_UNREAD", 10_000)
        transport = Full()
        protocol = http2_server.Http2Protocol(
            lambda *_: asyncio.sleep(0), connections=set(), tasks=set(), head=1, idle=1, header=2000
        )
        protocol.connection_made(transport)
        client = h2.connection.H2Connection()
        client.initiate_connection()
        protocol.data_received(client.data_to_send())
        ping = b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + b"12345678"
        for _ in range(100):
            protocol.data_received(ping * 10)
        assert 0 < transport.held < 11_000
        assert transport.aborted
        protocol.connection_lost(None)

    run(scenario())


def test_a_client_that_reads_nothing_is_waited_for_and_may_leave() -> None:
    async def scenario() -> None:
        endpoint = EchoEndpoint()
        for security in (Security(), HTTP2):
            async with serving(endpoint, security=security) as url:
                channel = TRANSPORT.connect(url, security=security)
                async with channel.call("blobs", sending({"n": 10**6}), meter=Meter()) as answer:
                    await anext(answer)
                    before = -1
                    while before != endpoint.given:  # until it waits
                        before = endpoint.given
                        await asyncio.sleep(0.05)
                    assert endpoint.given < 30
                assert await asyncio.to_thread(endpoint.left.wait, 10)
                endpoint.left.clear()
                endpoint.given = 0
                await channel.close()

    run(scenario())
