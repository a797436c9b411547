"""What `avp serve` refuses: it is said quickly, and the log has a line for it without prompt, token or handle."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

import grpc.aio
import pytest

from avp.context import text_context
from avp.errors import AccessDenied, AVPError, Busy, HandleExpired, LimitExceeded
from avp.manifest import Limits
from avp.network import connect_async
from avp.protocols import Item, Meter
from avp.security import Security
from avp.transports import find, grpc_piece
from avp.wire import encode_item

from .harness import Server, hand_over, run, serving
from .payloads import TEXT, payload

OURS, THEIRS, WRONG = "token-of-one-tenant", "token-of-another", "token-of-nobody"
SCHEMES = ("http", "grpc", "unix")
QUICKLY = 10.0  # seconds, on a machine that is busy
MEMORY = 8 << 20


def listening(folder: Path) -> list[str]:
    urls = ("http://127.0.0.1:0", "grpc://127.0.0.1:0", f"unix:{folder}/a.sock")
    return [word for url in urls for word in ("--listen", url)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "tokens").write_text(f"{OURS} one\n{THEIRS} another\n")
    rules = ("--tokens", folder / "tokens", "--store", "memory:", "--memory", f"{MEMORY}B", "--log-level", "info")
    with serving(folder, "--no-model", *rules, *listening(folder)) as started:
        yield started


def refused(server: Server, scheme: str, token: str | None, call: Callable[..., Awaitable[object]]) -> AVPError:
    """What the call raises, soon; the server's log gets a line for it, which tells no secret."""
    before = len(server.said())

    async def scenario() -> AVPError:
        async with connect_async(server.urls[scheme], security=Security(token=token)) as remote:
            async with asyncio.timeout(QUICKLY):
                with pytest.raises(AVPError, match="Fix: ") as caught:
                    await call(remote)
                return caught.value

    error = run(scenario())
    said = server.said()
    added = said[before:]
    assert type(error).__name__ in added or (scheme == "http" and " 401 " in added), added
    assert "planner" not in said
    assert not any(secret in said or secret in str(error) for secret in (OURS, THEIRS, WRONG))
    return error


