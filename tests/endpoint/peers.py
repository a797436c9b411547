"""Agents over tiny models, and a channel that lets a test see, change or break what passes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import cache
from typing import TypeVar

from avp.agent import Agent
from avp.blob import Blob
from avp.connectors.huggingface import HuggingFaceConnector
from avp.direct import DirectChannel, ended
from avp.errors import ConnectionFailed
from avp.protocols import Channel, Item, Meter
from avp.remote import AsyncRemote
from avp.security import Caller
from avp.testing.tiny import tiny_connector, tiny_model, tiny_tokenizer

T = TypeVar("T")
Hook = Callable[[str, Item], Awaitable[Item]]
IDS = [(7 * number) % 200 + 5 for number in range(300)]


def run(work: Coroutine[object, object, T]) -> T:
    """Do it in a loop of its own, which is not to take forever."""

    async def bounded() -> T:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(bounded())


@cache
def connector(number: int = 0, *, seed: int = 0) -> HuggingFaceConnector:
    """Connectors of one seed have equal weights, and nothing else in common."""
    del number
    return tiny_connector("llama", seed=seed)


@cache
def foreign() -> HuggingFaceConnector:
    """Other weights and another tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    return HuggingFaceConnector(tiny_model(seed=5), tokenizer, name="foreign")


async def as_it_is(verb: str, item: Item) -> Item:
    """A hook that does nothing."""
    del verb
    return item


class Tapped:
    """A channel through which every item passes a hook, on its way there and back."""

    def __init__(self, inner: Channel, *, there: Hook = as_it_is, back: Hook = as_it_is) -> None:
        self._inner, self._there, self._back = inner, there, back
        self.verbs: list[str] = []
        self.sent: list[Blob] = []
        self.came: list[Blob] = []

    @asynccontextmanager
    async def call(self, verb: str, items: AsyncIterable[Item], *, meter: Meter) -> AsyncIterator[AsyncIterator[Item]]:
        """See `Channel.call`."""
        self.verbs.append(verb)
        there = self._pass(verb, aiter(items), self._there, self.sent)
        async with (
            self._inner.call(verb, there, meter=meter) as answer,
            ended(self._pass(verb, answer, self._back, self.came)) as back,
        ):
            yield back

    async def _pass(self, verb: str, items: AsyncIterator[Item], hook: Hook, seen: list[Blob]) -> AsyncIterator[Item]:
        async with ended(items):
            async for item in items:
                passed = await hook(verb, item)
                if isinstance(passed, Blob):
                    seen.append(passed)
                yield passed

    async def close(self) -> None:
        """See `Channel.close`."""
        await self._inner.close()


def tapped(own: Agent, other: Agent, *, there: Hook = as_it_is, back: Hook = as_it_is) -> tuple[AsyncRemote, Tapped]:
    """The other agent as `own` sees it, and the channel between them."""
    channel = Tapped(DirectChannel(other.endpoint, caller=Caller(own.own.tenant)), there=there, back=back)
    return AsyncRemote(channel, other.url, own=own.own), channel


def breaking(*counts: int) -> Hook:
    """A hook that breaks the connection after so many blobs, once for each count."""
    left = list(counts)
    passed = 0

    async def hook(verb: str, item: Item) -> Item:
        nonlocal passed
        if isinstance(item, Blob) and left:
            if passed == left[0]:
                left.pop(0)
                passed = 0
                raise ConnectionFailed(f"the cable of {verb} was cut. Fix: call again.")
            passed += 1
        return item

    return hook


def positions(blobs: list[Blob]) -> int:
    """How many positions they hold."""
    return sum(len(blob.segment) for blob in blobs)
