"""The store in memory: the laws of a store, no copies, who makes room for whom."""

from __future__ import annotations

import pytest

from avp.blob import Blob
from avp.errors import SegmentMissing, StoreFailed, UsageError
from avp.protocols import Store
from avp.segment import Want
from avp.stores.memory import MemoryStore, open_memory
from avp.testing.store import EXACT, StoreConformance, stored_blobs


class TestMemory(StoreConformance):
    survives = False

    def store(self) -> Store:
        return MemoryStore()

    def small_store(self, budget: int) -> Store:
        return MemoryStore(budget)


def ones(count: int) -> list[Blob]:
    return [stored_blobs(seed=seed, tokens=32)[0] for seed in range(count)]


def here(store: Store, blobs: list[Blob], tenant: str = "a") -> list[bool]:
    return [store.have(blob.entry.pages, tenant=tenant, want=EXACT)[0] for blob in blobs]


def test_a_blob_is_kept_as_it_is() -> None:
    store, (blob,) = MemoryStore(), ones(1)
    store.put(blob, tenant="a")
    assert store.get(blob.entry.pages[0], tenant="a", want=EXACT) is blob


def test_the_least_lately_used_makes_room() -> None:
    blobs = ones(4)
    store = MemoryStore(3 * max(blob.nbytes for blob in blobs))
    for blob in blobs[:3]:
        store.put(blob, tenant="a")
    store.get(blobs[0].entry.pages[0], tenant="a", want=EXACT)
    store.put(blobs[3], tenant="a")
    assert here(store, blobs) == [True, False, True, True]
    assert [entry.page for entry in store.entries()] == [blobs[i].entry.pages[-1] for i in (3, 0, 2)]


def test_a_tenant_over_its_own_budget_makes_room_itself() -> None:
    blobs = ones(4)
    one = max(blob.nbytes for blob in blobs)
    store = MemoryStore(10 * one, tenant_budget=2 * one)
    store.put(blobs[0], tenant="b")
    for blob in blobs:
        store.put(blob, tenant="a")
    assert here(store, blobs) == [False, False, True, True]
    assert here(store, blobs, "b") == [True, False, False, False]
    with pytest.raises(StoreFailed, match=f"does not fit a store of at most {2 * one}"):
        store.put(stored_blobs(tokens=256)[0], tenant="a")


def test_memory_that_changed_after_the_put_is_found() -> None:
    store, (blob,) = MemoryStore(), ones(1)
    store.put(blob, tenant="a")
    array = blob.segment.read(0, "k").array
    array[0, 0, 0] += 1
    assert [entry.page for entry in store.verify()] == [blob.entry.pages[-1]]


def test_what_is_closed_holds_nothing() -> None:
    store, (blob,) = MemoryStore(), ones(1)
    store.put(blob, tenant="a")
    store.close()
    with pytest.raises(SegmentMissing, match=r"no KV of page .* Fix: compute it again"):
        store.get(blob.entry.pages[0], tenant="a", want=Want("e", "bfloat16"))


def test_its_url_says_the_budgets() -> None:
    store = open_memory("memory:?budget=2MiB&tenant_budget=1MiB")
    assert isinstance(store, MemoryStore)
    assert (store.budget, store.tenant_budget) == (2**21, 2**20)
    with pytest.raises(UsageError, match="names a place"):
        open_memory("memory:here")
