"""What a server must survive: the slow, the huge, the many and the malformed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from avp.errors import Busy
from avp.manifest import Limits
from avp.protocols import Meter
from avp.security import Security
from avp.testing.echo import EchoEndpoint, ask, failure, large_blob, sending
from avp.transports.http import TRANSPORT, HttpTransport
from avp.wire import encode_item

from .http_tools import drip, lives, open_raw, raw, read_answer, run, serving

POST = b"POST /avp/v1/count HTTP/1.1\r\nHost: x\r\n"
RULES = HttpTransport(grace=0.2, head=0.3, idle=0.3, connections=4, header=2000)
HTTP2 = Security(http2=True)


@pytest.mark.parametrize(
    ("start", "more"), [(b"", b""), (b"", b"\r\n"), (b"POST /avp", b"p"), (POST, b"A"), (POST + b"A: b", b"b")]
)
def test_a_head_that_is_never_complete_is_ended(start: bytes, more: bytes) -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), rules=RULES) as url:
            reader, writer = await open_raw(url)
            writer.write(start)
            dripping = asyncio.create_task(drip(writer, more))
            assert (await read_answer(reader)).status == 408
            assert await reader.read() == b""
            dripping.cancel()
            writer.close()
            await lives(url)

    run(scenario())


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
            dripping = asyncio.create_task(drip(writer, b"x"))
            assert await reader.read() == b""
            dripping.cancel()
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
