"""The sender's side of a hand-over: announce a context, send what is missing, resume where a connection broke."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from time import perf_counter
from types import MappingProxyType

from avp.blob import Blob, seal
from avp.context import Context
from avp.delta import Grade, Outline, Ranges, outline, outline_to_items, pieces, ranges_from_json, sealed
from avp.errors import ConnectionFailed, SegmentMissing, TimedOut, UsageError
from avp.greeting import agreement_to_json
from avp.handshake import Agreement, Hello
from avp.protocols import Channel, Event, Item, Meter
from avp.receipt import Receipt
from avp.segment import Exactness, Segment, page_ids, root_page, with_salt, worst
from avp.telemetry import span

Keep = Callable[[Blob], None]
_TRIES = 5
_PAUSE = 0.05  # seconds before the second try; each later one waits three times as long


@dataclass(slots=True)
class Link:
    """An open session with another agent."""

    channel: Channel
    session: str
    salt: bytes
    own: Hello
    theirs: Hello


@dataclass(slots=True)
class Tally:
    """What a hand-over did so far."""

    meter: Meter = field(default_factory=Meter)
    known: int | None = None  # bytes of KV that were there at the first asking
    tries: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, started: float) -> None:
        """Count the time since `started` under a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - started


async def ask(channel: Channel, verb: str, items: list[Item], meter: Meter) -> Event:
    """A call whose answer is one event.

    Raises:
        ConnectionFailed: something else came. Else what the far end raised.
    """
    async with channel.call(verb, each(items), meter=meter) as answer:
        item = await anext(answer, None)
        if not isinstance(item, Mapping):
            raise ConnectionFailed(f"{verb} was answered by no event. Fix: check that the other end speaks AVP.")
        async for _ in answer:
            pass
        return item


async def each(items: list[Item]) -> AsyncIterator[Item]:
    """A list as a stream."""
    for item in items:
        yield item


async def send(link: Link, context: Context, agreement: Agreement, tally: Tally, *, keep: Keep | None = None) -> Event:
    """Hand a whole context over; the event that names its handle. `keep` is given every blob that is sent.

    A connection that breaks is tried again, each time with what is still missing.
    """
    given, segments = await asyncio.to_thread(outline, context, agreement.mode, salt=link.salt)

    def blobs(ranges: Ranges) -> AsyncGenerator[Blob]:
        model = given.skeleton.model
        if model is None:
            raise ConnectionFailed("the other end asks for the KV of a context that has none. Fix: report this.")
        return sealed(model, pieces(segments, ranges), agreement.codec or "raw")

    return await persist(lambda: _once(link, given, blobs, agreement, tally, keep), tally)


async def persist(attempt: Callable[[], Awaitable[Event]], tally: Tally) -> Event:
    """Try until it is done; only a broken connection, or KV that a store dropped meanwhile, is tried again."""
    while True:
        tally.tries += 1
        try:
            return await attempt()
        except (ConnectionFailed, SegmentMissing) as error:
            if isinstance(error, TimedOut) or tally.tries >= _TRIES:
                raise
            tally.broken.append(str(error).partition(".")[0])
            await asyncio.sleep(_PAUSE * 3 ** (tally.tries - 1))


async def _once(
    link: Link,
    given: Outline,
    blobs: Callable[[Ranges], AsyncGenerator[Blob]],
    agreement: Agreement,
    tally: Tally,
    keep: Keep | None,
) -> Event:
    """Announce, then send what is missing."""
    started = perf_counter()
    about, skeleton = outline_to_items(given)
    reply = await ask(link.channel, "have", [{**about, "session": link.session}, skeleton], tally.meter)
    tally.add("have", started)
    if reply.get("agreement") != agreement_to_json(agreement):
        raise ConnectionFailed(
            "the two ends computed different agreements from the same hellos. Fix: run the same version of avp at both."
        )
    lacking = ranges_from_json(reply.get("missing"), len(given.pages))
    if tally.known is None:
        tally.known = given.nbytes(((0, len(given.pages)),)) - given.nbytes(lacking) if given.pages else 0
    if not lacking:
        return reply

    async def items() -> AsyncIterator[Item]:
        yield {"transfer": reply.get("transfer")}
        async with aclosing(blobs(lacking)) as made:
            async for blob in made:
                with span("send", start=blob.segment.start, bytes=blob.nbytes):
                    yield blob
                if keep is not None:
                    await asyncio.to_thread(keep, blob)

    started = perf_counter()
    try:
        async with link.channel.call("receive", items(), meter=tally.meter) as answer:
            event = await anext(answer, None)
            if not isinstance(event, Mapping):
                raise ConnectionFailed("receive was answered by no event. Fix: check that the other end speaks AVP.")
            async for _ in answer:  # to its end, so that the connection serves the next call
                pass
            return event
    finally:
        tally.add("send", started)


