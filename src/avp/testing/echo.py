"""An endpoint for the laws of transports, and what they send to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Coroutine

from avp.blob import Blob, seal
from avp.context import Context
from avp.errors import AVPError, UsageError
from avp.manifest import Limits
from avp.protocols import Channel, Item, Meter
from avp.security import Caller, Security
from avp.testing.synthetic import synthetic_context
from avp.wire import encode_item, error_from_json


class EchoEndpoint:
    """An endpoint that does what its verb says: echo, count, fail, fail-late, crash, stream, blobs, hang, slow, who.

    As a transport may hold an answer back until all was sent, "echo" and "slow" answer when they have read all.
    """

    def __init__(self, *, security: Security | None = None, limits: Limits | None = None) -> None:
        self._security = security or Security()
        self._limits = limits or Limits()
        self.started = threading.Event()  # a call came
        self.left = threading.Event()  # a call was ended before its answer was
        self.given = 0  # items that "blobs" has yielded
        self.taken = 0  # items that "slow" has read

    @property
    def limits(self) -> Limits:
        """What may be read from a caller."""
        return self._limits

    def admit(self, token: str | None, *, address: str) -> Caller:
        """The tenant of the token; raises `AccessDenied`."""
        return Caller(self._security.tenant(token), address)

    async def answer(self, verb: str, items: AsyncIterator[Item], *, caller: Caller) -> AsyncIterator[Item]:
        """Do what the verb says."""
        verbs = {
            "echo": self._echo,
            "count": self._count,
            "fail": self._fail,
            "fail-late": self._fail,
            "crash": self._crash,
            "stream": self._stream,
            "blobs": self._blobs,
            "hang": self._hang,
            "slow": self._slow,
        }
        self.started.set()
        try:
            if verb == "who":
                yield {"tenant": caller.tenant.name, "address": caller.address}
            elif verb not in verbs:
                raise UsageError(f"there is no verb {verb!r}. Fix: use echo.")
            else:
                async for item in verbs[verb](items):
                    yield item
                    self.given += 1
        except (GeneratorExit, asyncio.CancelledError):
            self.left.set()
            raise

    async def _echo(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        for item in [item async for item in items]:
            yield item

    async def _count(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        got = [item async for item in items]
        blobs = [item for item in got if isinstance(item, Blob)]
        yield {"items": len(got), "blobs": len(blobs), "bytes": sum(blob.verify().nbytes for blob in blobs)}

    async def _fail(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        async for item in items:
            assert not isinstance(item, Blob | Context)
            if "type" in item:
                raise error_from_json(item)
            yield item

    async def _crash(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        async for item in items:
            if not isinstance(item, Blob):
                raise RuntimeError(f"a fault at {item}")
            yield item

    async def _stream(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        for number in range(await _number(items)):
            yield {"number": number}
            await asyncio.sleep(0)

    async def _blobs(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        count, blob = await _number(items), large_blob()
        for _ in range(count):
            yield blob

    async def _hang(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        await asyncio.Event().wait()
        yield {}

    async def _slow(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        async for _ in items:
            self.taken += 1
            await asyncio.sleep(0.01)
        yield {"taken": self.taken}


async def _number(items: AsyncIterator[Item]) -> int:
    item = await anext(items)
    assert not isinstance(item, Blob | Context)
    number = item["n"]
    assert isinstance(number, int)
    return number


def large_blob() -> Blob:
    """A blob of 1 MiB of KV."""
    context = synthetic_context(layers=4, kv_heads=4, tokens=256, head_dim=64)
    assert context.model is not None
    return seal(context.model, context.segments[0])


def blobs_of(context: Context, *, codec: str = "raw") -> list[Blob]:
    """All segments of a context."""
    assert context.model is not None
    return [seal(context.model, segment, codec=codec) for segment in context.segments]


async def sending(*items: Item) -> AsyncIterator[Item]:
    """The items, as a call takes them."""
    for item in items:
        yield item


async def ask(channel: Channel, verb: str, *items: Item, meter: Meter | None = None) -> list[Item]:
    """The whole answer to a call."""
    return await ask_with(channel, verb, sending(*items), meter=meter)


async def ask_with(
    channel: Channel, verb: str, items: AsyncIterable[Item], *, meter: Meter | None = None
) -> list[Item]:
    """The whole answer to a call whose items are made while it runs."""
    async with channel.call(verb, items, meter=meter or Meter()) as answer:
        return [item async for item in answer]


async def failure(call: Coroutine[object, object, object]) -> AVPError:
    """The error that a call ends with."""
    try:
        value = await call
    except AVPError as error:
        return error
    raise AssertionError(f"the call did not fail but gave {value!r}")


def as_bytes(item: Item) -> bytes:
    """What makes two items equal."""
    return b"".join(encode_item(item))