@pytest.mark.parametrize("token", [None, WRONG, OURS[:-1], OURS + "x"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_wrong_token_is_refused_before_anything_is_read(server: Server, scheme: str, token: str | None) -> None:
    error = refused(server, scheme, token, lambda remote: remote.hand_over(payload(0)))
    assert isinstance(error, AccessDenied)
    error = refused(server, scheme, token, lambda remote: remote.stream(TEXT).result())
    assert isinstance(error, AccessDenied)


CALLS = {
    "fetch": lambda remote, handle: remote.fetch(handle),
    "renew": lambda remote, handle: remote.renew(handle),
    "revoke": lambda remote, handle: remote.revoke(handle),
}


@pytest.mark.parametrize("verb", CALLS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_tenants_handle_is_refused_as_one_that_is_not_known(server: Server, scheme: str, verb: str) -> None:
    async def make() -> str:
        async with connect_async(server.urls[scheme], security=Security(token=OURS)) as remote:
            return str(await hand_over(remote, payload(1)))

    async def use() -> None:
        async with connect_async(server.urls[scheme], security=Security(token=OURS)) as remote:
            assert len(await remote.fetch(handle)) == len(payload(1))

    handle = run(make())
    theirs = refused(server, scheme, THEIRS, lambda remote: CALLS[verb](remote, handle))
    unknown = refused(server, scheme, THEIRS, lambda remote: CALLS[verb](remote, "0" * 64))
    assert isinstance(theirs, HandleExpired)
    assert str(theirs) == str(unknown)
    assert handle not in server.said() + str(theirs)
    run(use())  # and it is as it was


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_expired_handle_is_refused(scheme: str, tmp_path: Path) -> None:
    async def expired(url: str) -> AVPError:
        async with connect_async(url) as remote:
            handle = await hand_over(remote, payload(2))
            await asyncio.sleep(handle.ttl)  # its life
            with pytest.raises(HandleExpired, match="Fix: hand the context over again") as caught:
                await remote.fetch(handle)
            return caught.value

    with serving(tmp_path, "--no-model", "--store", "memory:", "--ttl", "1s", *listening(tmp_path)) as server:
        run(expired(server.urls[scheme]))
        assert "HandleExpired" in server.said()
        assert "planner" not in server.said()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_oversized_body_is_refused_by_its_length_and_not_waited_for(server: Server, scheme: str) -> None:
    async def announce(sent: Meter) -> None:
        async def items() -> AsyncIterator[Item]:
            yield long

        channel = find(server.urls[scheme]).connect(server.urls[scheme], security=Security(token=OURS))
        try:
            async with channel.call("probe", items(), meter=sent) as answer:
                async for _ in answer:
                    pass
        finally:
            await channel.close()

    long = text_context("planner" * (2 * Limits().header // 7))
    meter = Meter()
    error = refused(server, scheme, OURS, lambda _: announce(meter))
    assert isinstance(error, LimitExceeded), error
    assert meter.sent < Limits().header // 2 or scheme == "http"  # whose client may be ahead of the answer


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kv_beyond_the_quota_is_refused_before_it_is_sent(server: Server, scheme: str) -> None:
    large = payload(3, tokens=1024, head_dim=320)
    assert large.nbytes > MEMORY
    error = refused(server, scheme, OURS, lambda remote: remote.hand_over(large))
    assert isinstance(error, Busy)
    assert error.retry_after > 0
    assert "--memory" in str(error)


# --- a body that comes a byte at a time


def frame() -> bytes:
    """An event that is nothing but long."""
    return b"".join(map(bytes, encode_item({"handle": TEXT})))


async def drip() -> AsyncIterator[bytes]:
    for byte in frame():
        yield bytes([byte])
        await asyncio.sleep(0.05)


async def drip_http(url: str) -> str:
    """The error that the answer names."""
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    writer.write(b"POST /avp/v1/renew HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    reading = asyncio.create_task(reader.readuntil(b'"type": "'))
    async for byte in drip():
        if reading.done():
            break
        writer.write(b"1\r\n" + byte + b"\r\n")
    await reading
    name = await reader.readuntil(b'"')
    writer.close()
    return name[:-1].decode()


async def drip_grpc(url: str) -> str:
    """The error in the message that comes."""
    async with grpc.aio.insecure_channel(urlsplit(url).netloc) as channel:
        pieces = (grpc_piece.make_piece([byte]) async for byte in drip())
        path = f"/{grpc_piece.SERVICE}/{grpc_piece.METHOD}"
        call = channel.stream_stream(path)(pieces, metadata=[(grpc_piece.VERB, "renew")])
        return bytes(await call.read()).partition(b'"type":"')[2].partition(b'"')[0].decode()


async def drip_unix(url: str) -> str:
    """The error in the frame that comes."""
    reader, writer = await asyncio.open_unix_connection(url.removeprefix("unix:"))
    writer.writelines(map(bytes, encode_item({"call": "renew", "token": None})))
    reading = asyncio.create_task(reader.readuntil(b'"type":"'))
    async for byte in drip():
        if reading.done():
            break
        writer.write(byte)
    await reading
    name = await reader.readuntil(b'"')
    writer.close()
    return name[:-1].decode()


DRIPS = {"http": drip_http, "grpc": drip_grpc, "unix": drip_unix}


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("impatient")
    with serving(folder, "--no-model", "--store", "memory:", "--idle", "1s", *listening(folder)) as started:
        yield started


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_body_that_drips_is_ended_in_time(impatient: Server, scheme: str) -> None:
    """Bytes come all the while, and yet no whole event in the time that a caller has."""
    before, started = len(impatient.said()), monotonic()
    assert run(DRIPS[scheme](impatient.urls[scheme]), seconds=QUICKLY) == "TimedOut"
    assert monotonic() - started < 0.05 * len(frame())  # it was not read to its end
    added = impatient.said()[before:]
    assert "renew by tenant '' at" in added
    assert "TimedOut" in added
    assert "planner" not in added
