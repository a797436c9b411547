"""Hand-over at a distance: what travels, what a handle stands for, many at once."""

from __future__ import annotations

import asyncio
import threading

import pytest

from avp.agent import Agent
from avp.blob import Blob
from avp.errors import NoAgreement
from avp.protocols import Item
from avp.security import Tenant
from avp.segment import PAGE, Exactness
from avp.telemetry import Span, Trace, listening

from .endpoint.peers import IDS, connector, foreign, positions, run, tapped
from .remote_tools import PROMPT, stored, text_of, two_agents

agents = pytest.fixture(two_agents)


# --- what is handed over


def test_what_a_handle_stands_for_continues_token_for_token_as_the_sender_would(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents)
        handle = await remote.hand_over(context)
        assert (len(handle), handle.exactness, handle.url) == (300, Exactness.EXACT, agents[1].url)
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


def test_a_prompt_whose_kv_is_there_already_is_not_computed_again(agents: tuple[Agent, Agent]) -> None:
    async def scenario() -> None:
        remote, channel = tapped(*agents)
        await remote.hand_over(ids)
        trace = Trace()
        with listening(trace):
            handle = await remote.hand_over(ids)
        assert positions(channel.sent) == 100
        assert [span for span in trace.spans if span.name == "compute"] == []
        assert handle.receipt is not None
        assert (handle.receipt.tokens_reused, len(handle)) == (100, 100)
        assert await text_of(remote, PROMPT, handle) == near.tokens

    ids = [number % 190 for number in range(100)]
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
