"""The text of another agent as it comes, and what it was in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType

from avp.errors import ConnectionFailed, TimedOut
from avp.handle import Handle, RemoteGeneration
from avp.protocols import Channel, Event, Item, Meter
from avp.receipt import Receipt, Usage
from avp.segment import Exactness
from avp.transfer import each

_ASK = "Fix: run the same version of avp at both ends."


class RemoteStream:
    """Iterate over it for the pieces of text; then `await result()`. Made by `AsyncRemote.stream`."""

    def __init__(
        self,
        channel: Channel,
        start: Callable[[], Awaitable[Event]],
        to_handle: Callable[[Event, Receipt | None], Handle],
        *,
        timeout: float | None,
    ) -> None:
        self._channel = channel
        self._start = start
        self._to_handle = to_handle
        self._timeout = timeout
        self._meter = Meter()
        self._result: RemoteGeneration | None = None
        self._pieces = self._run()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    async def result(self) -> RemoteGeneration:
        """The whole; reads what was not read yet. Raises what the other agent raised, ConnectionFailed, TimedOut."""
        async for _ in self._pieces:
            pass
        if self._result is None:
            raise ConnectionFailed(f"the generation ended without a result. {_ASK}")
        return self._result

    async def aclose(self) -> None:
        """End the run, here and there."""
        await self._pieces.aclose()

    async def _run(self) -> AsyncGenerator[str]:
        end = None if self._timeout is None else asyncio.get_running_loop().time() + self._timeout
        async with aclosing(self._far()) as pieces:
            # Only the wait for a piece is bounded: what the reader does between two is not ours to cancel.
            while (piece := await self._next(pieces, end)) is not None:
                yield piece

    async def _far(self) -> AsyncGenerator[str]:
        event = await self._start()
        async with self._channel.call("generate", each([event]), meter=self._meter) as answer:
            async for item in answer:
                piece = self._read(item)
                if piece:
                    yield piece

    async def _next(self, pieces: AsyncGenerator[str], end: float | None) -> str | None:
        limit = asyncio.timeout_at(end)
        try:
            async with limit:
                return await anext(pieces, None)
        except TimeoutError as error:
            if isinstance(error, TimedOut) or not limit.expired():
                raise
            raise TimedOut(
                f"the generation took longer than {self._timeout:g} s and was ended. Fix: pass a longer timeout."
            ) from error

    def _read(self, item: Item) -> str:
        if not isinstance(item, Mapping):
            raise ConnectionFailed(f"a {type(item).__name__} came where text was due. {_ASK}")
        if "result" in item:
            self._result = self._generation(item)
            return ""
        return str(item.get("text", ""))

    def _generation(self, event: Event) -> RemoteGeneration:
        value = _part(event, "result")
        usage, done = _part(value, "usage"), _part(value, "receipt")
        try:
            receipt = Receipt(
                str(done["mode"]),
                Exactness.parse(str(done["exactness"])),
                bytes_sent=self._meter.sent,
                bytes_reused=_whole(done["bytes_reused"]),
                tokens_reused=_whole(done["tokens_reused"]),
                positions_computed=_whole(done["positions_computed"]),
                seconds=MappingProxyType({name: _number(each) for name, each in _part(done, "seconds").items()}),
                reasons=tuple(map(str, _list(done["reasons"]))),
            )
            return RemoteGeneration(
                str(value["text"]),
                tokens=tuple(map(_whole, _list(value["tokens"]))),
                context=self._to_handle(event, None),  # type: ignore[arg-type]  # see RemoteGeneration
                usage=Usage(*(_whole(usage[name]) for name in ("prompt_tokens", "completion_tokens", "cached_tokens"))),
                receipt=receipt,
                finish_reason=str(value["finish_reason"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConnectionFailed(f"a result came that lacks {error}. {_ASK}") from error


def _part(event: Event, name: str) -> Event:
    value = event.get(name)
    if not isinstance(value, Mapping):
        raise ConnectionFailed(f"a result came without {name}. {_ASK}")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("a list")
    return value


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError("a whole number")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number")
    return float(value)
