"""gRPC: the laws of a transport, addresses, and how calls, channels and servers end."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from avp.errors import ConnectionFailed, UsageError
from avp.protocols import Item, Meter, Transport
from avp.security import Security, Tenant
from avp.testing.echo import EchoEndpoint, ask, ask_with, failure, large_blob, sending
from avp.testing.transport import TransportConformance
from avp.transports.grpc import TRANSPORT

from .grpc_tools import opened, run


class TestGrpc(TransportConformance):
    def transport(self) -> Transport:
        return TRANSPORT

    def address(self, tmp_path: Path) -> str:
        return "grpc://127.0.0.1:0"


# What is refused before anything is sent


def test_a_server_that_would_be_open_to_all_is_refused() -> None:
    async def scenario() -> None:
        with pytest.raises(UsageError, match="can be reached from other machines"):
            await TRANSPORT.serve(EchoEndpoint(), "grpc://0.0.0.0:0", security=Security())
        tokens = Security(tokens={"one": Tenant.named("a")})
        listener = await TRANSPORT.serve(EchoEndpoint(), "grpc://0.0.0.0:0", security=tokens)
        await listener.close()

    run(scenario)


def test_what_is_no_address_of_ours_is_refused() -> None:
    for url in ("grpcs://127.0.0.1:1", "127.0.0.1:1", "grpc://127.0.0.1", "grpc://:1"):
        with pytest.raises(UsageError, match="Fix: write it as"):
            TRANSPORT.connect(url, security=Security())
    with pytest.raises(UsageError, match="printable ASCII"):
        TRANSPORT.connect("grpc://127.0.0.1:1", security=Security(token="two\nlines"))

    async def scenario() -> None:
        async with opened() as (_, _, listener):
            with pytest.raises(UsageError, match="another program listens there"):
                await TRANSPORT.serve(EchoEndpoint(), listener.url, security=Security())

    run(scenario)


def test_ipv6_addresses_have_brackets() -> None:
    async def scenario() -> None:
        listener = await TRANSPORT.serve(EchoEndpoint(), "grpc://[::1]:0", security=Security())
        assert listener.url.startswith("grpc://[::1]:")
        channel = TRANSPORT.connect(listener.url, security=Security())
        answer = (await ask(channel, "who"))[0]
        assert isinstance(answer, dict)
        assert str(answer["address"]).startswith("[::1]:")
        await channel.close()
        await listener.close()

    run(scenario)


# Ends


def test_a_fault_of_the_callers_own_items_is_the_callers() -> None:
    async def broken() -> AsyncIterator[Item]:
        yield {"n": 1}
        raise ZeroDivisionError("mine")

    async def scenario() -> None:
        async with opened() as (_, channel, _):
            with pytest.raises(ZeroDivisionError, match="mine"):
                await ask_with(channel, "count", broken())
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]

    run(scenario)


def test_closing_a_channel_ends_its_calls_and_the_next_call_opens_it_again() -> None:
    async def scenario() -> None:
        async with opened() as (endpoint, channel, _):
            call = asyncio.create_task(failure(ask(channel, "hang")))
            assert await asyncio.to_thread(endpoint.started.wait, 10)
            await channel.close()
            error = await call
            assert type(error) is ConnectionFailed
            assert "closing its channel" in str(error)
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]

    run(scenario)


def test_a_server_that_was_started_again_is_found_by_the_same_channel() -> None:
    async def scenario() -> None:
        async with opened() as (_, channel, listener):
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
            await listener.close()
            assert type(await failure(ask(channel, "echo", {"n": 1}))) is ConnectionFailed
            again = await TRANSPORT.serve(EchoEndpoint(), listener.url, security=Security())
            async with asyncio.timeout(10):
                while True:
                    try:
                        assert await ask(channel, "echo", {"n": 2}) == [{"n": 2}]
                        break
                    except ConnectionFailed:
                        await asyncio.sleep(0.05)
            await again.close()

    run(scenario)


def test_several_loops_in_one_process_do_not_disturb_each_other(caplog: pytest.LogCaptureFixture) -> None:
    """One poller of grpc.aio serves them all; older versions logged a BlockingIOError (grpc/grpc#25364)."""
    caplog.set_level(logging.WARNING)
    failed: list[object] = []

    def client(url: str) -> None:
        async def calls() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
            channel = TRANSPORT.connect(url, security=Security())
            for number in range(50):
                assert await ask(channel, "echo", {"n": number}) == [{"n": number}]
            await channel.close()

        try:
            asyncio.run(calls())
        except BaseException as error:  # noqa: BLE001 - a thread's error would be lost
            failed.append(error)

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        async with opened() as (_, _, listener):
            threads = [threading.Thread(target=client, args=(listener.url,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                await asyncio.to_thread(thread.join)

    run(scenario)
    assert failed == []
    assert caplog.records == []


def test_a_process_that_served_and_called_ends_without_a_word() -> None:
    code = """
import asyncio, threading
from avp.protocols import Meter
from avp.security import Security
from avp.testing.echo import EchoEndpoint, ask, sending
from avp.transports.grpc import TRANSPORT

loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
serving = TRANSPORT.serve(EchoEndpoint(), "grpc://127.0.0.1:0", security=Security())
listener = asyncio.run_coroutine_threadsafe(serving, loop).result()

async def main():
    channel = TRANSPORT.connect(listener.url, security=Security())
    assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
    async with channel.call("hang", sending(), meter=Meter()):
        pass
    {close}

for _ in range(3):
    asyncio.run(main())
{stop}
"""
    endings = [
        ("await channel.close()", "asyncio.run_coroutine_threadsafe(listener.close(), loop).result()"),
        ("pass", ""),
    ]
    for close, stop in endings:
        script = code.replace("{close}", close).replace("{stop}", stop)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_call_that_is_left_at_once_sends_nothing_more() -> None:
    async def scenario() -> None:
        given = 0

        async def many() -> AsyncIterator[Item]:
            nonlocal given
            while True:
                given += 1
                yield large_blob()

        async with opened() as (_, channel, _):
            async with channel.call("hang", many(), meter=Meter()):
                pass
            left = given
            assert await ask_with(channel, "echo", sending({"n": 1})) == [{"n": 1}]
            assert given == left

    run(scenario)
