"""The plug-in's side in vLLM's worker: copies pages between the store and vLLM's paged cache.

Loads run in a thread of their own while the engine computes for others. A save is copied out of the pages at once,
since vLLM may reuse them after the step; hashing and writing it is the work of another thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock
from time import perf_counter

from avp.blob import seal
from avp.buffers import Buffer
from avp.connectors.vllm_jobs import ENGINE, Jobs, Load, PluginSettings, Report, Save
from avp.connectors.vllm_pages import Pages
from avp.errors import BundleError
from avp.identity import ModelIdentity
from avp.protocols import Store
from avp.segment import PAGE, Exactness, Segment, Want
from avp.telemetry import span

logger = logging.getLogger("avp.vllm")
_AHEAD = 2**30  # bytes that may wait to be written; what comes on top is not saved
_IDLE_SECONDS = 0.05  # that a step without work waits for a load, so that the engine does not spin against it
_PATIENCE = 60.0  # seconds that an answer waits for its saves


@dataclass(frozen=True, slots=True, eq=False)
class Copied:
    """KV copied out of the pages: K and V of each layer."""

    layers: Sequence[tuple[Buffer, Buffer]]

    def read(self, layer: int, part: str) -> Buffer:
        """K or V of a layer, [kv_heads, tokens, head_dim]."""
        return self.layers[layer][part == "v"]


class WorkerSide:
    """Carries out jobs. `pages` is asked for at the first job, when the engine's cache is there."""

    def __init__(
        self,
        settings: PluginSettings,
        identity: ModelIdentity,
        store: Store,
        pages: Callable[[], Pages],
        *,
        ahead: int = _AHEAD,
    ) -> None:
        self._settings, self._identity, self._store = settings, identity, store
        self._make_pages, self._ahead = pages, ahead
        self._made: Pages | None = None
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="avp-load")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="avp-save")
        self._loads: dict[str, Future[set[int]]] = {}
        self._lock = Lock()
        self._waiting_bytes = 0
        self._failed_blocks: set[int] = set()
        self._report = Report()
        self._idle = False

    # --- loads

    def start(self, jobs: Jobs) -> None:
        """Begin the loads of a step."""
        self._idle = jobs.idle
        for load in jobs.loads:
            self._loads[load.request] = self._loader.submit(self._load, load)

    def loaded(self) -> set[str]:
        """The requests whose loads have ended, well or not, since the last call."""
        if self._idle and self._loads:
            wait(self._loads.values(), _IDLE_SECONDS, return_when="FIRST_COMPLETED")
        done = {request for request, future in self._loads.items() if future.done()}
        for request in done:
            self._failed_blocks |= self._loads.pop(request).result()
        return done

    def failed_blocks(self) -> set[int]:
        """The blocks that `loaded` found not to be filled."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def _load(self, load: Load) -> set[int]:
        """Fill the blocks; those that could not be filled."""
        done = 0
        started = perf_counter()
        try:
            with span("load", pages=len(load.pages)):
                while done < len(load.pages):
                    done += self._load_segment(load, done)
        except Exception as error:  # noqa: BLE001 - whatever it was, vLLM computes these blocks
            logger.warning("%d pages of request %s are computed again: %s", len(load.pages) - done, load.request, error)
            self._note(Report(unloaded=frozenset(load.pages[done:])))
        logger.debug("request %s: %d pages in %.1f ms", load.request, done, 1e3 * (perf_counter() - started))
        return set(load.blocks[done:])

    def _load_segment(self, load: Load, done: int) -> int:
        """Fill the blocks from the number `done` on with pages of one segment; how many pages."""
        exact = done < load.exact
        least = Exactness.EXACT if exact else self._settings.accept
        stop = load.exact if exact else len(load.pages)
        want = Want(ENGINE, self._pages().dtype, least)
        blob = self._store.get(load.pages[done], tenant=self._settings.tenant.name, want=want)
        if not blob.model.same_weights(self._identity):
            raise BundleError("the store's segment is of other weights. Fix: remove it (`avp store rm`).")
        segment = blob.segment
        first = segment.pages.index(load.pages[done])
        ours, theirs = load.pages[done:stop], segment.pages[first : len(segment) // PAGE]
        count = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        if not count:
            raise BundleError("the store's segment ends within the page. Fix: remove it (`avp store rm`).")
        start = segment.start + first * PAGE
        part = segment.cut(start, start + count * PAGE)
        for layer in range(len(self._identity.layout.layers)):
            for name in ("k", "v"):
                self._pages().write(layer, name, load.blocks[done : done + count], part.read(layer, name))
        self._pages().settle()
        return count

    # --- saves

    def save(self, jobs: Jobs) -> None:
        """Copy what is to be saved; writing it goes on after this returns, unless an answer waits for it."""
        urgent: list[Future[None]] = []
        for job in jobs.saves:
            size = len(job.tokens) * self._identity.layout.bytes_per_token(self._pages().dtype)
            if self._waiting_bytes + size > self._ahead:
                logger.warning("the store is too slow: %d pages are not saved", len(job.pages))
                self._note(Report(unsaved=frozenset(job.pages)))
                continue
            copied = Copied(self._pages().read(job.blocks, len(job.tokens)))
            self._count(size)
            future = self._writer.submit(self._put, job, copied, size)
            urgent += [future] if job.wait else []
        wait(urgent, _PATIENCE)

    def _put(self, job: Save, copied: Copied, size: int) -> None:
        try:
            tenant = self._settings.tenant.name
            dtype = self._pages().dtype
            want = Want(ENGINE, dtype, job.exactness)
            if not all(self._store.have(job.pages, tenant=tenant, want=want)) or self._is_damaged(job, want):
                segment = Segment(job.start, job.tokens, job.parent, job.pages, dtype, ENGINE, job.exactness, copied)
                self._store.put(seal(self._identity, segment), tenant=tenant)
            self._note(Report(saved=frozenset(job.pages)))
        except Exception as error:  # noqa: BLE001 - what is not saved is computed again
            logger.warning("%d pages are not saved: %s", len(job.pages), error)
            self._note(Report(unsaved=frozenset(job.pages)))
        finally:
            self._count(-size)

    def _is_damaged(self, job: Save, want: Want) -> bool:
        """Whether what the store has of the pages is not what was put: then it makes room for what was computed."""
        tenant = self._settings.tenant.name
        try:
            self._store.get(job.pages[0], tenant=tenant, want=want).verify()
        except BundleError:
            self._store.remove(job.pages[0], tenant=tenant)
            return True
        return False

    # --- both

    def report(self) -> Report:
        """What became of earlier work, since the last call."""
        with self._lock:
            report, self._report = self._report, Report()
        return report

    def close(self) -> None:
        """Finish what was begun, and let go of the store."""
        self._loader.shutdown()
        self._writer.shutdown()
        self._store.close()

    def _pages(self) -> Pages:
        if self._made is None:
            self._made = self._make_pages()
        return self._made

    def _note(self, report: Report) -> None:
        with self._lock:
            self._report = self._report | report

    def _count(self, size: int) -> None:
        with self._lock:
            self._waiting_bytes += size
