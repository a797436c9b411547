"""The plug-in's side in vLLM's scheduler: which pages of a request are in the store, and which are to be put there.

Pages are named by the ids of the tokens, never by vLLM's blocks, so that any process of the tenant finds them.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from blake3 import blake3

from avp.connectors.vllm_jobs import ENGINE, FIELD, Asked, Jobs, Load, PluginSettings, Report, Save
from avp.errors import StoreFailed, UsageError
from avp.identity import ModelIdentity
from avp.protocols import Store
from avp.segment import PAGE, SEGMENT, Exactness, Want, page_id, root_page

logger = logging.getLogger("avp.vllm")
_REST_SECONDS = 30.0  # without questions to a store that failed: each could take its whole time-out
_KEPT = 2**17  # pages that are remembered as stored
_BOUNDED = 2**20  # pages that are remembered as not exact; after so many, all count as such


class EngineRequest(Protocol):
    """What the plug-in reads of vLLM's own `Request`."""

    request_id: str
    all_token_ids: Sequence[int]
    num_prompt_tokens: int
    kv_transfer_params: Mapping[str, object] | None
    cache_salt: str | None
    lora_request: object | None
    mm_features: Sequence[object]
    prompt_embeds: object | None


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request in one step: its positions before the step, those that the step computes, and its blocks, which are
    asked for only where something is saved.
    """

    request: str
    before: int
    count: int
    blocks: Callable[[], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Looked:
    """What the store said of the pages [first, stop): it holds those before `exact` as they are, those before `found`
    in some form that will do.
    """

    first: int
    exact: int
    found: int
    stop: int


@dataclass(slots=True)
class Tracked:
    """A request under way."""

    request: EngineRequest
    asked: Asked
    root: str
    pages: list[str] = field(default_factory=list)
    looked: Looked = Looked(0, 0, 0, 0)
    asked_once: bool = False
    loading: bool = False  # a load was begun: if vLLM asks again, it failed
    begun: bool = False
    cached: int = 0  # positions that the engine had, or was given, when it began to compute
    loaded: int = 0  # of these, positions out of the store
    computed: int = 0
    decided: int = 0  # pages of which it is settled whether they are put into the store
    bounded_from: int | None = None  # the first page whose KV is no longer exact
    tail: bool = False
    reasons: tuple[str, ...] = ()

    def extend(self, tokens: int) -> None:
        """Know the ids of all full pages of the first `tokens` positions."""
        ids = self.request.all_token_ids
        while len(self.pages) < tokens // PAGE:
            start = len(self.pages) * PAGE
            self.pages.append(page_id(self.parent(len(self.pages)), ids[start : start + PAGE]))

    def parent(self, page: int) -> str:
        """The id of the page before."""
        return self.pages[page - 1] if page else self.root


class SchedulerSide:
    """Decides what is loaded and saved. One thread; the store is asked, never written to."""

    def __init__(
        self,
        settings: PluginSettings,
        identity: ModelIdentity,
        dtype: str,
        store: Store,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._identity, self._dtype, self._store, self._clock = settings, identity, dtype, store, clock
        self._requests: dict[str, Tracked] = {}
        self._loads: list[Load] = []
        self._kept: OrderedDict[str, None] = OrderedDict()  # pages that are in the store, or on their way there
        self._broken: set[str] = set()  # pages that the store has and that could not be loaded
        self._bounded: set[str] = set()  # pages in vLLM's own cache that are not exact
        self._rest_until = 0.0

    # --- vLLM asks

    def find(self, request: EngineRequest, computed: int) -> int:
        """How many positions after the first `computed` the store can give; at least one is left to compute."""
        tracked = self._track(request)
        if tracked is None or tracked.begun or tracked.loading:
            return 0
        first = computed // PAGE
        if not tracked.asked_once or tracked.looked.first != first:
            tracked.asked_once, tracked.looked = True, self._look(tracked, first)
        return (tracked.looked.found - first) * PAGE

    def allocated(self, request: EngineRequest, blocks: Sequence[int], count: int) -> None:
        """Blocks were set aside for `count` positions that `find` promised."""
        tracked = self._requests.get(request.request_id)
        if not count or tracked is None:
            return
        first = tracked.looked.first
        stop = first + count // PAGE
        pages = tuple(tracked.pages[first:stop])
        tracked.loading = True
        self._loads.append(Load(request.request_id, pages, tuple(blocks[first:stop]), tracked.looked.exact - first))

    def step(self, scheduled: Iterable[Scheduled]) -> Jobs:
        """The work that goes with a step."""
        loads, self._loads = tuple(self._loads), []
        saves: list[Save] = []
        idle = True
        for each in scheduled:
            idle = False
            tracked = self._requests.get(each.request)
            if tracked is not None:
                tracked.computed += each.count
                try:
                    self._begin(tracked, each)
                    saves += self._saves(tracked, each)
                except Exception as error:  # noqa: BLE001 - what is not saved is computed again; loads must go out
                    logger.warning("nothing more of request %s is saved: %s", each.request, error)
                    del self._requests[each.request]
        return Jobs(loads, tuple(saves), idle)

    def finished(self, request: EngineRequest) -> dict[str, object] | None:
        """What the answer says of the request; the handle is the id of its last full page."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return None
        full = min(tracked.cached + tracked.computed, len(request.all_token_ids) - 1) // PAGE
        tracked.extend(full * PAGE)
        inexact = tracked.bounded_from is not None and tracked.bounded_from < full
        return {
            FIELD: {
                "handle": tracked.pages[full - 1] if full else None,
                "tokens": full * PAGE,
                "root": tracked.root,
                "weights": self._identity.weights,
                "dtype": self._dtype,
                "accept": self._settings.accept.label,
                "loaded": tracked.loaded,
                "local": tracked.cached - tracked.loaded,
                "computed": tracked.computed,
                "exactness": (Exactness.BOUNDED if inexact else Exactness.EXACT).label,
                "reasons": list(tracked.reasons),
            }
        }

    def learn(self, report: Report) -> None:
        """What the worker's side says of earlier work."""
        for page in report.saved:
            self._broken.discard(page)
        for page in report.unsaved | report.unloaded:
            self._kept.pop(page, None)
        if self._settings.save != "nothing":  # else nobody would put them right
            self._broken |= report.unloaded
        for tracked in self._requests.values() if report.unloaded else ():
            tracked.looked = _without(tracked.looked, tracked.pages, report.unloaded)

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()

    # --- what is in the store

    def _track(self, request: EngineRequest) -> Tracked | None:
        """None: its KV does not follow from token ids and these weights alone."""
        known = self._requests.get(request.request_id)
        if known is None:
            if request.lora_request is not None or request.mm_features or request.prompt_embeds is not None:
                return None
            root = root_page(self._identity, salt=self._salt(request.cache_salt))
            known = Tracked(request, Asked(), root)
            try:
                known.asked = Asked.of(request.kv_transfer_params)
            except UsageError as error:
                known.reasons = (str(error),)
            self._requests[request.request_id] = known
        return known

    def _salt(self, extra: str | None) -> bytes:
        """The tenant's salt; with vLLM's own `cache_salt`, one that both decide."""
        salt = self._settings.tenant.salt
        return salt if not extra else blake3(extra.encode(), key=blake3(salt).digest()).digest()

    def _look(self, tracked: Tracked, first: int) -> Looked:
        most = max((len(tracked.request.all_token_ids) - 1) // PAGE, first)
        tracked.extend(most * PAGE)
        pages = _as_asked(tracked.pages[first:most], tracked.asked)
        if not pages or self._clock() < self._rest_until:
            return Looked(first, first, first, most)
        exact = found = self._leading(pages, Exactness.EXACT)
        if self._settings.accept > Exactness.EXACT and exact < len(pages):
            found = max(exact, self._leading(pages, self._settings.accept))
        for page in pages[:found]:
            self._keep(page)
        return Looked(first, first + exact, first + found, most)

    def _leading(self, pages: Sequence[str], at_least: Exactness) -> int:
        want = Want(ENGINE, self._dtype, at_least)
        try:
            here = self._store.have(pages, tenant=self._settings.tenant.name, want=want)
        except StoreFailed:
            self._rest_until = self._clock() + _REST_SECONDS
            raise
        good = [found and page not in self._broken for page, found in zip(pages, here, strict=True)]
        return good.index(False) if False in good else len(good)

    # --- what is put there

    def _begin(self, tracked: Tracked, each: Scheduled) -> None:
        """At its first step: what came from where, and from which page on it is not exact."""
        if tracked.begun:
            return
        tracked.begun, tracked.cached = True, each.before
        have, looked = each.before // PAGE, tracked.looked
        tracked.extend(each.before)
        tracked.loaded = max(min(have, looked.found) - looked.first, 0) * PAGE
        inexact = [i for i, page in enumerate(tracked.pages[:have]) if self._is_bounded(page)]
        if looked.exact < min(have, looked.found):
            inexact.append(looked.exact)
        if inexact:
            tracked.bounded_from = min(inexact)
            self._remember(tracked.pages[tracked.bounded_from : have])

    def _saves(self, tracked: Tracked, each: Scheduled) -> list[Save]:
        known = len(tracked.request.all_token_ids)
        if self._settings.save == "prompt":
            known = min(known, tracked.request.num_prompt_tokens)
        ready = min(each.before + each.count, known)
        first, full = tracked.decided, max(ready // PAGE, tracked.decided)
        tracked.extend(ready)
        tracked.decided = full
        if tracked.bounded_from is not None:
            self._remember(tracked.pages[max(first, tracked.bounded_from) : full])
        if self._settings.save == "nothing":
            return []
        runs = _runs(self._lacking(tracked, first, full), tracked.bounded_from)
        tail = self._is_due(tracked, ready)
        blocks = each.blocks() if runs or tail else ()
        saves = [self._save(tracked, start, stop, blocks) for start, stop in runs]
        return [*saves, self._tail(tracked, blocks)] if tail else saves

    def _lacking(self, tracked: Tracked, first: int, full: int) -> list[int]:
        """The pages, by number, that are to be put into the store."""
        pages = tracked.pages[first:full]
        if tracked.asked.wait and pages:  # the answer promises that all of it is there: ask the store, not the memory
            least = Exactness.EXACT if tracked.bounded_from is None else Exactness.BOUNDED
            want = Want(ENGINE, self._dtype, least)
            here = self._store.have(pages, tenant=self._settings.tenant.name, want=want)
        else:
            here = [self._is_kept(tracked, first + i) for i in range(len(pages))]
        lacking = [first + i for i, page in enumerate(pages) if not here[i] or page in self._broken]
        for page in lacking:
            self._keep(tracked.pages[page])
        return lacking

    def _is_kept(self, tracked: Tracked, page: int) -> bool:
        """Whether a page is in the store, as far as this side knows."""
        looked = tracked.looked
        if looked.first <= page < looked.stop:
            return page < min(looked.found, tracked.cached // PAGE)
        return tracked.pages[page] in self._kept

    def _save(self, tracked: Tracked, start: int, stop: int, blocks: Sequence[int]) -> Save:
        inexact = tracked.bounded_from is not None and tracked.bounded_from < stop
        return Save(
            start * PAGE,
            tuple(tracked.request.all_token_ids[start * PAGE : stop * PAGE]),
            tracked.parent(start),
            tuple(tracked.pages[start:stop]),
            tuple(blocks[start:stop]),
            Exactness.BOUNDED if inexact else Exactness.EXACT,
            tracked.asked.wait,
        )

    def _is_due(self, tracked: Tracked, ready: int) -> bool:
        """Whether the prompt's last page is to be saved now, which is not full."""
        prompt = tracked.request.num_prompt_tokens
        return tracked.asked.tail and not tracked.tail and prompt % PAGE > 0 and ready >= prompt

    def _tail(self, tracked: Tracked, blocks: Sequence[int]) -> Save:
        tracked.tail = True
        prompt = tracked.request.num_prompt_tokens
        page = prompt // PAGE
        tokens = tuple(tracked.request.all_token_ids[page * PAGE : prompt])
        parent = tracked.parent(page)
        grade = Exactness.EXACT if tracked.bounded_from is None else Exactness.BOUNDED
        pages = (page_id(parent, tokens),)
        return Save(page * PAGE, tokens, parent, pages, (blocks[page],), grade, tracked.asked.wait)

    # --- what is remembered

    def _keep(self, page: str) -> None:
        self._kept[page] = None
        self._kept.move_to_end(page)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)

    def _remember(self, pages: Iterable[str]) -> None:
        """These pages of vLLM's own cache are not exact."""
        if len(self._bounded) < _BOUNDED:
            self._bounded.update(pages)

    def _is_bounded(self, page: str) -> bool:
        """Whether vLLM's own cache may hold KV of another engine in this page, or KV computed after such."""
        return page in self._bounded or len(self._bounded) >= _BOUNDED


def _without(looked: Looked, pages: Sequence[str], broken: frozenset[str]) -> Looked:
    """What was found, up to the first page that could not be loaded."""
    stop = next((i for i in range(looked.first, looked.found) if pages[i] in broken), looked.found)
    return replace(looked, exact=min(looked.exact, stop), found=stop)


def _as_asked(pages: Sequence[str], asked: Asked) -> Sequence[str]:
    if asked.pages is not None:
        wrong = next((i for i, page in enumerate(pages) if page not in asked.pages), len(pages))
        pages = pages[:wrong]
    if asked.handle is not None:
        pages = pages[: pages.index(asked.handle) + 1] if asked.handle in pages else ()
    return pages


def _runs(pages: Sequence[int], bounded_from: int | None) -> list[tuple[int, int]]:
    """Numbers of pages as ranges [start, stop) of one segment each: without a gap, of one class, of at most 8 pages."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][1] == page and page - runs[-1][0] < SEGMENT // PAGE and page != bounded_from:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return runs
