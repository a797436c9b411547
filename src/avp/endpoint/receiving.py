"""The verbs `have` and `receive`: a context is announced, what is missing of it comes, a handle is given."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from avp.blob import Blob
from avp.context import Context
from avp.delta import (
    Outline,
    Ranges,
    assemble,
    check_outline,
    check_piece,
    missing,
    outline_from_items,
    pages_of,
    to_ranges,
)
from avp.direct import ended
from avp.endpoint.desk import Desk, as_event, blob_expected, first_event, in_time, text, timely
from avp.errors import BundleError, ContextTooLong, HandleExpired, SegmentMissing, UsageError
from avp.greeting import agreement_to_json
from avp.handshake import Agreement, negotiate
from avp.protocols import Item
from avp.security import Caller
from avp.segment import PAGE, SEGMENT, Want
from avp.session import Reservation, Session
from avp.telemetry import span

_PATIENCE = 60.0  # seconds that room is kept for a hand-over of which nothing comes
_SLOWEST = 1 << 16  # bytes a second: a line that carries less counts as none
_AT_ONCE = 2  # segments of a hand-over that are verified and stored side by side: both wait for memory, or a disk


@dataclass(slots=True, eq=False)
class _Transfer:
    """A hand-over that was announced; its missing segments are due."""

    given: Outline
    session: Session
    agreement: Agreement
    room: Reservation
    due: Ranges  # the pages that are to come
    expires: float  # when its room is given to others
    blobs: dict[str, Blob] = field(default_factory=dict)  # by page id


class Receiving:
    """See the module."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._transfers: dict[str, _Transfer] = {}

    async def have(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        """What is missing of a context; the handle, if nothing is."""
        event = await first_event(items)
        session = self._desk.handles.session(text(event, "session"), caller.tenant)
        if session.hello is None or session.own is None:
            raise UsageError("the session was opened without a hello. Fix: shake hands first.")
        given = outline_from_items(event, await anext(items, None), salt=caller.tenant.salt)
        agreement = negotiate(session.hello, session.own, tokens=given.count)
        check_outline(given, session.hello, agreement)
        self._check_length(given)
        reply: dict[str, object] = {"agreement": agreement_to_json(agreement)}
        with span("have", pages=len(given.pages)):
            lacking = await asyncio.to_thread(self._missing, given, agreement, caller)
        if not lacking:
            context = await asyncio.to_thread(self._assemble, given, agreement, caller, {})
            yield {**reply, "missing": [], **self._desk.keep(context, session)}
            return
        self._sweep()
        room = self._desk.handles.reserve(caller.tenant, given.nbytes(lacking))
        name = secrets.token_urlsafe(16)
        self._transfers[name] = _Transfer(given, session, agreement, room, lacking, time.monotonic() + _PATIENCE)
        yield {**reply, "missing": [list(each) for each in lacking], "transfer": name}

    async def receive(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        """Segments of an announced context; each is kept as soon as it is whole and verified. Then the handle."""
        event = as_event(await in_time(items, seconds=self._desk.rules.quota.idle))
        name = text(event, "transfer")
        transfer = self._transfers.get(name)
        if transfer is None or transfer.session.tenant != caller.tenant or self._transfers.pop(name, None) is None:
            raise HandleExpired("nothing is announced under that name, or no longer. Fix: announce it again (`have`).")
        try:
            async with ended(timely(items, seconds=_patience(transfer.given))) as segments:
                await self._take(segments, transfer, caller)
            lacking = await asyncio.to_thread(self._lacking, transfer, caller)
            if lacking and not set(pages_of(lacking)) <= set(pages_of(transfer.due)):
                raise SegmentMissing(
                    "the store dropped pages that it held when the hand-over was announced. Fix: hand it over again; "
                    "what came is kept."
                )
            if lacking:
                raise BundleError(
                    f"the hand-over ended and pages {list(lacking)[:4]} did not come. Fix: hand it over again; what "
                    "came is kept."
                )
            with span("assemble", pages=len(transfer.given.pages)):
                context = await asyncio.to_thread(
                    self._assemble, transfer.given, transfer.agreement, caller, transfer.blobs
                )
        finally:
            transfer.room.release()
        yield self._desk.keep(context, transfer.session)

    async def _take(self, items: AsyncIterator[Item], transfer: _Transfer, caller: Caller) -> None:
        """Receive segments while those before are verified and stored."""
        storing: deque[asyncio.Task[None]] = deque()
        due = set(pages_of(transfer.due))
        try:
            async for item in items:
                if not isinstance(item, Blob):
                    raise blob_expected(item)
                check_piece(item, transfer.given, least=transfer.agreement.exactness)
                pages = range(item.segment.start // PAGE, -(-item.segment.stop // PAGE))
                if not due.issuperset(pages):  # nobody replaces what is here already
                    raise BundleError("a segment came that was not missing. Fix: send what `have` asked for, once.")
                due.difference_update(pages)
                if len(storing) == _AT_ONCE:
                    await storing.popleft()
                storing.append(asyncio.create_task(asyncio.to_thread(self._keep, item, transfer, caller)))
            while storing:
                await storing.popleft()
        finally:
            await asyncio.gather(*storing, return_exceptions=True)

    def _keep(self, blob: Blob, transfer: _Transfer, caller: Caller) -> None:
        with span("verify", start=blob.segment.start):
            blob.verify()
        with span("store", start=blob.segment.start):
            self._desk.store.put(blob, tenant=caller.tenant.name)
        transfer.blobs.update(dict.fromkeys(blob.segment.pages, blob))

    def _check_length(self, given: Outline) -> None:
        skeleton, connector = given.skeleton, self._desk.connector
        if connector is not None and len(skeleton.tokens) > connector.max_positions and skeleton.kind == "kv":
            raise ContextTooLong(
                f"a context of {len(skeleton.tokens)} tokens was announced and {connector.identity.id} has "
                f"{connector.max_positions} positions. Nothing was sent. Fix: hand over a shorter context."
            )

    def _missing(self, given: Outline, agreement: Agreement, caller: Caller) -> Ranges:
        return missing(given, self._desk.store, tenant=caller.tenant.name, least=agreement.exactness)

    def _lacking(self, transfer: _Transfer, caller: Caller) -> Ranges:
        """Pages that neither came nor are in the store."""
        given = transfer.given
        absent = [index for index, page in enumerate(given.pages) if page not in transfer.blobs]
        if not absent:
            return ()
        stored = set(range(len(given.pages)))
        for start, stop in self._missing(given, transfer.agreement, caller):
            stored -= set(range(start, stop))
        return to_ranges(index for index in absent if index not in stored)

    def _assemble(self, given: Outline, agreement: Agreement, caller: Caller, came: dict[str, Blob]) -> Context:
        if given.skeleton.kind != "kv":
            return given.skeleton

        def find(page: str, want: Want) -> Blob:
            return came[page] if page in came else self._desk.store.get(page, tenant=caller.tenant.name, want=want)

        return assemble(given, find, least=agreement.exactness)

    def _sweep(self) -> None:
        now = time.monotonic()
        for name, transfer in list(self._transfers.items()):
            if transfer.expires <= now and self._transfers.pop(name, None) is not None:
                transfer.room.release()


def _patience(given: Outline) -> float:
    """Seconds in which each segment must be whole: it may have to be computed, and to go over a slow line."""
    largest = given.nbytes(((0, min(SEGMENT // PAGE, len(given.pages))),)) if given.pages else 0
    return _PATIENCE + largest / _SLOWEST
