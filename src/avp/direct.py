"""A channel to an endpoint in the same event loop: the same handshake, delta and receipt, without a socket."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from avp.protocols import Endpoint, Item, Meter
from avp.security import Caller

T = TypeVar("T")


class DirectChannel:
    """Items pass as they are; nothing is copied."""

    def __init__(self, endpoint: Endpoint, *, caller: Caller | None = None) -> None:
        self._endpoint = endpoint
        self._caller = caller or Caller()

    @asynccontextmanager
    async def call(self, verb: str, items: AsyncIterable[Item], *, meter: Meter) -> AsyncIterator[AsyncIterator[Item]]:
        """See `Channel.call`; nothing goes over a socket, so `meter` stays as it is."""
        given = aiter(items)
        async with ended(given), ended(self._endpoint.answer(verb, given, caller=self._caller)) as answer:
            yield answer

    async def close(self) -> None:
        """Nothing to end."""


@asynccontextmanager
async def ended(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """The items; a generator of them is ended with the block."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()
