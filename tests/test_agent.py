"""Agents, without `async`: hand-over between them, over URLs and to files; stores, tenants, and how they end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import avp
from avp.agent import Agent
from avp.errors import AccessDenied, HandleExpired, IdentityMismatch, NoAgreement, TimedOut, UsageError
from avp.security import Security, Tenant
from avp.segment import Exactness
from avp.stores.memory import MemoryStore

from .endpoint.peers import IDS, connector, run

PROMPT = [9, 8, 7]


@pytest.fixture
def agents() -> Iterator[tuple[Agent, Agent]]:
    with Agent(connector(0), name="a") as a, Agent(connector(1), name="b") as b:
        yield a, b


def test_one_agent_hands_over_and_the_other_goes_on(agents: tuple[Agent, Agent]) -> None:
    a, b = agents
    context = a.prefill(IDS)
    handle = a.hand_over(context, to=b)
    assert (len(handle), handle.url, handle.exactness) == (300, b.url, Exactness.EXACT)
    near = a.generate(PROMPT, context=context, max_new_tokens=6)
    there = b.generate(PROMPT, context=handle, max_new_tokens=6)
    assert there.tokens == near.tokens
    assert there.receipt.tokens_reused == 300
    assert len(b.think("More.", context=handle, steps=2)) > 300
    assert len(b.prefill([4], context=handle)) == 301


def test_agents_of_one_name_are_told_apart(agents: tuple[Agent, Agent]) -> None:
    a, b = agents
    handle = a.hand_over(IDS, to=b)
    with Agent(connector(2), name="b") as twin, a.connect(twin) as remote:
        assert twin.url != b.url
        with pytest.raises(AccessDenied, match="does not fetch contexts from agent:b#"):
            remote.generate(PROMPT, context=handle)


def test_the_secret_of_a_handle_is_not_in_its_repr(agents: tuple[Agent, Agent]) -> None:
    a, b = agents
    handle = a.hand_over(a.prefill(IDS[:10]), to=b)
    assert str(handle) not in repr(handle)
    assert str(handle) == handle.id


def test_an_agent_does_not_know_the_handles_of_others(agents: tuple[Agent, Agent]) -> None:
    a, b = agents
    handle = a.hand_over(a.prefill(IDS[:10]), to=b)
    with pytest.raises(HandleExpired):
        a.generate(PROMPT, context=handle, max_new_tokens=1)


def test_agents_of_a_tenant_go_on_from_what_was_handed_over_to_them() -> None:
    anna = Tenant.named("anna")
    with Agent(connector(0), name="a", tenant=anna) as a, Agent(connector(1), name="b", tenant=anna) as b:
        handle = a.hand_over(a.prefill(IDS), to=b)
        assert b.generate(PROMPT, context=handle, max_new_tokens=2).receipt.tokens_reused == 300
    with Agent(connector(0), name="a", tenant=anna) as a, Agent(connector(1), name="b") as b:
        handle = a.hand_over(a.prefill(IDS), to=b)
        with pytest.raises(HandleExpired):
            b.generate(PROMPT, context=handle, max_new_tokens=1)


def test_text_is_taken_only_where_both_accept_it() -> None:
    with Agent(connector(0), name="a") as a, Agent(connector(seed=1), name="b", accept="text") as b:
        context = a.prefill("Plan the work.")
        with pytest.raises(NoAgreement):
            a.hand_over(context, to=b)
        handle = a.hand_over(context, to=b, accept="text")
        assert handle.receipt is not None
        assert handle.receipt.exactness is Exactness.TEXT
        assert b.generate("Now.", context=handle, max_new_tokens=3).receipt.exactness is Exactness.TEXT
        assert b.generate("Now.", context=context, max_new_tokens=3).receipt.mode == "tokens"
    with Agent(connector(seed=1), name="strict") as strict, pytest.raises(IdentityMismatch):
        strict.generate("Now.", context=connector(0).prefill(IDS), max_new_tokens=1)


def test_an_agent_without_a_model_keeps_and_gives_but_does_not_generate(agents: tuple[Agent, Agent]) -> None:
    a, b = agents
    with Agent(name="shelf") as shelf:
        assert repr(shelf) == "<Agent shelf, no model>"
        context = a.prefill(IDS)
        handle = a.hand_over(context, to=shelf)
        for call in (shelf.generate, shelf.prefill, shelf.think):
            with pytest.raises(UsageError, match="shelf has no model"):
                call("hi", context=handle)
        back = b.connect(shelf).fetch(handle)
        assert b.generate(PROMPT, context=back, max_new_tokens=3).receipt.exactness is Exactness.EXACT


def test_agents_meet_over_a_url(agents: tuple[Agent, Agent]) -> None:
    a, b = agents
    with avp.serve(b, "mem:agents-meet") as server, a.connect(server.url) as remote:
        handle = a.hand_over(a.prefill(IDS), to=server.url)
        assert handle.url == "mem:agents-meet"
        assert a.hand_over(a.prefill(IDS), to=remote).receipt is not None
        said = remote.generate(PROMPT, context=handle, max_new_tokens=4)
        assert said.tokens == a.generate(PROMPT, context=a.prefill(IDS), max_new_tokens=4).tokens
        stream = remote.stream(PROMPT, context=handle, max_new_tokens=4)
        assert "".join(stream) == said == stream.result
        assert len(remote.fetch(said.context)) == len(said.context)
        assert remote.hello().agent == "b"
        assert remote.renew(handle) > 0
        remote.revoke(handle)
        with pytest.raises(HandleExpired):
            remote.generate(PROMPT, context=handle, max_new_tokens=1)


def test_the_receipt_of_a_fetch_says_what_came_over_the_socket(agents: tuple[Agent, Agent], tmp_path: Path) -> None:
    a, b = agents
    with avp.serve(b, f"unix:{tmp_path}/s") as server, a.connect(server.url) as remote:
        said = remote.generate(PROMPT, max_new_tokens=2)
        _, first = remote.receive(said.context)
        _, again = remote.receive(said.context)
        assert 0 < again.bytes_sent < first.bytes_sent
        assert (first.bytes_reused, again.bytes_reused > 0) == (0, True)


def test_a_wrong_token_is_denied() -> None:
    with (
        Agent(connector(1), name="b", security=Security(tokens={"t": Tenant.named("anna")})) as b,
        avp.serve(b, "mem:agents-token"),
    ):
        with avp.connect("mem:agents-token", security=Security(token="x")) as remote, pytest.raises(AccessDenied):
            remote.hello()
        with avp.connect("mem:agents-token", security=Security(token="t")) as remote:
            assert remote.generate(PROMPT, max_new_tokens=2).tokens


def test_a_prompt_is_handed_over_while_it_is_computed(agents: tuple[Agent, Agent]) -> None:
    a, b = agents
    handle = a.hand_over("Plan the work: 12 apples.", to=b)
    context = a.prefill("Plan the work: 12 apples.")
    assert len(handle) == len(context)
    near = a.generate("Go.", context=context, max_new_tokens=4)
    assert b.generate("Go.", context=handle, max_new_tokens=4).tokens == near.tokens


def test_hand_over_and_connect_have_async_twins(agents: tuple[Agent, Agent]) -> None:
    a, b = agents

    async def scenario() -> None:
        handle = await a.hand_over_async(context, to=b)
        async with a.connect_async(b) as remote:
            again = await a.hand_over_async(context, to=remote)
            assert again.receipt is not None
            assert again.receipt.bytes_reused == context.nbytes
            assert (await remote.fetch(handle)).tokens == context.tokens

    context = a.prefill(IDS)
    run(scenario())


def test_a_blocking_call_in_a_servers_loop_is_refused(agents: tuple[Agent, Agent]) -> None:
    from avp.portal import PORTAL

    a, b = agents
    context = a.prefill(IDS[:10])

    async def inside() -> None:
        a.hand_over(context, to=b)

    with pytest.raises(UsageError, match="Fix: await"):
        PORTAL.run(inside())


def test_threads_may_hand_over_at_once_through_one_connection(agents: tuple[Agent, Agent]) -> None:
    a, b = agents
    contexts = [a.prefill(IDS[number : number + 40]) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(lambda context: a.hand_over(context, to=b), contexts))
    assert len({str(handle) for handle in handles}) == 8
    assert len(a._remotes) == 1
    for context, handle in zip(contexts, handles, strict=True):
        near = a.generate(PROMPT, context=context, max_new_tokens=2)
        assert b.generate(PROMPT, context=handle, max_new_tokens=2).tokens == near.tokens


def test_a_stream_that_is_left_is_ended_by_closing_it(agents: tuple[Agent, Agent]) -> None:
    a, b = agents
    stream = a.connect(b).stream(PROMPT, max_new_tokens=900, min_new_tokens=900)
    assert next(iter(stream))
    stream.close()
    with pytest.raises(avp.ConnectionFailed, match="without a result"):
        _ = stream.result


def test_a_blocking_stream_is_timed_out_between_pieces_too(agents: tuple[Agent, Agent]) -> None:
    a, b = agents
    stream = a.connect(b).stream(PROMPT, max_new_tokens=900, min_new_tokens=900, timeout=0.15)
    with pytest.raises(TimedOut):
        list(stream)


def test_a_store_may_be_given_as_an_object_a_url_or_not_at_all(tmp_path: Path) -> None:
    class Empty(MemoryStore):
        def __len__(self) -> int:
            return 0

    empty = Empty()
    with Agent(name="object", store=empty) as one:
        assert one.store is empty  # though it is false
    with Agent(name="nothing") as two:
        assert isinstance(two.store, MemoryStore)
    with Agent(connector(0), name="url", store=f"disk:{tmp_path / 'store'}") as three:
        with Agent(connector(1), name="b") as b:
            three.hand_over(three.prefill(IDS), to=b)
        assert len(list(three.store.entries())) == 2
    with pytest.raises(UsageError):
        Agent(name="wrong", store="nowhere:x")
    with pytest.raises(UsageError):
        Agent(name="wrong", accept="perfect")


def test_a_closed_agent_leaves_no_thread_of_its_own() -> None:
    before = {thread.name for thread in threading.enumerate()}
    with Agent(connector(0), name="a") as a, Agent(connector(1), name="b") as b:
        a.connect(b).generate(PROMPT, max_new_tokens=2)
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("avp-stream")}
    assert not names - before


def test_an_address_that_is_none_is_a_usage_error(agents: tuple[Agent, Agent]) -> None:
    for url in ("nowhere", "gopher://x", ""):
        with pytest.raises(UsageError, match="Fix: use one of"):
            agents[0].hand_over(connector(0).prefill(IDS[:5]), to=url)
    assert asyncio.run(_no_server()) is None


async def _no_server() -> None:
    async with avp.connect_async("mem:nobody-is-here") as remote:
        with pytest.raises(avp.ConnectionFailed, match="nobody is served"):
            await remote.hello()


@pytest.mark.parametrize("named", [True, False])
def test_an_agent_shows_its_token_to_its_peers_and_to_no_other_url_that_a_caller_names(
    named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVP_TOKEN", "of the environment")
    url = f"mem:third-{named}"
    third = Agent(connector(0), name="third", security=Security(tokens={"ours": Tenant()}))
    peers = [url] if named else []
    with (
        third,
        avp.serve(third, url),
        Agent(connector(1), name="b", security=Security(token="ours"), peers=peers) as b,
        Agent(connector(2), name="a", security=Security(token="ours")) as a,
        a.connect(b) as remote,
    ):
        handle = a.hand_over(a.prefill(IDS), to=url)
        if named:
            assert remote.generate(PROMPT, context=handle, max_new_tokens=2).receipt.tokens_reused == 300
        else:
            with pytest.raises(AccessDenied, match="none came"):
                remote.generate(PROMPT, context=handle, max_new_tokens=2)
