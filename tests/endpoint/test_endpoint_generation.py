"""Generation at an endpoint: options and prompts, the quota, and the handle of a third agent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from avp.agent import Agent, serve_async
from avp.context import Context
from avp.errors import AccessDenied, Busy, ConnectionFailed, HandleExpired, UsageError
from avp.security import Caller, Tenant
from avp.session import Quota

from .callers import ANNA, ask
from .peers import IDS, connector, run, tapped


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent(connector(1), name="b") as made:
        yield made


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
        ("file://localhost/etc/passwd", "127.0.0.1", False),
        ("grpc://[::1]:7", "[::1]", True),
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
