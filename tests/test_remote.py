"""Hand-over, fetch and generation at a distance: what travels, what is kept, what happens when it breaks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from avp.agent import Agent
from avp.blob import Blob, open_blob
from avp.context import Context
from avp.errors import (
    Busy,
    ConnectionFailed,
    ContextTooLong,
    DigestMismatch,
    HandleExpired,
    NoAgreement,
    SegmentMissing,
    TimedOut,
    UsageError,
)
from avp.handle import Handle
from avp.manifest import Limits
from avp.protocols import Item
from avp.remote import AsyncRemote, Own
from avp.security import Tenant
from avp.segment import PAGE, Exactness
from avp.session import Handles, Quota
from avp.stores.memory import MemoryStore
from avp.telemetry import Span, Trace, listening
from avp.testing import synthetic_context

from .endpoint.peers import IDS, breaking, connector, foreign, positions, run, tapped
from .samples import pages

PROMPT = [9, 8, 7]


@pytest.fixture
def agents() -> Iterator[tuple[Agent, Agent]]:
    with Agent(connector(0), name="a") as a, Agent(connector(1), name="b") as b:
        yield a, b


def stored(agent: Agent) -> list[tuple[int, int]]:
    return sorted((entry.start, entry.count) for entry in agent.store.entries())


async def text_of(
    remote: AsyncRemote, prompt: Sequence[int], handle: Handle | Context | None, count: int = 6
) -> tuple[int, ...]:
    return (await remote.stream(list(prompt), context=handle, max_new_tokens=count).result()).tokens


# --- what is handed over


def test_what_a_handle_stands_for_continues_token_for_token_as_the_sender_would(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents)
        handle = await remote.hand_over(context)
        assert (len(handle), handle.exactness, handle.url) == (300, Exactness.EXACT, "agent:b")
        done = handle.receipt
        assert done is not None
        assert (done.mode, done.exactness, done.tokens_reused, done.bytes_reused) == ("kv", Exactness.EXACT, 300, 0)
        assert positions(channel.sent) == 300
        far = await remote.stream(PROMPT, context=handle, max_new_tokens=6).result()
        assert far.tokens == near.tokens
        assert far == str(near)
        assert far.receipt.tokens_reused == 300
        assert far.receipt.positions_computed == near.receipt.positions_computed == 3 + 5
        assert len(far.handle) == len(near.context) == 308

    context = connector(0).prefill(IDS)
    near = connector(0).generate(PROMPT, context=context, max_new_tokens=6)
    run(scenario())


def test_what_is_there_already_does_not_travel_again(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents)
        first, again = await remote.hand_over(context), await remote.hand_over(context)
        assert positions(channel.sent) == 300
        assert str(first) != str(again)
        assert again.receipt is not None
        assert again.receipt.bytes_reused == context.nbytes
        assert channel.verbs.count("hello") == 1

    context = connector(0).prefill(IDS)
    run(scenario())


def test_other_weights_are_refused_unless_both_accept_text_and_the_receipt_says_so() -> None:
    async def scenario() -> None:
        with Agent(connector(0), name="a") as a, Agent(connector(seed=1), name="b", accept="text") as b:
            remote, channel = tapped(a, b)
            with pytest.raises(NoAgreement, match="kv: other weights"):
                await remote.hand_over(context)
            assert channel.verbs == ["hello"]
            handle = await remote.hand_over(context, accept="text")
            assert handle.receipt is not None
            assert (handle.receipt.mode, handle.receipt.exactness) == ("tokens", Exactness.TEXT)
            assert (len(handle), handle.receipt.tokens_reused) == (0, 0)
            assert "other weights" in handle.receipt.reasons[0]
            assert not channel.sent
            far = await remote.stream(PROMPT, context=handle, max_new_tokens=5).result()
            assert far.tokens == connector(seed=1).generate([*IDS, *PROMPT], max_new_tokens=5).tokens
            assert far.receipt.mode != "kv"

    context = connector(0).prefill(IDS)
    run(scenario())


def test_another_tokenizer_leaves_the_text() -> None:
    async def scenario() -> None:
        with Agent(connector(0), name="a", accept="text") as a, Agent(foreign(), name="c", accept="text") as c:
            remote, _ = tapped(a, c)
            handle = await remote.hand_over(connector(0).prefill("Plan the work."))
            assert handle.receipt is not None
            assert (handle.receipt.mode, handle.exactness) == ("text", Exactness.TEXT)
            assert any("other tokenizers" in reason for reason in handle.receipt.reasons)
            far = await remote.stream("Now.", context=handle, max_new_tokens=5).result()
            near = foreign().generate(
                [{"role": "user", "content": "Plan the work."}, {"role": "user", "content": "Now."}], max_new_tokens=5
            )
            assert far.tokens == near.tokens
            with pytest.raises(NoAgreement, match=r"text: a does not send it"):
                await remote.hand_over(connector(0).prefill(IDS))  # ids that no text stands for

    run(scenario())


def test_a_sender_that_accepts_less_than_the_receiver_is_still_refused(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        with Agent(connector(seed=1), name="strict") as strict:
            remote, _ = tapped(agents[0], strict)
            with pytest.raises(NoAgreement, match="strict accepts exact"):
                await remote.hand_over(connector(0).prefill(IDS[:40]), accept="text")

    run(scenario())


def test_latent_steps_are_handed_over_and_go_on_as_they_would_here(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents)
        handle = await remote.hand_over(thought)
        assert (len(handle), handle.exactness) == (len(thought), Exactness.APPROXIMATE)
        assert handle.receipt is not None
        assert handle.receipt.exactness is Exactness.APPROXIMATE
        assert await text_of(remote, [], handle) == near.tokens
        again = await remote.hand_over(thought)
        assert positions(channel.sent) == len(thought)
        assert again.receipt is not None
        assert again.receipt.bytes_reused == thought.nbytes

    thought = connector(0).think("Plan the work.", steps=40)
    near = connector(0).generate([], context=thought, max_new_tokens=6)
    run(scenario())


def test_a_context_with_pending_tokens_goes_on_with_them(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, _ = tapped(*agents)
        handle = await remote.hand_over(spoken.context)
        assert len(handle) == len(spoken.context) == len(spoken.context.tokens) - 1
        assert await text_of(remote, PROMPT, handle) == near.tokens

    spoken = connector(0).generate(IDS[:50], max_new_tokens=5)
    near = connector(0).generate(PROMPT, context=spoken.context, max_new_tokens=6)
    run(scenario())


def test_a_prompt_that_is_handed_over_while_it_is_computed_is_the_prefilled_context(
    agents: tuple[Agent, Agent],
) -> None:
    async def scenario() -> None:
        loop, computed = asyncio.get_running_loop(), asyncio.Semaphore(0)
        trace, underway = Trace(), [threading.Event() for _ in range(3)]
        ended, forwards = 0, iter([None, *underway])

        def hold(*_: object) -> None:  # a segment is not computed before the one before it is on its way
            event = next(forwards)
            assert event is None or event.wait(30)

        def listen(done: Span) -> None:
            trace(done)
            if done.name == "compute":
                loop.call_soon_threadsafe(computed.release)

        async def there(verb: str, item: Item) -> Item:  # and stays on its way until that one is computed
            nonlocal ended
            if isinstance(item, Blob):
                number = item.segment.start // 256
                underway[number].set()
                while ended < number + 2:
                    await asyncio.wait_for(computed.acquire(), 30)
                    ended += 1
            return item

        remote, channel = tapped(*agents, there=there)
        held = connector(0).model.base_model.register_forward_pre_hook(hold)
        with listening(listen):
            handle = await remote.hand_over(ids)
        held.remove()
        assert (len(handle), positions(channel.sent), len(channel.sent)) == (700, 700, 3)
        assert handle.receipt is not None
        assert handle.receipt.mode == "kv"
        sends = [span for span in trace.spans if span.name == "send"]
        for number, send in enumerate(sends[:-1]):
            following = [s for s in trace.spans if s.name == "compute" and s.attributes["start"] == 256 * (number + 1)]
            assert send.attributes["start"] == 256 * number
            assert send.overlaps(following[0])
        assert await text_of(remote, PROMPT, handle) == near.tokens
        assert len(stored(agents[0])) == 3  # kept here too, so that it need not come back

    ids = [number % 190 for number in range(700)]
    near = connector(0).generate(PROMPT, context=connector(0).prefill(ids), max_new_tokens=6)
    run(scenario())


# --- many at once


def test_many_may_go_on_from_one_handle_at_once(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, _ = tapped(*agents)
        handle = await remote.hand_over(context)
        prompts = [[number, 8, 7] for number in range(3, 11)]
        far = await asyncio.gather(*(text_of(remote, prompt, handle) for prompt in prompts))
        assert list(far) == [connector(0).generate(p, context=context, max_new_tokens=6).tokens for p in prompts]

    context = connector(0).prefill(IDS)
    run(scenario())


def test_two_senders_of_the_same_segments_at_once_both_get_a_handle(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        a, b = agents
        with Agent(connector(2), name="c") as c:
            one, two = tapped(a, b)[0], tapped(c, b)[0]
            handles = await asyncio.gather(*(r.hand_over(context) for r in (one, two, one, two)))
            assert len({str(handle) for handle in handles}) == 4
            assert b.endpoint.desk.handles.memory() == context.nbytes  # shared, and nothing stays reserved
            assert stored(b) == [(0, 256), (256, 44)]
            assert len({await text_of(two, PROMPT, handle) for handle in handles}) == 1

    context = connector(0).prefill(IDS)
    run(scenario())


def test_over_sixteen_hops_only_new_tokens_travel_and_every_token_is_as_in_one_engine(
    agents: tuple[Agent, Agent],
) -> None:
    async def scenario() -> None:
        context = agents[0].prefill(IDS[:200])
        alone = connector(2).prefill(IDS[:200])
        before = 0
        for hop in range(16):
            own, other = agents[hop % 2], agents[1 - hop % 2]
            remote, channel = tapped(own, other)
            handle = await remote.hand_over(context)
            new = len(context) - before
            assert new <= positions(channel.sent) < new + PAGE
            headers = sum(len(blob.header) for blob in channel.sent)
            assert sum(blob.nbytes for blob in channel.sent) - headers < (new + PAGE) * each
            before = len(context)
            with other.endpoint.desk.handles.use(str(handle), Tenant()) as there:
                said = other.generate([hop + 3, 4, 5], context=there, max_new_tokens=7, min_new_tokens=7)
            engine = connector(2).generate([hop + 3, 4, 5], context=alone, max_new_tokens=7, min_new_tokens=7)
            assert said.tokens == engine.tokens
            assert said.receipt.positions_computed <= 3 + 7 + 1
            context, alone = said.context, engine.context

    each = connector(0).identity.layout.bytes_per_token("float32")
    run(scenario())


# --- what comes back


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


# --- what goes wrong


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


# --- what is said wrongly


def test_a_call_that_cannot_be_carried_out_is_a_usage_error(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents)
        for wrong in ({"accept": "perfect"}, {"codec": "zip"}, {"policy": "worst"}):
            with pytest.raises(UsageError):
                await remote.hand_over(context, **wrong)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="only by an agent that has a model"):
            await AsyncRemote(channel, "agent:b").hand_over([1, 2, 3])

    context = connector(0).prefill(IDS[:40])
    run(scenario())


GOOD = {"handle": "x", "length": 1, "ttl": 1.0, "exactness": "exact"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"handle": 5},
        {"length": -1},
        {"length": True},
        {"length": 2**40},
        {"ttl": 10**400},
        {"ttl": None},
        {"ttl": -1},
        {"exactness": "splendid"},
    ],
    ids=lambda wrong: str(wrong)[:24],
)
def test_an_answer_without_a_proper_handle_is_an_error(agents: tuple[Agent, Agent], wrong: dict[str, object]) -> None:
    async def scenario() -> None:
        async def back(verb: str, item: Item) -> Item:
            return {**GOOD, **wrong} if verb == "receive" else item

        remote, _ = tapped(*agents, back=back)
        with pytest.raises((ConnectionFailed, UsageError)):
            await remote.hand_over(context)

    context = connector(0).prefill(IDS[:40])
    run(scenario())


@pytest.mark.parametrize(
    "change", [{"session": None}, {"salt": "zz"}, {"salt": "abc"}, {"salt": 5}, {"hello": None}], ids=str
)
def test_an_answer_to_the_handshake_that_makes_no_sense_is_an_error(
    agents: tuple[Agent, Agent], change: dict[str, object]
) -> None:
    async def scenario() -> None:
        async def back(verb: str, item: Item) -> Item:
            assert not isinstance(item, Blob | Context)
            return {**item, **change}

        remote, _ = tapped(*agents, back=back)
        with pytest.raises((ConnectionFailed, UsageError)):
            await remote.hand_over(connector(0).prefill(IDS[:40]))

    run(scenario())


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("tokens", None),
        ("tokens", [1.5]),
        ("usage", None),
        ("usage", {"prompt_tokens": 1}),
        ("receipt", []),
        ("receipt", {"mode": "kv"}),
    ],
    ids=str,
)
def test_a_result_that_lacks_something_is_a_failed_connection(
    agents: tuple[Agent, Agent], part: str, wrong: object
) -> None:
    async def scenario() -> None:
        async def back(verb: str, item: Item) -> Item:
            if isinstance(item, Blob | Context) or "result" not in item:
                return item
            result = item["result"]
            assert isinstance(result, dict)
            return {**item, "result": {**result, part: wrong}}

        remote, _ = tapped(*agents, back=back)
        with pytest.raises(ConnectionFailed, match="a result came"):
            await remote.stream(PROMPT, max_new_tokens=1).result()

    run(scenario())


def test_a_figure_that_no_float_holds_is_a_failed_connection(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        async def back(verb: str, item: Item) -> Item:
            if isinstance(item, Blob | Context) or "result" not in item:
                return item
            result = item["result"]
            assert isinstance(result, dict)
            receipt = {**result["receipt"], "seconds": {"ttft": 10**400}}
            return {**item, "result": {**result, "receipt": receipt}}

        remote, _ = tapped(*agents, back=back)
        with pytest.raises(ConnectionFailed):
            await remote.stream(PROMPT, max_new_tokens=1).result()

    run(scenario())


def test_a_stream_that_was_ended_has_no_result(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, _ = tapped(*agents)
        stream = remote.stream(PROMPT, max_new_tokens=5)
        await stream.aclose()
        with pytest.raises(ConnectionFailed, match="without a result"):
            await stream.result()

    run(scenario())
