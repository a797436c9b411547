"""What an endpoint answers to callers who know the verbs and not the rules."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp import registry
from avp.agent import Agent, serve_async
from avp.blob import Blob, seal
from avp.context import Context, text_context
from avp.delta import outline, outline_to_items, pieces, ranges_from_json
from avp.direct import DirectChannel
from avp.errors import (
    AccessDenied,
    AVPError,
    BundleError,
    Busy,
    ConnectionFailed,
    HandleExpired,
    NoAgreement,
    UsageError,
)
from avp.greeting import hello_to_json
from avp.handshake import CodecOffer, Hello, Record, negotiate
from avp.protocols import Event, Item, Meter
from avp.security import Caller, Security, Tenant
from avp.segment import Exactness
from avp.session import Quota
from avp.transfer import Link, Tally, send

from .peers import IDS, connector, positions, run, tapped

ANNA, BERT = Tenant.named("anna"), Tenant.named("bert")


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent(connector(1), name="b") as made:
        yield made


async def ask(agent: Agent, verb: str, *items: Item, caller: Caller | None = None) -> list[Item]:
    async def sent() -> AsyncIterator[Item]:
        for item in items:
            yield item

    channel = DirectChannel(agent.endpoint, caller=caller)
    async with channel.call(verb, sent(), meter=Meter()) as answer:
        return [item async for item in answer]


async def event_of(agent: Agent, verb: str, *items: Item, caller: Caller | None = None) -> Event:
    (event,) = await ask(agent, verb, *items, caller=caller)
    assert isinstance(event, Mapping)
    return event


def hello_of(context: Context, **changes: object) -> Hello:
    return replace(Hello("one", context.model, "transformers", "float32"), **changes)  # type: ignore[arg-type]


async def shake(agent: Agent, hello: Hello, caller: Caller | None = None) -> Event:
    return await event_of(agent, "hello", {"hello": hello_to_json(hello)}, caller=caller)


async def announce(agent: Agent, context: Context, *, caller: Caller | None = None) -> tuple[Event, list[Blob]]:
    """What `have` answers, and the blobs that it asks for."""
    event = await shake(agent, hello_of(context), caller)
    told, segments = outline(context, "kv", salt=bytes.fromhex(str(event["salt"])))
    about, skeleton = outline_to_items(told)
    reply = await event_of(agent, "have", {**about, "session": event["session"]}, skeleton, caller=caller)
    assert context.model is not None
    due = ranges_from_json(reply["missing"], len(told.pages))
    return reply, [seal(context.model, piece) for piece in pieces(segments, due)]


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
            "twice": ("more segments came", [blobs[0], blobs[0], *blobs]),
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


def test_another_kind_or_other_weights_than_were_agreed_are_refused(agent: Agent) -> None:
    async def scenario() -> None:
        event = await shake(agent, hello_of(context))
        about, skeleton = outline_to_items(outline(context, "kv", salt=b"")[0])
        other = connector(seed=1).prefill(IDS)
        wrong = [
            ("kind text came where kv", text_context("a")),
            ("kind tokens came where kv", replace(skeleton, kind="tokens", length=0)),
            ("other weights", replace(skeleton, model=other.model)),
        ]
        for why, came in wrong:
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


# --- generation


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": "5"},
        {"max_new_tokens": True},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.0},
        {"max_new_tokens": 10**30},
        {"min_new_tokens": -1},
        {"temperature": "hot"},
        {"temperature": 10**400},
        {"temperature": float("nan")},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": [1]},
        {"stop": 5},
        {"stop": [5]},
        {"stop": [""]},
        {"seed": "x"},
        {"seed": -1},
        {"seed": 2**64},
        {"tools": "x"},
        {"tools": [5]},
        {"tools": {}},
        {"chat_template_kwargs": []},
        {"accept": "text"},
        {"source": 5},
        "max_new_tokens",
        None,
        [],
    ],
    ids=lambda options: str(options)[:30],
)
def test_options_of_the_wrong_type_or_range_are_a_usage_error(agent: Agent, options: object) -> None:
    with pytest.raises(UsageError, match="Fix:"):
        run(ask(agent, "generate", {"prompt": "hi", "options": options}))


@pytest.mark.parametrize(
    "prompt",
    [None, 5, {}, [None], [True], [1, "a"], [[1]], [1.5], [320], [-5], [10**30], [{"role": 5, "content": "x"}], ""],
    ids=str,
)
def test_a_prompt_that_is_none_is_a_usage_error(agent: Agent, prompt: object) -> None:
    with pytest.raises(UsageError, match="Fix:"):
        run(ask(agent, "generate", {"prompt": prompt, "options": {"max_new_tokens": 1}}))


def test_an_agent_without_a_model_generates_nothing() -> None:
    with Agent(name="shelf") as shelf, pytest.raises(UsageError, match="shelf has no model"):
        run(ask(shelf, "generate", {"prompt": "hi"}))


def test_only_as_many_generations_run_and_wait_as_the_quota_says() -> None:
    async def scenario() -> None:
        with Agent(connector(1), name="b", quota=Quota(running=1, waiting=1)) as agent:
            remote, _ = tapped(agent, agent)
            streams = [remote.stream([5, 6], max_new_tokens=40, min_new_tokens=40) for _ in range(3)]
            results = await asyncio.gather(*(stream.result() for stream in streams), return_exceptions=True)
            kinds = sorted(type(result).__name__ for result in results)
            assert kinds == ["Busy", "RemoteGeneration", "RemoteGeneration"]
            assert [result.retry_after for result in results if isinstance(result, Busy)] == [2.0]
            await remote.stream([5, 6], max_new_tokens=1).result()

    run(scenario())


def test_a_generation_that_waits_when_its_agent_closes_is_told_so() -> None:
    async def scenario() -> None:
        agent = Agent(connector(1), name="b", quota=Quota(running=1))
        remote, _ = tapped(agent, agent)
        first = remote.stream([5, 6], max_new_tokens=300, min_new_tokens=300)
        await anext(aiter(first))
        second = asyncio.create_task(remote.stream([5, 6], max_new_tokens=1).result())
        await anext(aiter(first))
        agent.endpoint.close()
        with pytest.raises(ConnectionFailed, match="closed before the generation began"):
            await second
        with pytest.raises(ConnectionFailed, match="closed before"):
            await remote.stream([5, 6], max_new_tokens=1).result()
        assert len((await first.result()).tokens) == 300  # what was under way ends as it would
        agent.close()

    run(scenario())


# --- a third agent's handle


def test_a_handle_of_a_third_agent_is_fetched_from_there_for_callers_of_this_machine() -> None:
    async def scenario() -> None:
        with Agent(connector(0), name="a") as a, Agent(connector(1), name="b") as b, Agent(connector(2), name="c") as c:
            async with await serve_async(c, "mem:third"):
                async with a.connect_async("mem:third") as third:
                    handle = await third.hand_over(context)
                assert handle.url == "mem:third"
                remote, channel = tapped(a, b)
                far = await remote.stream([4, 5], context=handle, max_new_tokens=5).result()
                assert far.tokens == connector(0).generate([4, 5], context=context, max_new_tokens=5).tokens
                assert not channel.sent
                assert far.receipt.tokens_reused == 300

    context = connector(0).prefill(IDS)
    run(scenario())


@pytest.mark.parametrize(
    ("url", "address", "allowed"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", True),
        ("http://localhost:1", "unix", True),
        ("mem:third", "in-process", True),
        ("http://127.0.0.1:8000", "10.0.0.9", False),
        ("mem:third", "10.0.0.9", False),
        ("http://far.example", "127.0.0.1", False),
        ("http://localhost@far.example", "127.0.0.1", False),
        ("http://127.0.0.1.far.example", "127.0.0.1", False),
        ("file:/etc/passwd", "127.0.0.1", False),
        ("http://peer.example:80", "10.0.0.9", True),
        ("http://peer.example:80/x", "10.0.0.9", True),
        ("http://peer.example:8080", "10.0.0.9", False),
        ("http://peer.example:80@far.example", "10.0.0.9", False),
        ("http://[::1", "127.0.0.1", False),
    ],
)
def test_far_callers_may_name_peers_only_and_near_ones_this_machine(url: str, address: str, allowed: bool) -> None:
    asked: list[tuple[str, str, Tenant]] = []

    async def pull(where: str, handle: str, tenant: Tenant) -> Context:
        asked.append((where, handle, tenant))
        raise HandleExpired("it is not there. Fix: none.")

    with Agent(connector(1), name="b", peers=["http://peer.example:80"]) as agent:
        agent.endpoint.desk.pull = pull
        call = ask(agent, "generate", {"prompt": "x", "handle": "h", "url": url}, caller=Caller(ANNA, address))
        with pytest.raises(HandleExpired if allowed else (AccessDenied, UsageError)):
            run(call)
        assert asked == ([(url, "h", ANNA)] if allowed else [])


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


# --- a codec that loses something

PLUGIN = """
import numpy as np
from avp.buffers import Buffer
from avp.segment import Exactness


