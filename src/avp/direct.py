"""A channel to an endpoint in the same event loop: the same handshake, delta and receipt, without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager

from avp.protocols import Endpoint, Item, Meter
from avp.security import Caller


class DirectChannel:
    """Items pass as they are; nothing is copied."""

    def __init__(self, endpoint: Endpoint, *, caller: Caller | None = None) -> None:
        self._endpoint = endpoint
        self._caller = caller or Caller()

    @asynccontextmanager
    async def call(self, verb: str, items: AsyncIterable[Item], *, meter: Meter) -> AsyncIterator[AsyncIterator[Item]]:
        """See `Channel.call`; nothing goes over a socket, so `meter` stays as it is."""
        answer = self._endpoint.answer(verb, aiter(items), caller=self._caller)
        try:
            yield answer
        finally:
            await _close(answer)
            await _close(aiter(items))

    async def close(self) -> None:
        """Nothing to end."""


async def _close(items: AsyncIterator[Item]) -> None:
    """End a generator that was left early."""
    from collections.abc import AsyncGenerator

    if isinstance(items, AsyncGenerator):
        await items.aclose()
