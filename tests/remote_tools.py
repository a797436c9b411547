"""What tests of a remote agent share: two agents, what one of them keeps, what it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from avp.agent import Agent
from avp.context import Context
from avp.handle import Handle
from avp.remote import AsyncRemote

from .endpoint.peers import connector

PROMPT = [9, 8, 7]


def two_agents() -> Iterator[tuple[Agent, Agent]]:
    with Agent(connector(0), name="a") as a, Agent(connector(1), name="b") as b:
        yield a, b


def stored(agent: Agent) -> list[tuple[int, int]]:
    return sorted((entry.start, entry.count) for entry in agent.store.entries())


async def text_of(
    remote: AsyncRemote, prompt: Sequence[int], handle: Handle | Context | None, count: int = 6
) -> tuple[int, ...]:
    return (await remote.stream(list(prompt), context=handle, max_new_tokens=count).result()).tokens
