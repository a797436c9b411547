"""The verb `fetch`, and the download of a whole bundle: a context goes to a caller that holds its handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

from avp.blob import Blob, seal
from avp.bundle import pack_runs
from avp.context import Context
from avp.delta import outline, outline_to_items, pieces, ranges_from_json
from avp.endpoint.desk import Desk, first_event, text
from avp.greeting import agreement_to_json
from avp.handshake import negotiate
from avp.identity import ModelIdentity
from avp.protocols import Item
from avp.security import Caller
from avp.segment import Segment, with_salt
from avp.telemetry import span


class Giving:
    """See the module."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def fetch(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        """First call, without ranges: the outline. Second call: the pages that the caller lacks."""
        event = await first_event(items)
        session = self._desk.session(event, caller)
        own = self._desk.hello()
        theirs = session.hello or replace(own, modes=("kv",))
        with self._desk.handles.use(text(event, "handle"), caller.tenant) as context:
            sender = own if context.kind == "kv" else replace(own, modes=("tokens", "text"))
            agreement = negotiate(sender, theirs, tokens=len(context.tokens))
            given, segments = await asyncio.to_thread(outline, context, agreement.mode, salt=caller.tenant.salt)
            if event.get("ranges") is None:
                about, skeleton = outline_to_items(given)
                yield {**about, "agreement": agreement_to_json(agreement)}
                yield skeleton
                return
            if given.skeleton.model is None:
                return
            ranges = ranges_from_json(event["ranges"], len(given.pages))
            async with aclosing(
                sealed(given.skeleton.model, pieces(segments, ranges), agreement.codec or "raw")
            ) as blobs:
                async for blob in blobs:
                    yield blob

    def bundle(self, handle: str, caller: Caller) -> tuple[bytes | memoryview, ...]:
        """The context of a handle as a bundle, in runs; the same bytes each time. Raises HandleExpired."""
        with self._desk.handles.use(handle, caller.tenant) as context:
            return pack_runs(without_salt(context))


def without_salt(context: Context) -> Context:
    """The context with the page ids that everybody computes who knows no salt."""
    if context.model is None:
        return context
    return replace(context, segments=with_salt(context.model, context.segments, b""))


async def sealed(model: ModelIdentity, segments: list[Segment], codec: str) -> AsyncGenerator[Blob]:
    """The blobs of segments, in order; the next one is made while this one is used."""
    ahead: asyncio.Task[Blob] | None = None
    try:
        for segment in [*segments, None]:
            done, ahead = ahead, None
            if segment is not None:
                ahead = asyncio.create_task(asyncio.to_thread(_seal, model, segment, codec))
            if done is not None:
                yield await done
    finally:
        if ahead is not None:
            await asyncio.gather(ahead, return_exceptions=True)


def _seal(model: ModelIdentity, segment: Segment, codec: str) -> Blob:
    with span("seal", start=segment.start):
        return seal(model, segment, codec=codec)
