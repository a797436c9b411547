"""Hand-over when something goes wrong: cut cables, flipped bytes, no room, pages that are dropped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from avp.agent import Agent
from avp.blob import Blob, open_blob
from avp.context import Context
from avp.errors import Busy, ConnectionFailed, ContextTooLong, DigestMismatch, HandleExpired, NoAgreement
from avp.manifest import Limits
from avp.protocols import Item
from avp.security import Tenant
from avp.segment import Exactness
from avp.session import Quota
from avp.stores.memory import MemoryStore
from avp.testing import synthetic_context

from .endpoint.peers import IDS, breaking, connector, positions, run, tapped
from .remote_tools import PROMPT, stored, text_of, two_agents

agents = pytest.fixture(two_agents)


@pytest.mark.parametrize("counts", [(0,), (1,), (2, 0), (0, 1, 0)])
def test_a_connection_that_breaks_goes_on_at_the_first_missing_segment(
    agents: tuple[Agent, Agent], counts: tuple[int, ...]
) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents, there=breaking(*counts))
        handle = await remote.hand_over(context)
        assert len(handle) == 700
        assert positions(channel.sent) == 700  # nothing twice
        assert handle.receipt is not None
        again = [reason for reason in handle.receipt.reasons if reason == "tried again: the cable of receive was cut"]
        assert len(again) == len(counts)
        assert channel.verbs.count("have") == len(counts) + 1
        assert stored(agents[1]) == [(0, 256), (256, 256), (512, 188)]
        assert agents[1].endpoint.desk.handles.memory() == context.nbytes  # no room stays reserved
        assert await text_of(remote, PROMPT, handle) == near.tokens

    context = connector(0).prefill([number % 190 for number in range(700)])
    near = connector(0).generate(PROMPT, context=context, max_new_tokens=6)
    run(scenario())


def test_a_pipelined_hand_over_that_breaks_is_finished_all_the_same(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents, there=breaking(1, 0))
        handle = await remote.hand_over(ids)
        assert (len(handle), positions(channel.sent)) == (700, 700)
        assert handle.receipt is not None
        assert sum("tried again" in reason for reason in handle.receipt.reasons) == 2
        assert await text_of(remote, PROMPT, handle) == near.tokens

    ids = [number % 190 for number in range(700)]
    near = connector(0).generate(PROMPT, context=connector(0).prefill(ids), max_new_tokens=6)
    run(scenario())


def test_a_connection_that_stays_broken_is_given_up_and_whole_segments_are_kept(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents, there=breaking(1, 0, 0, 0, 0, 0))
        with pytest.raises(ConnectionFailed, match="the cable of receive was cut"):
            await remote.hand_over(context)
        assert channel.verbs.count("have") == 5
        assert stored(agents[1]) == [(0, 256)]
        assert len(agents[1].endpoint.desk.handles) == 0
        assert agents[1].endpoint.desk.handles.memory() == 0  # no room stays reserved

    context = connector(0).prefill(IDS)
    run(scenario())


def test_a_flipped_byte_is_found_and_nothing_of_that_segment_is_kept(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        async def flip(verb: str, item: Item) -> Item:
            if not isinstance(item, Blob) or item.segment.start == 0:
                return item
            data = bytearray(b"".join(item.runs))
            data[-1] ^= 1
            return open_blob(data, limits=Limits())

        remote, _ = tapped(*agents, there=flip)
        with pytest.raises(DigestMismatch, match="Nothing of them was used"):
            await remote.hand_over(context)
        assert stored(agents[1]) == [(0, 256)]
        handles = agents[1].endpoint.desk.handles
        assert (len(handles), handles.memory()) == (0, 0)
        kept = await tapped(*agents)[0].hand_over(context)
        with Agent(connector(2), name="c") as c:
            remote, _ = tapped(c, agents[1], back=flip)
            with pytest.raises(DigestMismatch):
                await remote.fetch(kept)
            assert stored(c) == [(0, 256)]

    context = connector(0).prefill(IDS)
    run(scenario())


def test_a_receiver_without_room_says_busy_and_when_to_come_again(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        with Agent(connector(1), name="small", quota=Quota(memory=context.nbytes + 100)) as small:
            remote, channel = tapped(agents[0], small)
            handle = await remote.hand_over(context)
            with small.endpoint.desk.handles.use(str(handle), Tenant()), pytest.raises(Busy) as caught:
                await remote.hand_over(other)
            assert caught.value.retry_after == 1.0
            assert channel.verbs.count("receive") == 1
            await remote.hand_over(other)  # now that nobody uses it, the first makes room
            with pytest.raises(HandleExpired):
                await remote.renew(handle)

    context, other = connector(0).prefill(IDS), connector(0).prefill(IDS[1:])
    run(scenario())


def test_what_the_store_drops_between_asking_and_assembling_is_sent_again(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        a, b = agents
        remote, _ = tapped(a, b)
        await remote.hand_over(context[:256])
        dropped: list[int] = []

        async def there(verb: str, item: Item) -> Item:
            if verb == "receive" and not dropped:
                dropped.append(b.store.remove(context.segments[0].pages[3], tenant=""))
            return item

        remote, channel = tapped(a, b, there=there)
        handle = await remote.hand_over(context)
        assert dropped == [1]
        assert (len(handle), positions(channel.sent)) == (300, 300)
        assert handle.receipt is not None
        assert any("the store dropped pages" in reason for reason in handle.receipt.reasons)

    context = connector(0).prefill(IDS)
    run(scenario())


def test_a_store_that_cannot_hold_the_context_still_takes_what_came_whole() -> None:
    async def scenario() -> None:
        with Agent(connector(0), name="a") as a, Agent(connector(1), name="b", store=MemoryStore(1 << 19)) as b:
            remote, channel = tapped(a, b)
            handle = await remote.hand_over(context)
            assert (len(handle), positions(channel.sent)) == (700, 700)
            assert len(stored(b)) < 3

    context = connector(0).prefill([number % 190 for number in range(700)])
    run(scenario())


def test_what_is_too_long_for_the_far_model_is_refused_before_anything_travels(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents)
        with pytest.raises(ContextTooLong, match="Nothing was sent"):
            await remote.hand_over(long)
        ids = Context("tokens", long.model, (5,) * (2**20 + 1), exactness=Exactness.TEXT)
        with pytest.raises(NoAgreement, match="tokens are more than the 1048576"):
            await remote.hand_over(ids, accept="text")
        assert "receive" not in channel.verbs

    made = synthetic_context(layers=4, kv_heads=2, head_dim=16, tokens=1100, dtype="float32")
    segments = tuple(replace(segment, engine=connector(0).engine) for segment in made.segments)
    long = replace(made, model=connector(0).identity, segments=segments)
    run(scenario())
