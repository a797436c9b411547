"""What a server of HTTP/2 must survive."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest

from avp.errors import Busy
from avp.security import Security
from avp.testing.echo import EchoEndpoint, ask, failure
from avp.transports.http import TRANSPORT, HttpTransport
from avp.wire import encode_item

from .http_tools import drip, lives, open_raw, run, serving

RULES = HttpTransport(grace=0.2, head=0.3, idle=0.3, connections=4, header=2000)
HTTP2 = Security(http2=True)


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
            await client.events()
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
        async with serving(EchoEndpoint(), security=HTTP2, rules=replace(RULES, head=60)) as url:
            client = await Raw2.open(url)
            for number in range(1, 1001, 2):
                client.request(number)
                client.h2.reset_stream(number)
            client.send()
            await client.events()
            await lives(url)

    run(scenario())


def test_a_connection_whose_only_stream_was_cancelled_is_ended() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=HTTP2, rules=RULES) as url:
            client = await Raw2.open(url)
            client.request(1)
            client.h2.reset_stream(1)
            client.send()
            await client.events()
            await lives(url)

    run(scenario())


def test_more_streams_at_once_than_allowed_end_the_connection() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=HTTP2, rules=replace(RULES, head=60, idle=60)) as url:
            client = await Raw2.open(url)
            for number in range(1, 101, 2):
                client.request(number)
            client.send()
            assert any(isinstance(event, h2.events.ConnectionTerminated) for event in await client.events())
            await lives(url)

    run(scenario())


def test_a_head_that_is_too_long_is_refused_over_http2() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=HTTP2, rules=replace(RULES, idle=60)) as url:
            client = await Raw2.open(url)
            client.request(1, ("x", "y" * 3000))
            client.send()
            event = await client.first(h2.events.ResponseReceived)
            assert isinstance(event, h2.events.ResponseReceived)
            assert dict(event.headers)[b":status"] == b"431"
            client.writer.close()

    run(scenario())


def test_a_body_that_goes_on_after_its_answer_is_ended_over_http2() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=HTTP2, rules=RULES) as url:
            client = await Raw2.open(url)
            client.request(1, verb="dance")
            client.h2.send_data(1, b"x" * 1000)
            client.send()
            answered = await client.first(h2.events.ResponseReceived)
            assert isinstance(answered, h2.events.ResponseReceived)
            assert dict(answered.headers)[b":status"] == b"400"
            dripping = asyncio.create_task(drip(client.writer, b"\0\0\1\0\0\0\0\0\1x"))
            await client.events()
            dripping.cancel()
            await lives(url)

    run(scenario())


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\x00\x00\x00\x00\x00\x01", b"x" * 100])
def test_a_frame_that_is_too_long_is_not_waited_for(garbage: bytes) -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=HTTP2, rules=replace(RULES, idle=60)) as url:
            client = await Raw2.open(url)
            client.send(garbage)
            await client.events()
            await lives(url)

    run(scenario())


def test_empty_frames_are_not_kept() -> None:
    async def scenario() -> None:
        endpoint = EchoEndpoint()
        async with serving(endpoint, security=HTTP2, rules=replace(RULES, head=10, idle=10)) as url:
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


def test_pings_whose_answers_nobody_reads_do_not_pile_up() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=HTTP2, rules=replace(RULES, head=60)) as url:
            client = await Raw2.open(url)
            client.send()
            client.writer.transport.pause_reading()
            pings = b"\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678" * 60_000
            sent, stopped = 0, False
            while not stopped and sent < 2**28:
                client.writer.write(pings)
                sent += len(pings)
                try:
                    async with asyncio.timeout(1):
                        await client.writer.drain()
                except TimeoutError:
                    stopped = True
            assert stopped, "the server read pings whose answers were not taken"
            client.writer.transport.abort()
            await lives(url)

    run(scenario())


def test_a_client_that_gives_no_credit_is_waited_for_and_may_leave() -> None:
    async def scenario() -> None:
        endpoint = EchoEndpoint()
        async with serving(endpoint, security=HTTP2, rules=replace(RULES, head=60)) as url:
            client = await Raw2.open(url)
            client.request(1, verb="blobs")
            client.h2.send_data(1, b"".join(encode_item({"n": 1000})) + b"E", end_stream=True)
            client.send()
            taken = 0
            while taken < 65535:  # what a new stream may have
                taken += sum(
                    len(event.data)
                    for event in client.h2.receive_data(await client.reader.read(1 << 16))
                    if isinstance(event, h2.events.DataReceived)
                )
            before = -1
            while before != endpoint.given:  # until it waits
                before = endpoint.given
                await asyncio.sleep(0.05)
            assert endpoint.given < 8
            client.writer.close()
            await client.writer.wait_closed()
            assert await asyncio.to_thread(endpoint.left.wait, 10)

    run(scenario())


def test_a_client_that_leaves_a_refusal_without_credit_frees_its_place() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=HTTP2, rules=replace(RULES, connections=1, head=60)) as url:
            client = await Raw2.open(url)
            client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
            client.request(1, verb="dance", end=True)
            client.send()
            await client.first(h2.events.ResponseReceived)
            client.writer.close()
            await client.writer.wait_closed()
            channel = TRANSPORT.connect(url, security=HTTP2)
            while isinstance(await failure(ask(channel, "dance")), Busy):
                pass
            await channel.close()

    run(scenario())
