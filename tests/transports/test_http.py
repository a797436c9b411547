"""HTTP/1.1 and HTTP/2 as transports, and what a proxy, curl or a person may meet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from avp.errors import (
    Busy,
    ConnectionFailed,
    ContextTooLong,
    HandleExpired,
    IdentityMismatch,
    LimitExceeded,
    NoAgreement,
    SegmentMissing,
    TimedOut,
    UsageError,
)
from avp.protocols import Item, Meter, Transport
from avp.security import Caller, Security, Tenant
from avp.testing.echo import EchoEndpoint, ask, ask_with, failure, large_blob, sending
from avp.testing.transport import TransportConformance
from avp.transports.http import SECURE, TRANSPORT, HttpTransport

from .http_tools import Relay, Stranger, get, raw, run, serving

QUICK = HttpTransport(grace=0.2)
PLAIN = Security()


class TestHttp1(TransportConformance):
    def transport(self) -> Transport:
        return QUICK

    def address(self, tmp_path: Path) -> str:
        return "http://127.0.0.1:0"


class TestHttp2(TestHttp1):
    def security(self) -> tuple[Security, Security]:
        return Security(http2=True), Security(http2=True)


class TestHttp1ToAServerOfBoth(TestHttp1):
    def security(self) -> tuple[Security, Security]:
        return Security(http2=True), Security()


class TestBehindAPath(TestHttp1):
    def address(self, tmp_path: Path) -> str:
        return "http://localhost:0/some/where/"


@pytest.mark.parametrize("http2", [False, True])
def test_the_receipts_bytes_are_those_of_the_socket(http2: bool) -> None:
    async def scenario() -> None:
        security = Security(http2=http2)
        async with serving(EchoEndpoint(), security=security) as url, Relay(url) as relay:
            channel, meters = TRANSPORT.connect(relay.url, security=security), [Meter() for _ in range(3)]
            for meter in meters:
                await ask(channel, "echo", large_blob(), {"n": 1}, meter=meter)
            await channel.close()
            assert relay.connections == 1, "calls one after the other use one connection"
            assert sum(meter.sent for meter in meters) == relay.sent
            assert sum(meter.received for meter in meters) == relay.received

    run(scenario())


@pytest.mark.parametrize("http2", [False, True])
def test_calls_side_by_side_do_not_mix_their_counts(http2: bool) -> None:
    async def scenario() -> None:
        blob = large_blob()
        security = Security(http2=http2)
        async with serving(EchoEndpoint(), security=security) as url, Relay(url) as relay:
            channel, meters = TRANSPORT.connect(relay.url, security=security), [Meter() for _ in range(4)]
            await asyncio.gather(
                *(ask(channel, "echo", *[blob] * n, meter=meter) for n, meter in enumerate(meters, start=1))
            )
            await channel.close()
            for n, meter in enumerate(meters, start=1):
                for counted in (meter.sent, meter.received):
                    assert n * blob.nbytes < counted < n * blob.nbytes * 1.01 + 4096
            assert relay.connections == 4
            assert sum(meter.sent for meter in meters) == relay.sent
            assert sum(meter.received for meter in meters) == relay.received

    run(scenario())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError, 400),
        (HandleExpired, 404),
        (SegmentMissing, 404),
        (TimedOut, 408),
        (NoAgreement, 409),
        (IdentityMismatch, 409),
        (LimitExceeded, 413),
        (ContextTooLong, 413),
        (Busy, 503),
        (ConnectionFailed, 500),
    ],
)
def test_an_error_before_the_first_item_is_a_status(error: type[Exception], status: int) -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint()) as url:
            text = b'{"message":"m","retry_after":3.2,"type":"%s"}' % error.__name__.encode()
            body = b"J" + len(text).to_bytes(4, "little") + text + b"E"
            answer = await raw(
                url, b"POST /avp/v1/fail HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body), body
            )
            assert answer.status == status
            assert answer.json == {"error": {"type": error.__name__, "message": "m"}} | (
                {"error": {"type": "Busy", "message": "m", "retry_after": 3.2}} if error is Busy else {}
            )
            assert answer.fields.get("retry-after") == ("3" if error is Busy else None)

    run(scenario())


def test_a_wrong_token_is_a_401_that_says_what_is_wanted() -> None:
    async def scenario() -> None:
        security = Security(tokens={"right": Tenant.named("a")})
        async with serving(EchoEndpoint(security=security), security=security) as url:
            for fields in (b"", b"Authorization: Bearer wrong\r\n", b"Authorization: Basic right\r\n"):
                answer = await get(url, "/avp/v1/hello", fields)
                assert (answer.status, answer.fields["www-authenticate"]) == (401, "Bearer")
                assert b"right" not in answer.body
            assert (await get(url, "/avp/v1/hello", b"authorization: bearer right\r\n")).status != 401

    run(scenario())


def test_an_application_checks_tokens_even_where_its_endpoint_does_not() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=Security(tokens={"right": Tenant()})) as url:
            assert (await get(url, "/avp/v1/hello")).status == 401

    run(scenario())


class Greeting(EchoEndpoint):
    async def answer(self, verb: str, items: AsyncIterator[Item], *, caller: Caller) -> AsyncIterator[Item]:
        assert verb == "hello"
        assert [item async for item in items] == [{}]
        yield {"name": "b", "models": ["ż"]}


def test_a_person_may_say_hello() -> None:
    async def scenario() -> None:
        async with serving(Greeting()) as url:
            answer = await get(url, "/avp/v1/hello")
            assert (answer.status, answer.json) == (200, {"name": "b", "models": ["ż"]})
            assert (await get(url, "/health")).json == {"status": "ok"}
            for path, status in (("/", 404), ("/avp/v1/contexts/x", 404), ("/avp/v1/generate", 405)):
                answer = await get(url, path)
                assert answer.status == status
                assert answer.json["error"]["type"] == "UsageError"

    run(scenario())


def test_an_endpoint_that_does_not_greet_is_said_so() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint()) as url:
            answer = await get(url, "/avp/v1/hello")
            assert (answer.status, answer.json["error"]["type"]) == (400, "UsageError")

    run(scenario())


PAGE = b"<html>Bad Gateway</html>"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.avp.stream\r\n"
STRANGERS = {
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s"
    % (len(PAGE), PAGE): "502 .*html",
    b"HTTP/1.1 302 Found\r\nLocation: https://elsewhere/\r\nContent-Length: 0\r\n\r\n": "302, to https://elsewhere/",
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}": "200 .*application/json",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nuntil the end": "200 .*until the end",
    b'HTTP/1.1 429 No\r\nContent-Length: 35\r\n\r\n{"error": {"message": "no credit"}}': "no credit",
    b"SSH-2.0-OpenSSH_9.9\r\n": "no HTTP",
    b"HTTP/1.1 200 OK\r\nX: " + b"x" * 170000: "too long",
    b"": "no answer came",
    STREAM + b"Content-Length: 9\r\n\r\nJ\x02\x00": "in the middle",
    STREAM + b"Content-Length: 3\r\n\r\nhey": "frame begins",
}


@pytest.mark.parametrize(("answer", "why"), STRANGERS.items(), ids=STRANGERS.values())
def test_what_is_no_endpoint_is_said_so(answer: bytes, why: str) -> None:
    async def scenario() -> None:
        async with Stranger(answer) as url:
            channel = TRANSPORT.connect(url, security=Security(token="secret"))
            with pytest.raises(ConnectionFailed, match=why) as caught:
                await ask(channel, "hello", large_blob())
            assert "Fix: " in str(caught.value) or why == "no credit"
            assert "secret" not in str(caught.value)
            await channel.close()

    run(scenario())


def test_an_early_hint_is_not_the_answer() -> None:
    async def scenario() -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        async with Stranger(early + STREAM + b"Content-Length: 1\r\n\r\nE") as url:
            channel = TRANSPORT.connect(url, security=PLAIN)
            assert await ask(channel, "hello") == []
            await channel.close()

    run(scenario())


def test_http2_to_a_server_without_it_is_said_so() -> None:
    async def scenario() -> None:
        for answer, kind in ((b"HTTP/1.1 400 Bad\r\n\r\n", ConnectionFailed), (b"HTTP/1.1 503 Full\r\n\r\n", Busy)):
            async with Stranger(answer) as url:
                channel = TRANSPORT.connect(url, security=Security(http2=True))
                assert isinstance(await failure(ask(channel, "hello")), kind)
                await channel.close()

    run(scenario())


@pytest.mark.parametrize("http2", [False, True])
def test_an_error_during_an_upload_ends_it(http2: bool) -> None:
    async def scenario() -> None:
        security = Security(http2=http2)
        sent = 0

        async def much() -> AsyncIterator[Item]:
            nonlocal sent
            yield {"type": "NoAgreement", "message": "no"}
            while sent < 200:
                yield large_blob()
                sent += 1

        async with serving(EchoEndpoint(), security=security) as url:
            channel = TRANSPORT.connect(url, security=security)
            assert isinstance(await failure(ask_with(channel, "fail", much())), NoAgreement)
            assert sent < 150
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
            await channel.close()

    run(scenario())


@pytest.mark.parametrize("http2", [False, True])
def test_a_fault_of_the_callers_own_items_is_the_callers(http2: bool) -> None:
    async def broken() -> AsyncIterator[Item]:
        yield {"n": 1}
        raise ZeroDivisionError

    async def scenario() -> None:
        security = Security(http2=http2)
        async with serving(EchoEndpoint(), security=security) as url:
            channel = TRANSPORT.connect(url, security=security)
            with pytest.raises(ZeroDivisionError):
                await ask_with(channel, "count", broken())
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
            await channel.close()

    run(scenario())


@pytest.mark.parametrize("http2", [False, True])
def test_a_caller_that_vanishes_while_it_sends_ends_the_call_at_the_far_end(http2: bool) -> None:
    async def scenario() -> None:
        security, endpoint = Security(http2=http2), EchoEndpoint()
        async with serving(endpoint, security=security) as url, Relay(url) as relay:
            channel = TRANSPORT.connect(relay.url, security=security)

            async def forever() -> AsyncIterator[Item]:
                while True:
                    yield large_blob()

            call = asyncio.create_task(failure(ask_with(channel, "count", forever())))
            while relay.sent < 2**23:
                await asyncio.sleep(0)
            relay.cut()
            assert isinstance(await call, ConnectionFailed)
            assert await asyncio.to_thread(endpoint.left.wait, 10)
            await channel.close()

    run(scenario())


def test_a_connection_that_the_server_closed_meanwhile_is_not_used() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint()) as url, Relay(url) as relay:
            channel = TRANSPORT.connect(relay.url, security=PLAIN)
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
            await relay.ended()
            assert await ask(channel, "echo", {"n": 2}) == [{"n": 2}]
            assert relay.connections == 2
            await channel.close()

    run(scenario())


def test_many_calls_at_once_over_http2_and_then_others() -> None:
    async def scenario() -> None:
        security = Security(http2=True)
        async with serving(EchoEndpoint(), security=security) as url, Relay(url) as relay:
            channel = TRANSPORT.connect(relay.url, security=security)
            async with AsyncExitStack() as calls:
                for _ in range(80):
                    answer = await calls.enter_async_context(channel.call("blobs", sending({"n": 9}), meter=Meter()))
                    assert await anext(answer)
            assert relay.connections == 80
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
            await channel.close()

    run(scenario())


@pytest.mark.parametrize("http2", [False, True])
def test_a_call_that_nobody_reads_does_not_hold_up_another_one(http2: bool) -> None:
    async def scenario() -> None:
        security = Security(http2=http2)
        async with serving(EchoEndpoint(), security=security) as url:
            channel = TRANSPORT.connect(url, security=security)
            async with channel.call("blobs", sending({"n": 40}), meter=Meter()) as answer:
                await anext(answer)
                assert len(await ask(channel, "echo", large_blob(), large_blob())) == 2
            await channel.close()

    run(scenario())


def test_an_address_that_is_none_is_refused() -> None:
    for url in ("ftp://x", "https://x", "http://", "http://user@x", "http://x/?a=1", "http://x:99999"):
        with pytest.raises(UsageError):
            TRANSPORT.connect(url, security=PLAIN)
    with pytest.raises(UsageError, match="token"):
        TRANSPORT.connect("http://x", security=Security(token="a\r\nb"))

    async def scenario() -> None:
        for url in ("http://0.0.0.0:0", "http://192.0.2.1:0", "http://127.0.0.1:0/?a", "http://localhost.invalid:0"):
            with pytest.raises(UsageError):
                await TRANSPORT.serve(EchoEndpoint(), url, security=PLAIN)
        with pytest.raises(UsageError, match="cannot be listened at"):
            await TRANSPORT.serve(EchoEndpoint(), "http://192.0.2.1:0", security=Security(insecure=True))
        with pytest.raises(UsageError, match="checks none"):
            await TRANSPORT.serve(EchoEndpoint(), "http://0.0.0.0:0", security=Security(ca=Path("ca.pem")))
        channel = TRANSPORT.connect("http://127.0.0.1:9", security=PLAIN)
        with pytest.raises(UsageError, match="no verb"):
            await ask(channel, "../x")
        with pytest.raises(ConnectionFailed, match="cannot be reached"):
            await ask(channel, "echo")

    run(scenario())
    assert SECURE.scheme == "https"


def test_the_log_tells_of_calls_but_not_what_they_carry(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        security = Security(tokens={"sesame": Tenant()})
        async with serving(EchoEndpoint(security=security), security=security) as url:
            channel = TRANSPORT.connect(url, security=Security(token="sesame"))
            await ask(channel, "echo", {"text": "a private prompt"})
            await failure(ask(channel, "crash", {"text": "a private prompt"}))
            await get(url, "/avp/v1/contexts/0123456789abcdef?secret=1")
            await get(url, "/avp/%0ax")
            await channel.close()

    with caplog.at_level(logging.INFO, "avp"):
        run(scenario())
    lines = [record.getMessage() for record in caplog.records if record.name == "avp"]
    assert any(line.startswith("POST /avp/v1/echo 200 in=") for line in lines)
    assert any("crash failed: RuntimeError at" in line for line in lines)
    assert any("/avp/v1/contexts/012345..." in line for line in lines)
    for secret in ("private", "sesame", "secret", "0123456789", "\n"):
        assert not any(secret in line for line in lines)
