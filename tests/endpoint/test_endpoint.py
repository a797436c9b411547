"""What an endpoint answers to callers who know the verbs and not the rules."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp.agent import Agent
from avp.blob import seal
from avp.context import Context, text_context
from avp.delta import outline, outline_to_items
from avp.errors import AccessDenied, AVPError, BundleError, HandleExpired, LimitExceeded, TimedOut, UsageError
from avp.protocols import Item
from avp.security import Caller, Security, Tenant
from avp.segment import Want
from avp.session import Quota
from avp.testing import synthetic_context
from avp.wire import Decoder

from .callers import ANNA, BERT, announce, ask, event_of, hello_of, shake
from .peers import IDS, connector, positions, run, tapped


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent(connector(1), name="b") as made:
        yield made


# --- hand-over, by hand


def test_a_hand_over_is_announced_and_received_once(agent: Agent) -> None:
    async def scenario() -> None:
        reply, blobs = await announce(agent, context)
        assert reply["missing"] == [[0, 10]]
        assert agent.endpoint.desk.handles.memory() == context.nbytes  # room is kept for what is to come
        kept = await event_of(agent, "receive", {"transfer": reply["transfer"]}, *blobs)
        assert kept["length"] == 300
        with agent.endpoint.desk.handles.use(str(kept["handle"]), Tenant()) as there:
            assert there.tokens == context.tokens
        with pytest.raises(HandleExpired, match="nothing is announced"):
            await ask(agent, "receive", {"transfer": reply["transfer"]}, *blobs)

    context = connector(0).prefill(IDS)
    run(scenario())


@pytest.mark.parametrize("case", ["strange", "twice", "short", "context", "event"])
def test_what_was_not_announced_or_came_twice_or_not_at_all_gives_no_handle(agent: Agent, case: str) -> None:
    async def scenario() -> None:
        strange = (await announce(agent, connector(0).prefill(IDS[1:])))[1]
        reply, blobs = await announce(agent, context)
        items: dict[str, tuple[str, list[Item]]] = {
            "strange": ("none of this context", [strange[0]]),
            "twice": ("a segment came that was not missing", [blobs[0], blobs[0], *blobs]),
            "short": ("did not come", [blobs[0]]),
            "context": ("a Context came where a segment was due", [text_context("a")]),
            "event": ("came where a segment was due", [{}]),
        }
        why, sent = items[case]
        with pytest.raises(BundleError, match=why):
            await ask(agent, "receive", {"transfer": reply["transfer"]}, *sent)
        assert len(agent.endpoint.desk.handles) == 0
        assert agent.endpoint.desk.handles.memory() == 299 * context.nbytes // 300  # only the strange one's room

    context = connector(0).prefill(IDS)
    run(scenario())


def test_a_caller_cannot_replace_a_page_that_is_here(agent: Agent) -> None:
    async def scenario() -> None:
        reply, blobs = await announce(agent, context)
        await ask(agent, "receive", {"transfer": reply["transfer"]}, *blobs)
        reply, more = await announce(agent, longer)
        assert reply["missing"] == [[8, 10]]
        forged = replace(connector(seed=1).prefill(IDS).segments[0], engine=blobs[0].segment.engine)
        assert context.model is not None
        false = seal(context.model, replace(forged, pages=blobs[0].segment.pages, parent=blobs[0].segment.parent))
        with pytest.raises(BundleError, match="was not missing"):
            await ask(agent, "receive", {"transfer": reply["transfer"]}, false, *more)
        want = Want(context.segments[0].engine, context.segments[0].dtype)
        kept = agent.store.get(false.segment.pages[0], tenant="", want=want).segment
        assert kept.read(0, "k").tobytes() == context.segments[0].read(0, "k").tobytes()

    context, longer = connector(0).prefill(IDS[:256]), connector(0).prefill(IDS)
    run(scenario())


def test_room_that_was_reserved_for_what_never_comes_is_given_back(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        for _ in range(3):
            await announce(agent, context)
        assert agent.endpoint.desk.handles.memory() == 3 * context.nbytes
        monkeypatch.setattr("avp.endpoint.receiving._PATIENCE", -1.0)
        late = await announce(agent, context)
        monkeypatch.undo()
        await announce(agent, context)
        assert agent.endpoint.desk.handles.memory() == 4 * context.nbytes
        with pytest.raises(HandleExpired, match="or no longer"):
            await ask(agent, "receive", {"transfer": late[0]["transfer"]}, *late[1])

    context = connector(0).prefill(IDS[:64])
    run(scenario())


def test_a_segment_that_does_not_come_in_time_ends_the_hand_over_and_frees_its_room(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        reply, blobs = await announce(agent, context)
        assert agent.endpoint.desk.handles.memory() == context.nbytes

        async def stalls() -> AsyncIterator[Item]:
            yield {"transfer": reply["transfer"]}
            yield blobs[0]
            await asyncio.Event().wait()

        answer = agent.endpoint.answer("receive", stalls(), caller=Caller())
        with pytest.raises(TimedOut, match="no whole event or segment came within"):
            await anext(answer)
        assert agent.endpoint.desk.handles.memory() == 0
        assert "receive by tenant '' at in-process was refused: TimedOut" in caplog.text

    context = connector(0).prefill(IDS)
    monkeypatch.setattr("avp.endpoint.receiving._PATIENCE", 0.1)
    run(scenario())


def test_a_segment_larger_than_all_that_is_kept_is_refused_by_its_header() -> None:
    large = synthetic_context(layers=1, kv_heads=8, tokens=256, head_dim=2048, dtype="float32")
    assert large.model is not None
    head = bytes(seal(large.model, large.segments[0]).header)
    with Agent(name="small", quota=Quota(memory=1 << 24)) as small, Agent(name="large") as other:
        with pytest.raises(LimitExceeded, match=r"Limits\.bytes"):
            list(Decoder(small.endpoint.limits).feed(b"B" + head))
        assert list(Decoder(other.endpoint.limits).feed(b"B" + head)) == []  # its tensors are awaited


def test_another_kind_or_other_weights_than_were_agreed_are_refused(agent: Agent) -> None:
    async def scenario() -> None:
        event = await shake(agent, hello_of(context))
        given, _ = outline(context, "kv", salt=b"")
        skeleton = given.skeleton
        other = connector(seed=1).prefill(IDS)
        wrong = [
            ("kind text came where kv", text_context("a")),
            ("kind tokens came where kv", replace(skeleton, kind="tokens", length=0)),
            ("other weights", replace(skeleton, model=other.model)),
        ]
        for why, came in wrong:
            about, _ = outline_to_items(replace(given, skeleton=came))
            with pytest.raises(BundleError, match=why):
                await ask(agent, "have", {**about, "session": event["session"]}, came)

    context = connector(0).prefill(IDS)
    run(scenario())


# --- tenants


def test_two_tenants_share_nothing(agent: Agent) -> None:
    async def scenario() -> None:
        anna, bert = Caller(ANNA), Caller(BERT)
        reply, blobs = await announce(agent, context, caller=anna)
        with pytest.raises(HandleExpired):
            await ask(agent, "receive", {"transfer": reply["transfer"]}, *blobs, caller=bert)
        kept = await event_of(agent, "receive", {"transfer": reply["transfer"]}, *blobs, caller=anna)
        assert (await announce(agent, context, caller=anna))[0]["missing"] == []
        assert (await announce(agent, context, caller=bert))[0]["missing"] == [[0, 10]]
        for verb in ("renew", "revoke", "generate"):
            with pytest.raises(HandleExpired):
                await ask(agent, verb, {"handle": kept["handle"], "prompt": "hi"}, caller=bert)
        session = (await shake(agent, hello_of(context), bert))["session"]
        for caller in (anna, bert):  # a session of the one, a handle of the other
            with pytest.raises(HandleExpired):
                await ask(agent, "fetch", {"session": session, "handle": kept["handle"]}, caller=caller)

    context = connector(0).prefill(IDS)
    run(scenario())


def test_agents_of_one_tenant_find_each_others_handles_and_pages() -> None:
    async def scenario() -> None:
        with Agent(connector(0), name="a", tenant=ANNA) as a, Agent(connector(1), name="b", tenant=ANNA) as b:
            remote, channel = tapped(a, b)
            handle = await remote.hand_over(context)
            said = await remote.stream([4, 5], context=handle, max_new_tokens=3).result()
            back, done = await remote.receive(said.handle)
            assert done.bytes_reused > 0
            assert positions(channel.came) < 64
            assert connector(0).generate([6], context=back, max_new_tokens=2).receipt.tokens_reused == len(back)
            assert {entry.tenant for each in (a, b) for entry in each.store.entries()} == {"anna"}

    context = connector(0).prefill(IDS)
    run(scenario())


def test_a_token_says_which_tenant_calls() -> None:
    with Agent(connector(1), name="b", security=Security(tokens={"t": ANNA})) as agent:
        assert agent.endpoint.admit("t", address="10.0.0.1") == Caller(ANNA, "10.0.0.1")
        with pytest.raises(AccessDenied):
            agent.endpoint.admit(None, address="10.0.0.1")


# --- everything else that may come


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 400) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["session", "handle", "url", "ranges", "transfer", "hello", "digest", "pages", "grades", "tokens", "engine"]
events = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=5)
VERBS = ["hello", "have", "receive", "fetch", "renew", "revoke", "vocabulary", "probe"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(VERBS), st.lists(events | st.sampled_from([text_context("a"), Context("text")]), max_size=3))
def test_whatever_comes_is_answered_or_refused_with_an_error_of_ours(verb: str, items: list[Item]) -> None:
    with Agent(name="shelf") as shelf, suppress(AVPError):
        run(ask(shelf, verb, *items))


def test_a_verb_that_there_is_not_is_named_with_those_that_there_are(agent: Agent) -> None:
    with pytest.raises(UsageError, match="there is no verb 'steal'"):
        run(ask(agent, "steal", {}))


def test_the_vocabulary_is_told_by_its_digest_only(agent: Agent) -> None:
    async def scenario() -> None:
        event = await event_of(agent, "vocabulary", {"digest": agent.hello().vocabulary})
        assert event["vocabulary"] == list(connector(1).vocabulary())
        with pytest.raises(UsageError, match="is not this model's"):
            await ask(agent, "vocabulary", {"digest": "f" * 64})

    run(scenario())
