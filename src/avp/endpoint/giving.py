"""The verb `fetch`, and the download of a whole bundle: a context goes to a caller that holds its handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

from avp.bundle import pack_runs
from avp.context import Context
from avp.delta import outline, outline_to_items, pieces, ranges_from_json, sealed, sender_of
from avp.endpoint.desk import Desk, first_event, text
from avp.errors import UsageError
from avp.greeting import agreement_to_json, hello_to_json
from avp.handshake import negotiate
from avp.protocols import Item
from avp.security import Caller
from avp.segment import with_salt


class Giving:
    """See the module."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def fetch(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        """First call, without ranges: the outline. Second call: the pages that the caller lacks."""
        event = await first_event(items)
        session = self._desk.session(event, caller)
        if session.hello is None:
            raise UsageError("the session was opened without a hello. Fix: shake hands first.")
        with self._desk.handles.use(text(event, "handle"), caller.tenant) as context:
            sender = sender_of(self._desk.hello(), context)
            agreement = negotiate(sender, session.hello, tokens=len(context.tokens))
            given, segments = await asyncio.to_thread(outline, context, agreement.mode, salt=caller.tenant.salt)
            if event.get("ranges") is None:
                about, skeleton = outline_to_items(given)
                yield {**about, "sender": hello_to_json(sender), "agreement": agreement_to_json(agreement)}
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
