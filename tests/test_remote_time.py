"""Sessions, handles and calls over time: what ends, what is opened again, what is timed out or left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from avp.agent import Agent
from avp.errors import Busy, HandleExpired, TimedOut
from avp.protocols import Item
from avp.session import Handles, Quota

from .endpoint.peers import IDS, connector, run, tapped
from .remote_tools import PROMPT, text_of, two_agents

agents = pytest.fixture(two_agents)


# --- sessions and handles over time


def test_a_session_that_is_over_is_opened_again_without_a_word(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        now = 0.0
        agents[1].endpoint.desk.handles = Handles(Quota(ttl=10), clock=lambda: now)
        remote, channel = tapped(*agents)
        handle = await remote.hand_over(context)
        await remote.fetch(handle)
        assert channel.verbs.count("hello") == 2  # as a sender, and as a receiver
        now = 20.0
        handle = await remote.hand_over(context)
        assert (await remote.fetch(handle)).tokens == context.tokens
        assert channel.verbs.count("hello") == 4
        now = 40.0
        with pytest.raises(HandleExpired, match="the handle is not known here"):
            await remote.fetch(handle)

    context = connector(0).prefill(IDS[:40])
    run(scenario())


def test_generating_again_and_again_does_not_use_the_sessions_up(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        with Agent(connector(1), name="b", quota=Quota(sessions=2)) as b:
            remote, _ = tapped(agents[0], b)
            for _ in range(5):
                await text_of(remote, PROMPT, None, count=1)

    run(scenario())


def test_a_measured_bandwidth_that_varies_does_not_open_a_session_each_time(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents)
        assert await remote.measure() > 0
        for bandwidth in (1.011e9, 1.02e9, 0.99e9):
            remote.bandwidth = bandwidth
            handle = await remote.hand_over(context, policy="fastest")
            assert handle.receipt is not None
            assert handle.receipt.reasons[-1].startswith("fastest: kv in ")
        assert channel.verbs.count("hello") == 1

    context = connector(0).prefill(IDS[:40])
    run(scenario())


def test_a_handle_is_renewed_and_revoked_from_afar(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, _ = tapped(*agents)
        handle = await remote.hand_over(context)
        assert await remote.renew(handle) == Quota().ttl
        await remote.revoke(handle)
        for call in (remote.renew, remote.revoke, remote.fetch):
            with pytest.raises(HandleExpired):
                await call(str(handle))
        with pytest.raises(HandleExpired):
            await text_of(remote, PROMPT, handle)

    context = connector(0).prefill(IDS[:40])
    run(scenario())


# --- time and cancellation


@pytest.mark.parametrize("verb", ["hello", "have", "receive", "fetch"])
def test_a_far_end_that_does_not_answer_is_timed_out(agents: tuple[Agent, Agent], verb: str) -> None:
    async def scenario() -> None:
        async def silent(called: str, item: Item) -> Item:
            if called == verb:
                await asyncio.Event().wait()
            return item

        handle = await tapped(*agents)[0].hand_over(context[:32])
        remote, channel = tapped(*agents, back=silent)
        work = remote.fetch(handle, timeout=1) if verb == "fetch" else remote.hand_over(context, timeout=1)
        with pytest.raises(TimedOut, match=r"took longer than 1 s"):
            await work
        assert channel.verbs.count(verb) == 1  # it is not tried again behind the caller's back

    context = connector(0).prefill(IDS)
    run(scenario())


@pytest.fixture
def passes() -> Iterator[list[object]]:
    """Forward passes of the far model."""
    seen: list[object] = []
    hook = connector(1).model.base_model.register_forward_pre_hook(lambda *_: seen.append(None))
    yield seen
    hook.remove()


def test_a_generation_that_takes_too_long_is_ended_there_too(agents: tuple[Agent, Agent], passes: list[object]) -> None:
    async def scenario() -> None:
        async def silent(called: str, item: Item) -> Item:
            await asyncio.Event().wait()
            return item

        with Agent(connector(1), name="one", quota=Quota(running=1)) as one:
            remote, _ = tapped(agents[0], one, back=silent)
            with pytest.raises(TimedOut, match="the generation took longer"):
                await remote.stream(PROMPT, max_new_tokens=900, min_new_tokens=900, timeout=0.2).result()
            await text_of(tapped(agents[0], one)[0], PROMPT, None, count=2)  # the one thread is free again

    run(scenario())
    assert len(passes) < 900


def test_a_reader_that_leaves_ends_the_run(agents: tuple[Agent, Agent], passes: list[object]) -> None:
    async def scenario() -> None:
        with Agent(connector(1), name="one", quota=Quota(running=1, waiting=0)) as one:
            remote, _ = tapped(agents[0], one)
            stream = remote.stream(PROMPT, max_new_tokens=900, min_new_tokens=900)
            assert await anext(aiter(stream))
            with pytest.raises(Busy, match="under way or waiting"):
                await text_of(remote, PROMPT, None)
            await stream.aclose()
            await text_of(remote, PROMPT, None, count=2)

    run(scenario())
    assert len(passes) < 900


def test_a_timeout_is_not_raised_into_what_the_reader_does_between_two_pieces(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        remote, _ = tapped(*agents)
        stream = remote.stream(PROMPT, max_new_tokens=900, min_new_tokens=900, timeout=1)
        await anext(aiter(stream))
        own = loop.create_future()
        loop.call_later(1.2, own.set_result, "done")
        assert await own == "done"  # the reader's own time is not cancelled
        with pytest.raises(TimedOut):
            await stream.result()

    run(scenario())


def test_a_piece_that_each_its_own_task_waits_for_is_timed_out_too(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        async def silent(called: str, item: Item) -> Item:
            if seen:
                await asyncio.Event().wait()
            seen.append(item)
            return item

        async def next_piece() -> str:
            return await anext(aiter(stream))

        seen: list[Item] = []
        remote, _ = tapped(*agents, back=silent)
        stream = remote.stream(PROMPT, max_new_tokens=50, min_new_tokens=50, timeout=1)
        await asyncio.create_task(next_piece())
        with pytest.raises(TimedOut):
            await asyncio.create_task(next_piece())

    run(scenario())
