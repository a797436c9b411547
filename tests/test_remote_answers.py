"""Calls that cannot be carried out, and answers that make no sense."""

from __future__ import annotations

import pytest

from avp.agent import Agent
from avp.blob import Blob
from avp.context import Context
from avp.errors import ConnectionFailed, UsageError
from avp.protocols import Item
from avp.remote import AsyncRemote

from .endpoint.peers import IDS, connector, run, tapped
from .remote_tools import PROMPT, two_agents

agents = pytest.fixture(two_agents)


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
