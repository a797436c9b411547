"""The transport between processes of one machine: its laws, the count, the path, and how calls end."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from avp.errors import AVPError, ConnectionFailed, LimitExceeded, UsageError
from avp.manifest import Limits
from avp.protocols import Item, Meter, Transport
from avp.security import Caller, Security
from avp.testing.echo import EchoEndpoint, as_bytes, ask, ask_with, blobs_of, failure, large_blob, sending
from avp.testing.synthetic import synthetic_context
from avp.testing.transport import TransportConformance
from avp.transports.unix import TRANSPORT, UnixListener

from .unix_tools import QUICK, opened, shared_context


class TestUnix(TransportConformance):
    moves_bytes = False

    def transport(self) -> Transport:
        return QUICK

    def address(self, tmp_path: Path) -> str:
        return f"unix:{tmp_path}/a.sock"


# --- the count


def test_the_meter_counts_each_byte_on_the_socket(tmp_path: Path) -> None:
    counts = [0, 0]

    async def pump(source: socket.socket, target: socket.socket, index: int) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, 65536):
            counts[index] += len(data)
            await loop.sock_sendall(target, data)

    async def scenario() -> None:
        loop, meter = asyncio.get_running_loop(), Meter()
        listener = await QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/a.sock", security=Security())
        with (
            socket.socket(socket.AF_UNIX) as relay,
            socket.socket(socket.AF_UNIX) as far,
        ):
            relay.bind(f"{tmp_path}/relay.sock")
            relay.listen()
            relay.setblocking(False)
            far.setblocking(False)
            channel = QUICK.connect(f"unix:{tmp_path}/relay.sock", security=Security(token="t"))
            small = blobs_of(synthetic_context(tokens=40))[0]
            items: list[Item] = [{"text": "ż" * 100000}, small, {"n": 1}] * 5
            call = asyncio.create_task(ask(channel, "echo", *items, meter=meter))
            near, _ = await loop.sock_accept(relay)
            with near:
                near.setblocking(False)
                await loop.sock_connect(far, f"{tmp_path}/a.sock")
                pumps = [asyncio.create_task(pump(*way)) for way in ((near, far, 0), (far, near, 1))]
                assert len(await call) == 15
                for each in pumps:
                    each.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        assert [meter.sent, meter.received] == counts
        await listener.close()

    asyncio.run(scenario())


# --- the path


def test_only_the_owner_can_open_the_socket_and_it_goes_with_the_listener(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as (_, _, path):
            found = os.stat(path)
            assert stat.S_ISSOCK(found.st_mode)
            assert stat.S_IMODE(found.st_mode) == 0o600
        assert not os.path.exists(path)

    asyncio.run(scenario())


def test_the_socket_of_a_dead_server_is_replaced_and_that_of_a_live_one_is_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(f"{tmp_path}/a.sock")
        async with opened(tmp_path) as (_, channel, path):
            with pytest.raises(UsageError, match=r"is being served already\. Fix:"):
                await QUICK.serve(EchoEndpoint(), f"unix:{path}", security=Security())
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]

    asyncio.run(scenario())


def test_a_listener_leaves_the_socket_of_its_successor_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = await QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/a.sock", security=Security())
        os.unlink(tmp_path / "a.sock")
        second = await QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/a.sock", security=Security())
        await first.close()
        channel = QUICK.connect(second.url, security=Security())
        assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
        await second.close()

    asyncio.run(scenario())


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.sock").write_text("mine")
    with pytest.raises(UsageError, match="is no socket"):
        asyncio.run(QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/a.sock", security=Security()))
    assert (tmp_path / "a.sock").read_text() == "mine"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none/a\.sock: No such file or directory\. Fix:"):
        asyncio.run(QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/none/a.sock", security=Security()))


@pytest.mark.parametrize("url", ["unix:", "unix://host/a.sock", "mem:a", "/tmp/a.sock", "unix:a\0b"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"Fix: write unix:/path/to\.sock"):
        TRANSPORT.connect(url, security=Security())


def test_a_path_that_is_too_long_is_refused_with_its_length() -> None:
    with pytest.raises(UsageError, match=r"has 108 bytes; a unix socket's has at most 107\. Fix: choose a shorter"):
        TRANSPORT.connect("unix:/" + "a" * 107, security=Security())


@pytest.mark.parametrize("form", ["unix:a.sock", "unix:{0}/a.sock", "unix://{0}/a.sock"])
def test_a_path_may_be_relative_or_written_with_three_slashes(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async def scenario() -> None:
        listener = await QUICK.serve(EchoEndpoint(), form.format(tmp_path), security=Security())
        assert listener.url == f"unix:{tmp_path}/a.sock"
        monkeypatch.chdir("/")
        channel = QUICK.connect(listener.url, security=Security())
        assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
        await listener.close()
        assert os.listdir(tmp_path) == []

    asyncio.run(scenario())


# --- endings


def test_descriptors_are_closed_however_a_call_ends(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[Item]:
        yield large_blob()
        raise ZeroDivisionError("mine")

    async def scenario() -> None:
        context, _ = shared_context()
        blobs = [*blobs_of(context), large_blob()]
        async with opened(tmp_path) as (_, channel, _):
            for _ in range(5):
                async with channel.call("echo", sending(*blobs, *blobs), meter=Meter()) as answer:
                    await anext(answer)
                async with channel.call("hang", sending(*blobs, *blobs), meter=Meter()):
                    await asyncio.sleep(0)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await ask(channel, "hang", *blobs, *blobs)
                with pytest.raises(ZeroDivisionError, match="mine"):
                    await ask_with(channel, "echo", broken())
            del answer

    asyncio.run(scenario())


def test_what_exceeds_the_limits_in_shared_memory_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        blobs = blobs_of(shared_context()[0])
        for limits in (Limits(bytes=blobs[0].nbytes - 1), Limits(header=len(blobs[0].header) - 9)):
            async with opened(tmp_path, limits=limits) as (_, channel, _):
                assert isinstance(await failure(ask(channel, "count", *blobs)), LimitExceeded)
                assert await ask(channel, "echo", {"n": 2}) == [{"n": 2}]

    asyncio.run(scenario())


def test_a_call_works_in_uvloop(tmp_path: Path) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def scenario() -> None:
        blobs = [*blobs_of(shared_context()[0]), large_blob()]
        async with opened(tmp_path) as (endpoint, channel, _):
            back = await ask(channel, "echo", *blobs, *blobs)
            assert [as_bytes(item) for item in back] == 2 * [as_bytes(blob) for blob in blobs]
            del back
            async with channel.call("hang", sending(), meter=Meter()):
                assert await asyncio.to_thread(endpoint.started.wait, 10)
            assert await asyncio.to_thread(endpoint.left.wait, 10)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


def test_closing_a_channel_ends_its_calls(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as (endpoint, channel, _):
            async with channel.call("blobs", sending({"n": 1000}), meter=Meter()) as answer:
                await anext(answer)
                await channel.close()
                with pytest.raises(ConnectionFailed):
                    [item async for item in answer]
            assert await asyncio.to_thread(endpoint.left.wait, 10)
            del answer

    asyncio.run(scenario())


def test_a_listener_is_of_this_transport(tmp_path: Path) -> None:
    async def scenario() -> None:
        listener = await TRANSPORT.serve(EchoEndpoint(), f"unix:{tmp_path}/b.sock", security=Security())
        assert isinstance(listener, UnixListener)
        await listener.close()

    asyncio.run(scenario())


def test_a_fault_in_admitting_a_caller_ends_the_call_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(EchoEndpoint):
        def admit(self, token: str | None, *, address: str) -> Caller:
            raise ZeroDivisionError(f"{token} at {address}")

    async def scenario() -> None:
        listener = await QUICK.serve(Faulty(), f"unix:{tmp_path}/a.sock", security=Security())
        channel = QUICK.connect(listener.url, security=Security(token="secret"))
        assert isinstance(await failure(ask(channel, "echo", {"n": 1})), ConnectionFailed)
        await listener.close()

    asyncio.run(scenario())
    assert "ended with a fault: ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text


def test_a_caller_waits_while_the_queue_of_connections_is_full(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as first:
            full.bind(f"{tmp_path}/a.sock")
            full.listen(0)
            first.connect(f"{tmp_path}/a.sock")
            channel = QUICK.connect(f"unix:{tmp_path}/a.sock", security=Security())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await ask(channel, "echo")
            with pytest.raises(UsageError, match="is being served already"):
                await QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/a.sock", security=Security())

    asyncio.run(scenario())


def test_errors_of_a_call_are_ours(tmp_path: Path) -> None:
    channel = TRANSPORT.connect(f"unix:{tmp_path}/none.sock", security=Security())
    error = asyncio.run(failure(ask(channel, "echo")))
    assert isinstance(error, AVPError)
    assert "No such file or directory. Fix: start the server" in str(error)