class Coarse:
    name = "coarse8"
    exactness = Exactness.BOUNDED

    def parts(self, dtype, shape):
        return {"": ("int8", shape), ".scale": ("float32", (1, 1, 1))}

    def encode(self, tensor):
        scale = np.full((1, 1, 1), max(np.abs(tensor.array).max(), 1e-9) / 127, np.float32)
        return {"": Buffer("int8", np.rint(tensor.array / scale).astype(np.int8)), ".scale": Buffer("float32", scale)}

    def decode(self, parts, dtype, shape):
        return Buffer("float32", parts[""].array.astype(np.float32) * parts[".scale"].array)


CODEC = Coarse()
"""


@pytest.fixture
def coarse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "coarse_plugin.py").write_text(PLUGIN)
    info = tmp_path / "coarse_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: coarse-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[avp.codecs]\ncoarse8 = coarse_plugin:CODEC\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "coarse8"
    registry.load.cache_clear()
    sys.modules.pop("coarse_plugin", None)


def test_after_a_lossy_hand_over_an_exact_one_transfers_again(coarse: str) -> None:
    async def scenario() -> None:
        with Agent(connector(0), name="a") as a, Agent(connector(1), name="b", accept="bounded") as b:
            remote, channel = tapped(a, b)
            with pytest.raises(NoAgreement, match="no record for these weights"):
                await remote.hand_over(context, codec=coarse, accept="bounded")
            assert context.model is not None
            record = Record(context.model.weights, 0.001, 0.99, 0.95)
            offer = CodecOffer(coarse, Exactness.BOUNDED, 0.25, records=(record,))
            hello = hello_of(context, codecs=(offer,), accept=Exactness.BOUNDED)
            event = await shake(b, hello)
            link = Link(channel, str(event["session"]), b"", hello, b.hello())
            agreement = negotiate(hello, b.hello(), tokens=len(context))
            assert (agreement.mode, agreement.codec, agreement.exactness) == ("kv", coarse, Exactness.BOUNDED)
            lossy = await send(link, context, agreement, Tally())
            assert lossy["exactness"] == "bounded"
            assert positions(channel.sent) == 300
            assert sum(blob.nbytes for blob in channel.sent) < 0.5 * context.nbytes
            with b.endpoint.desk.handles.use(str(lossy["handle"]), Tenant()) as there:
                assert there.exactness is Exactness.BOUNDED
            await send(link, context, agreement, Tally())
            assert positions(channel.sent) == 300  # the lossy form will do for who asks for no more
            exact = await remote.hand_over(context)
            assert positions(channel.sent) == 600
            assert exact.exactness is Exactness.EXACT
            assert exact.receipt is not None
            assert exact.receipt.bytes_reused == 0
            far = await remote.stream([4, 5], context=exact, max_new_tokens=8).result()
            assert far.tokens == connector(0).generate([4, 5], context=context, max_new_tokens=8).tokens

    context = connector(0).prefill(IDS)
    run(scenario())


def test_a_lossy_segment_that_claims_to_be_exact_is_refused(coarse: str) -> None:
    async def scenario() -> None:
        with Agent(connector(1), name="b") as b:
            reply, blobs = await announce(b, context)
            assert context.model is not None
            lossy = seal(context.model, blobs[0].segment, codec=coarse)
            assert lossy.segment.exactness is Exactness.BOUNDED
            forged = replace(lossy, segment=replace(lossy.segment, exactness=Exactness.EXACT))
            with pytest.raises(BundleError, match="engine, dtype or class"):
                await ask(b, "receive", {"transfer": reply["transfer"]}, forged)
            assert not list(b.store.entries())

    context = connector(0).prefill(IDS[:64])
    run(scenario())