async def send_growing(
    link: Link, first: Context, steps: Iterator[Context], made: tuple[str, str], agreement: Agreement, tally: Tally
) -> tuple[Event, Context]:
    """Hand over a context while it is computed: a segment travels while the next one is computed.

    `first` and the other `steps` as of `Connector.prefill_steps`, `made` its engine and dtype. The first try is
    pipelined; if its connection breaks, the context is computed to its end and what is missing is sent. Where nothing
    is missing, nothing is computed: the context that is returned then has no KV.
    """
    growing = _Growing(steps, first, link.salt)
    given = growing.outline(*made)
    try:
        event = await _once(link, given, growing.blobs, agreement, tally, None)
    except (ConnectionFailed, SegmentMissing) as error:
        if isinstance(error, TimedOut):
            raise
        tally.broken.append(str(error).partition(".")[0])
        await growing.finish()
        return await send(link, growing.context, agreement, tally), growing.context
    if given.pages and tally.known == given.nbytes(((0, len(given.pages)),)):
        return event, given.skeleton
    await growing.finish()
    return event, growing.context


class _Growing:
    """A context that is being computed in a thread, and read segment by segment in the loop."""

    def __init__(self, steps: Iterator[Context], first: Context, salt: bytes) -> None:
        self.context = first
        self._steps = steps
        self._salt = salt
        self._seen = 0  # positions whose segments were given out

    def outline(self, engine: str, dtype: str) -> Outline:
        """What is told of the whole before it is computed: its tokens are known, and nothing in it is latent."""
        model, tokens = self.context.model, self.context.tokens
        if model is None:
            raise UsageError("a context without a model cannot grow. Fix: pass a connector's steps.")
        skeleton = replace(self.context, length=len(tokens), segments=())
        pages = page_ids(root_page(model, salt=self._salt), tokens)
        return Outline(skeleton, pages, (Grade(0, Exactness.EXACT, engine, dtype),) if pages else (), len(tokens))

    async def blobs(self, ranges: Ranges) -> AsyncGenerator[Blob]:
        """The missing pages, sealed, as their segments come; the next step is computed meanwhile."""
        model = self.context.model
        if model is None:
            return
        while True:
            ready = pieces(self._new(), ranges)
            following = asyncio.create_task(asyncio.to_thread(self._step))
            try:
                for segment in ready:
                    yield await asyncio.to_thread(seal, model, segment)
            finally:
                more = await following
            if not more:
                break
        for segment in pieces(self._new(), ranges):
            yield await asyncio.to_thread(seal, model, segment)

    async def finish(self) -> None:
        """Compute what is left."""
        while await asyncio.to_thread(self._step):
            pass

    def _step(self) -> bool:
        with span("compute", start=len(self.context)):
            context = next(self._steps, None)
        if context is not None:
            self.context = context
        return context is not None

    def _new(self) -> list[Segment]:
        """Segments that were not given out yet, under the receiver's page ids."""
        if self.context.model is None:
            return []
        salted = with_salt(self.context.model, self.context.segments, self._salt)
        new = [
            segment.cut(max(segment.start, self._seen), segment.stop) for segment in salted if segment.stop > self._seen
        ]
        self._seen = len(self.context)
        return new


def receipt(agreement: Agreement, context: Context, tally: Tally) -> Receipt:
    """What the hand-over did."""
    kv = agreement.mode == "kv"
    again = tuple(f"tried again: {why}" for why in tally.broken)
    return Receipt(
        agreement.mode,
        worst([agreement.exactness, context.exactness]) if kv else Exactness.TEXT,
        bytes_sent=tally.meter.sent,
        bytes_reused=tally.known or 0,
        tokens_reused=len(context) if kv else 0,
        seconds=MappingProxyType(dict(tally.seconds)),
        reasons=(*agreement.reasons, *again),
    )
