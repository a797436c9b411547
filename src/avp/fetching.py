"""The receiver's side of a fetch: learn what a handle stands for, take what is not here, resume where it broke."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter

from avp.blob import Blob, seal
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
from avp.endpoint.giving import without_salt
from avp.errors import BundleError, ConnectionFailed, SegmentMissing
from avp.greeting import agreement_to_json, hello_from_json
from avp.handshake import Agreement, negotiate
from avp.protocols import Event, Store
from avp.receipt import Receipt
from avp.security import Tenant
from avp.segment import LATENT, PAGE, Want, page_ids, root_page
from avp.transfer import Link, Tally, each, persist, receipt


class Fetch:
    """One fetch."""

    def __init__(self, link: Link, handle: str, store: Store | None, tenant: Tenant, tally: Tally) -> None:
        self._link = link
        self._handle = handle
        self._store = store
        self._tenant = tenant
        self._tally = tally
        self._came: dict[str, Blob] = {}  # by our own page ids
        self._context: Context | None = None
        self._agreement: Agreement | None = None

    async def run(self) -> tuple[Context, Receipt]:
        """The whole context."""
        started = perf_counter()
        await persist(self._once, self._tally)
        if self._context is None or self._agreement is None:
            raise ConnectionFailed("the fetch ended without a context. Fix: run the same version of avp at both ends.")
        self._tally.add("total", started)
        done = receipt(self._agreement, self._context, self._tally)
        return without_salt(self._context), replace(done, bytes_sent=self._tally.meter.received)  # from there to here

    async def _once(self) -> Event:
        theirs = await self._outline()
        if theirs.skeleton.kind != "kv":
            self._context = theirs.skeleton
            return {}
        ours = self._local(theirs)
        lacking = await asyncio.to_thread(self._lacking, ours)
        if self._tally.known is None:
            self._tally.known = theirs.nbytes(((0, len(theirs.pages)),)) - theirs.nbytes(lacking) if theirs.pages else 0
        if lacking:
            await self._take(theirs, ours, lacking)
        self._context = await asyncio.to_thread(self._assemble, ours)
        return {}

    async def _outline(self) -> Outline:
        started = perf_counter()
        event = {"session": self._link.session, "handle": self._handle, "ranges": None}
        async with self._link.channel.call("fetch", each([event]), meter=self._tally.meter) as answer:
            about = await anext(answer, None)
            if not isinstance(about, Mapping):
                raise ConnectionFailed("a fetch was answered by no event. Fix: check that the other end speaks AVP.")
            given = outline_from_items(about, await anext(answer, None), salt=self._link.salt)
            async for _ in answer:
                pass
        self._agreement = self._check_agreement(about, given)
        self._tally.add("have", started)
        return given

    def _check_agreement(self, about: Event, given: Outline) -> Agreement:
        sender = hello_from_json(about.get("sender"), limits=self._link.own.limits)
        agreement = negotiate(sender, self._link.own, tokens=given.count)
        if about.get("agreement") != agreement_to_json(agreement):
            raise ConnectionFailed(
                "the two ends computed different agreements from the same hellos. "
                "Fix: run the same version of avp at both."
            )
        check_outline(given, sender, agreement)
        return agreement

    def _local(self, theirs: Outline) -> Outline:
        """The outline under our own page ids, which differ where the tenants' salts do."""
        skeleton = theirs.skeleton
        tokens = skeleton.tokens[: len(skeleton)]
        if self._tenant.salt == self._link.salt or LATENT in tokens or skeleton.model is None:
            return theirs
        return replace(theirs, pages=page_ids(root_page(skeleton.model, salt=self._tenant.salt), tokens))

    def _lacking(self, ours: Outline) -> Ranges:
        every: Ranges = ((0, len(ours.pages)),) if ours.pages else ()
        if self._store is not None and self._agreement is not None:
            every = missing(ours, self._store, tenant=self._tenant.name, least=self._agreement.exactness)
        return to_ranges(index for index in pages_of(every) if ours.pages[index] not in self._came)

    async def _take(self, theirs: Outline, ours: Outline, lacking: Ranges) -> None:
        started = perf_counter()
        ranges = [list(each) for each in lacking]
        event = {"session": self._link.session, "handle": self._handle, "ranges": ranges}
        storing: asyncio.Task[None] | None = None
        try:
            async with self._link.channel.call("fetch", each([event]), meter=self._tally.meter) as answer:
                async for item in answer:
                    if not isinstance(item, Blob) or self._agreement is None:
                        raise BundleError("something came where a segment was due. Fix: upgrade the other end.")
                    check_piece(item, theirs, least=self._agreement.exactness)
                    if storing is not None:
                        await storing
                    storing = asyncio.create_task(asyncio.to_thread(self._keep, item, ours))
            if storing is not None:
                await storing
        finally:
            if storing is not None:
                await asyncio.gather(storing, return_exceptions=True)
            self._tally.add("receive", started)

    def _keep(self, blob: Blob, ours: Outline) -> None:
        blob.verify()
        first = blob.segment.start // PAGE
        pages = ours.pages[first : first + len(blob.segment.pages)]
        if pages != blob.segment.pages:
            parent = ours.pages[first - 1] if first else root_page(blob.model, salt=self._tenant.salt)
            blob = seal(blob.model, replace(blob.segment, pages=pages, parent=parent))
        if self._store is not None:
            self._store.put(blob, tenant=self._tenant.name)
        self._came.update(dict.fromkeys(pages, blob))

    def _assemble(self, ours: Outline) -> Context:
        agreement = self._agreement
        if agreement is None:
            raise ConnectionFailed("the fetch has no agreement. Fix: shake hands first.")

        def find(page: str, want: Want) -> Blob:
            if page in self._came:
                return self._came[page]
            if self._store is None:
                raise SegmentMissing(f"page {page[:12]}… was asked for and did not come. Fix: fetch it again.")
            return self._store.get(page, tenant=self._tenant.name, want=want)

        return assemble(ours, find, least=agreement.exactness)
