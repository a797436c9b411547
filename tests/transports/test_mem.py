"""The transport within a process: what passes is the object itself, whichever loop and thread read it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from avp.blob import Blob
from avp.errors import ConnectionFailed, UsageError
from avp.protocols import Item, Meter, Transport
from avp.security import Security
from avp.testing.echo import EchoEndpoint, ask, ask_with, blobs_of, large_blob, sending
from avp.testing.synthetic import synthetic_context
from avp.testing.transport import TransportConformance
from avp.transports.mem import MemTransport


class TestMem(TransportConformance):
    moves_bytes = False
    memory = MemTransport(grace=1.0)

    def transport(self) -> Transport:
        return self.memory

    def address(self, tmp_path: Path) -> str:
        return f"mem:{tmp_path.name}"


def test_a_blob_arrives_as_the_same_object_and_nothing_is_counted() -> None:
    async def scenario() -> None:
        transport, meter = MemTransport(), Meter()
        listener = await transport.serve(EchoEndpoint(), "mem:a", security=Security())
        channel = transport.connect("mem:a", security=Security())
        blob, context = large_blob(), synthetic_context()
        back = await ask(channel, "echo", blob, context, meter=meter)
        assert back[0] is blob
        assert back[1] is context
        assert meter == Meter(0, 0)
        await listener.close()

    asyncio.run(scenario())


def test_an_event_arrives_as_json_would_bring_it() -> None:
    async def scenario() -> None:
        transport = MemTransport()
        listener = await transport.serve(EchoEndpoint(), "mem:a", security=Security())
        channel = transport.connect("mem:a", security=Security())
        event = {"n": (1, 2)}
        assert await ask(channel, "echo", event) == [{"n": [1, 2]}]
        with pytest.raises(UsageError, match="not JSON serializable"):
            await ask(channel, "echo", {"n": object()})
        await listener.close()

    asyncio.run(scenario())


def test_a_fault_of_the_callers_own_items_reaches_the_caller() -> None:
    async def broken() -> AsyncIterator[Item]:
        yield {"n": 1}
        raise ZeroDivisionError("mine")

    async def scenario() -> None:
        transport = MemTransport()
        listener = await transport.serve(EchoEndpoint(), "mem:a", security=Security())
        channel = transport.connect("mem:a", security=Security())
        with pytest.raises(ZeroDivisionError, match="mine"):
            await ask_with(channel, "echo", broken())
        await listener.close()

    asyncio.run(scenario())


def test_a_name_is_served_once_and_is_free_again_after_close() -> None:
    async def scenario() -> None:
        transport = MemTransport()
        first = await transport.serve(EchoEndpoint(), "mem:a", security=Security())
        with pytest.raises(UsageError, match=r"mem:a is being served already\. Fix:"):
            await transport.serve(EchoEndpoint(), "mem:a", security=Security())
        await first.close()
        second = await transport.serve(EchoEndpoint(), "mem:a", security=Security())
        await first.close()
        assert transport.find("a") is second
        await second.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("url", ["mem:", "mem:a/b", "mem://a", "http:a", "a"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"Fix: write mem:name"):
        MemTransport().connect(url, security=Security())


def test_a_server_whose_loop_has_ended_is_not_waited_for() -> None:
    transport = MemTransport()
    asyncio.run(_serve(transport))

    async def scenario() -> None:
        with pytest.raises(ConnectionFailed, match="has ended"):
            await ask(transport.connect("mem:a", security=Security()), "echo")

    asyncio.run(scenario())


async def _serve(transport: MemTransport) -> None:
    await transport.serve(EchoEndpoint(), "mem:a", security=Security())


def test_closing_a_channel_ends_its_calls() -> None:
    async def scenario() -> None:
        transport, endpoint = MemTransport(), EchoEndpoint()
        listener = await transport.serve(endpoint, "mem:a", security=Security())
        channel = transport.connect("mem:a", security=Security())
        async with channel.call("blobs", sending({"n": 1000}), meter=Meter()) as answer:
            await anext(answer)
            await channel.close()
            with pytest.raises(ConnectionFailed):
                [item async for item in answer]
        await listener.close()

    asyncio.run(scenario())


def test_many_callers_in_threads_and_loops_of_their_own_are_answered() -> None:
    transport = MemTransport()
    blobs = blobs_of(synthetic_context(tokens=2000))

    async def caller(number: int) -> None:
        channel = transport.connect("mem:a", security=Security())
        for _ in range(20):
            assert await ask(channel, "echo", {"n": number}, *blobs) == [{"n": number}, *blobs]

    async def serve() -> None:
        listener = await transport.serve(EchoEndpoint(), "mem:a", security=Security())
        await asyncio.gather(*(asyncio.to_thread(asyncio.run, caller(number)) for number in range(4)))
        await listener.close()

    asyncio.run(serve())


def test_what_was_passed_is_not_kept() -> None:
    async def scenario() -> None:
        transport = MemTransport()
        listener = await transport.serve(EchoEndpoint(), "mem:a", security=Security())
        channel = transport.connect("mem:a", security=Security())
        before = [each for each in gc.get_objects() if type(each) is Blob]  # what other tests keep
        await ask(channel, "count", *(large_blob() for _ in range(3)))
        gc.collect()
        assert len([each for each in gc.get_objects() if type(each) is Blob]) <= len(before)
        await listener.close()

    asyncio.run(scenario())
