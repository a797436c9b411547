"""A context that comes back: what travels, and what is found to be missing."""

from __future__ import annotations

import pytest

from avp.agent import Agent
from avp.blob import Blob
from avp.errors import SegmentMissing
from avp.protocols import Item
from avp.remote import AsyncRemote, Own
from avp.segment import Exactness

from .endpoint.peers import IDS, breaking, connector, positions, run, tapped
from .remote_tools import PROMPT, two_agents
from .samples import pages

agents = pytest.fixture(two_agents)


def test_a_context_is_fetched_and_only_what_is_not_here_travels(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents)
        handle = await remote.hand_over(context)
        said = await remote.stream(PROMPT, context=handle, max_new_tokens=6, min_new_tokens=6).result()
        back, done = await remote.receive(said.handle)
        assert done.bytes_reused == 288 * connector(0).identity.layout.bytes_per_token("float32")
        assert positions(channel.came) == len(back) - 288
        near = connector(0).generate(PROMPT, context=context, max_new_tokens=6, min_new_tokens=6)
        assert back.tokens == near.context.tokens
        assert pages(back) == pages(near.context)
        assert connector(0).generate([4], context=back, max_new_tokens=5).tokens == (
            connector(0).generate([4], context=near.context, max_new_tokens=5).tokens
        )

    context = connector(0).prefill(IDS)
    run(scenario())


def test_a_fetch_without_a_store_or_a_model_gives_the_context_as_it_is(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents)
        handle = await remote.hand_over(context)
        plain = AsyncRemote(channel, remote.url, own=Own())
        back, done = await plain.receive(str(handle))
        assert (back.tokens, done.bytes_reused, done.exactness) == (context.tokens, 0, Exactness.EXACT)
        assert pages(back) == pages(context)

    context = connector(0).prefill(IDS)
    run(scenario())


def test_a_fetch_that_breaks_goes_on_where_it_broke(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        handle = await tapped(*agents)[0].hand_over(context)
        with Agent(connector(2), name="c") as c:
            remote, channel = tapped(c, agents[1], back=breaking(1, 1))
            back, done = await remote.receive(handle)
            assert back.tokens == context.tokens
            assert positions(channel.came) == 700
            assert len([reason for reason in done.reasons if "tried again" in reason]) == 2
            plain, channel = tapped(c, agents[1], back=breaking(2))
            plain = AsyncRemote(channel, remote.url, own=Own())
            assert (await plain.fetch(handle)).tokens == context.tokens
            assert positions(channel.came) == 700

    context = connector(0).prefill([number % 190 for number in range(700)])
    run(scenario())


def test_a_far_end_that_leaves_segments_out_is_found_out(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        handle = await tapped(*agents)[0].hand_over(context)

        first: list[Blob] = []

        async def same(verb: str, item: Item) -> Item:
            if isinstance(item, Blob):
                first.append(item)
                return first[0]
            return item

        _, channel = tapped(*agents, back=same)
        remote = AsyncRemote(channel, "agent:b", own=Own())
        with pytest.raises(SegmentMissing, match="did not come"):
            await remote.fetch(handle)

    context = connector(0).prefill(IDS)
    run(scenario())
