"""The laws of a store, as tests that any store inherits.

```python
class TestMine(StoreConformance):
    def store(self): return MyStore(self.place)
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from avp.blob import Blob, seal
from avp.errors import BundleError, SegmentMissing, StoreFailed
from avp.protocols import Store
from avp.segment import Exactness, Want
from avp.testing.synthetic import synthetic_context

EXACT = Want("e", "bfloat16", Exactness.EXACT)
BOUNDED = Want("e", "bfloat16", Exactness.BOUNDED)


def stored_blobs(
    *,
    seed: int = 0,
    tokens: int = 300,
    engine: str = "e",
    dtype: str = "bfloat16",
    exactness: Exactness = Exactness.EXACT,
    codec: str = "raw",
) -> list[Blob]:
    """The segments of a small synthetic context, sealed; equal arguments give equal bytes."""
    context = synthetic_context(tokens=tokens, seed=seed, dtype=dtype)
    if context.model is None:
        return []
    segments = [replace(segment, engine=engine, exactness=exactness) for segment in context.segments]
    return [seal(context.model, segment, codec=codec) for segment in segments]


def blob_bytes(blob: Blob) -> bytes:
    """The bundle, whole."""
    return b"".join(blob.runs)


class StoreConformance:
    """Subclass it and say what to test; every `test_…` is a law. Each test begins with an empty store."""

    survives = True  # what was put is found by the store that is opened after it

    def store(self) -> Store:
        """The store under test; a second call within a test opens the same place again."""
        raise NotImplementedError

    def small_store(self, budget: int) -> Store | None:
        """An empty store of that budget in bytes; None where it has no budget of its own."""
        return None

    def damage(self, blob: Blob, offset: int, *, tenant: str) -> bool:
        """Flip a bit of what is stored of the blob, at the offset; False where it cannot be reached."""
        return False

    def test_a_segment_comes_back_byte_for_byte(self) -> None:
        with self._opened() as store:
            for codec in ("raw", "lossless"):
                for blob in stored_blobs(codec=codec, engine=codec):
                    store.put(blob, tenant="a")
                    back = store.get(blob.entry.pages[0], tenant="a", want=Want(codec, "bfloat16")).verify()
                    assert blob_bytes(back) == blob_bytes(blob)
                    assert (back.model, back.entry) == (blob.model, blob.entry)

    def test_a_segment_is_found_by_each_of_its_pages_and_by_no_other(self) -> None:
        first, second = stored_blobs()
        with self._opened() as store:
            store.put(first, tenant="a")
            for page in first.entry.pages:
                assert store.get(page, tenant="a", want=EXACT).entry == first.entry
            for page in second.entry.pages:
                assert isinstance(_raised(lambda page=page: store.get(page, tenant="a", want=EXACT)), SegmentMissing)  # type: ignore[misc]

    def test_have_answers_for_many_pages_at_once_in_their_order(self) -> None:
        first, second = stored_blobs()
        with self._opened() as store:
            assert store.have([], tenant="a", want=EXACT) == []
            store.put(second, tenant="a")
            pages = [*second.entry.pages, *first.entry.pages, second.entry.pages[0]]
            expected = [page in second.entry.pages for page in pages]
            assert store.have(pages, tenant="a", want=EXACT) == expected

    def test_putting_it_again_changes_nothing(self) -> None:
        blob = stored_blobs()[0]
        with self._opened() as store:
            for _ in range(3):
                store.put(blob, tenant="a")
            assert len(list(store.entries())) == 1
            assert blob_bytes(store.get(blob.entry.pages[0], tenant="a", want=EXACT)) == blob_bytes(blob)

    def test_the_last_put_of_other_bytes_for_the_same_segment_counts(self) -> None:
        first = stored_blobs()[0]
        other = replace(first.model, id="another/name")
        second = seal(other, first.segment)
        with self._opened() as store:
            store.put(first, tenant="a")
            store.put(second, tenant="a")
            assert store.get(first.entry.pages[0], tenant="a", want=EXACT).verify().model == other
            assert [list(store.verify()), len(list(store.entries()))] == [[], 1]

    def test_threads_may_put_the_same_and_get_at_once(self) -> None:
        blobs = stored_blobs(tokens=600)
        with self._opened() as store, ThreadPoolExecutor(4) as pool:

            def work(_turn: int) -> list[bytes]:
                for blob in blobs:
                    store.put(blob, tenant="a")
                return [blob_bytes(store.get(b.entry.pages[-1], tenant="a", want=EXACT).verify()) for b in blobs]

            expected = [blob_bytes(blob) for blob in blobs]
            assert all(found == expected for found in pool.map(work, range(6)))
            assert len(list(store.entries())) == len(blobs)

    def test_a_lossy_form_never_passes_as_exact(self) -> None:
        exact, lossy = stored_blobs()[0], stored_blobs(exactness=Exactness.BOUNDED)[0]
        page = exact.entry.pages[0]
        with self._opened() as store:
            store.put(lossy, tenant="a")
            assert store.have([page], tenant="a", want=EXACT) == [False]
            assert isinstance(_raised(lambda: store.get(page, tenant="a", want=EXACT)), SegmentMissing)
            assert store.have([page], tenant="a", want=BOUNDED) == [True]
            assert store.get(page, tenant="a", want=BOUNDED).entry.exactness is Exactness.BOUNDED
            store.put(exact, tenant="a")
            for want in (EXACT, BOUNDED):
                assert store.get(page, tenant="a", want=want).entry.exactness is Exactness.EXACT
            assert len(list(store.entries())) == 2

    def test_another_engine_or_dtype_is_bounded_to_who_takes_it(self) -> None:
        forms = [stored_blobs(engine="other")[0], stored_blobs(dtype="float32")[0]]
        page = forms[0].entry.pages[0]
        with self._opened() as store:
            for blob in forms:
                store.put(blob, tenant="a")
                assert store.have([page], tenant="a", want=EXACT) == [False]
                assert store.have([page], tenant="a", want=BOUNDED) == [True]
            own = stored_blobs(exactness=Exactness.BOUNDED)[0]
            store.put(own, tenant="a")
            assert store.get(page, tenant="a", want=Want("other", "bfloat16")).entry.engine == "other"
            assert store.get(page, tenant="a", want=Want("e", "float32")).entry.dtype == "float32"
            assert store.get(page, tenant="a", want=BOUNDED).entry.exactness is Exactness.EXACT

    def test_the_segment_with_most_pages_is_given(self) -> None:
        long = stored_blobs(tokens=250)[0]
        short = seal(long.model, long.segment.cut(0, 70))
        shared = long.entry.pages[:2]
        for order in ((long, short), (short, long)):
            with self._opened() as store:
                for blob in order:
                    store.put(blob, tenant=f"first {len(order[0].entry.pages)}")
                for page in shared:
                    found = store.get(page, tenant=f"first {len(order[0].entry.pages)}", want=EXACT)
                    assert found.entry == long.entry

    def test_a_removed_segment_is_gone_in_all_forms(self) -> None:
        first, second = stored_blobs()
        lossy = stored_blobs(exactness=Exactness.BOUNDED)[0]
        with self._opened() as store:
            for blob in (first, second, lossy):
                store.put(blob, tenant="a")
            assert store.remove(first.entry.pages[2], tenant="a") == 2
            assert store.have(first.entry.pages, tenant="a", want=BOUNDED) == [False] * len(first.entry.pages)
            assert store.have(second.entry.pages, tenant="a", want=EXACT) == [True] * len(second.entry.pages)
            assert store.remove(first.entry.pages[2], tenant="a") == 0

    def test_removing_a_segment_leaves_others_that_share_pages_with_it(self) -> None:
        long = stored_blobs(tokens=250)[0]
        short = seal(long.model, long.segment.cut(0, 64))
        with self._opened() as store:
            store.put(long, tenant="a")
            store.put(short, tenant="a")
            assert store.remove(long.entry.pages[-1], tenant="a") == 1
            assert store.have(long.entry.pages, tenant="a", want=EXACT) == [True] * 2 + [False] * 6
            assert store.get(short.entry.pages[0], tenant="a", want=EXACT).verify().entry == short.entry

    def test_entries_say_what_is_here(self) -> None:
        blobs = stored_blobs(codec="lossless")
        with self._opened() as store:
            assert list(store.entries()) == []
            for blob in blobs:
                store.put(blob, tenant="a")
            found = {entry.page: entry for entry in store.entries()}
            assert len(found) == len(blobs)
            for blob in blobs:
                entry, said = blob.entry, found[blob.entry.pages[-1]]
                assert (said.tenant, said.start, said.count) == ("a", entry.start, entry.count)
                assert (said.dtype, said.engine, said.codec) == (entry.dtype, entry.engine, entry.codec)
                assert (said.exactness, said.nbytes) == (entry.exactness, blob.nbytes)
                assert 0 < said.created <= said.used

    def test_a_tenant_sees_only_its_own(self) -> None:
        blobs = stored_blobs()
        pages = [page for blob in blobs for page in blob.entry.pages]
        with self._opened() as store:
            for blob in blobs:
                store.put(blob, tenant="a")
            for other in ("b", "", "a ", "A", "a/../a", "*"):
                assert not any(store.have(pages, tenant=other, want=BOUNDED))
                assert isinstance(_raised(lambda t=other: store.get(pages[0], tenant=t, want=BOUNDED)), SegmentMissing)  # type: ignore[misc]
                assert store.remove(pages[0], tenant=other) == 0
                assert list(store.entries(tenant=other)) == []
            store.put(blobs[0], tenant="")
            assert [entry.tenant for entry in store.entries(tenant="")] == [""]
            assert {entry.tenant for entry in store.entries(tenant="a")} == {"a"}
            assert len(list(store.entries())) == len(blobs) + 1
            assert store.remove(pages[0], tenant="") == 1
            assert all(store.have(pages, tenant="a", want=EXACT))

    def test_collecting_and_verifying_leave_what_is_good(self) -> None:
        blobs = stored_blobs()
        with self._opened() as store:
            for blob in blobs:
                store.put(blob, tenant="a")
            assert store.collect() == 0
            assert list(store.verify()) == []
            assert all(store.have([page for b in blobs for page in b.entry.pages], tenant="a", want=EXACT))

    def test_what_is_over_the_budget_makes_room(self) -> None:
        blobs = [stored_blobs(seed=seed, tokens=32)[0] for seed in range(6)]
        store = self.small_store(3 * blobs[0].nbytes + 64)
        if store is None:
            return
        with _closing(store):
            for blob in blobs:
                store.put(blob, tenant="a")
            held = [store.have(blob.entry.pages, tenant="a", want=EXACT)[0] for blob in blobs]
            assert sum(entry.nbytes for entry in store.entries()) <= 3 * blobs[0].nbytes + 64
            assert held[-1]
            assert sum(held) in (2, 3)
            assert store.collect() == 0
            large = stored_blobs(tokens=256)[0]
            assert isinstance(_raised(lambda: store.put(large, tenant="a")), StoreFailed)

    def test_a_damaged_byte_is_never_given_as_good(self) -> None:
        blob = stored_blobs()[0]
        size, header = blob.nbytes, len(blob.header)
        steps = range(3, header, max(header // 20, 1))
        for offset in [0, 7, 8, header - 1, *steps, header, (header + size) // 2, size - 1]:
            with self._opened() as store:
                store.put(blob, tenant="a")
                if not self.damage(blob, offset, tenant="a"):
                    return
                error = _raised(lambda store=store: store.get(blob.entry.pages[0], tenant="a", want=EXACT).verify())  # type: ignore[misc]
                assert isinstance(error, BundleError), f"offset {offset}: {error!r}"
                assert [entry.page for entry in store.verify()] == [blob.entry.pages[-1]], f"offset {offset}"
                store.put(blob, tenant="a")  # a good copy takes its place
                back = store.get(blob.entry.pages[0], tenant="a", want=EXACT).verify()
                assert blob_bytes(back) == blob_bytes(blob)

    def test_a_store_that_is_opened_again_has_it_all(self) -> None:
        if not self.survives:
            return
        blobs = stored_blobs()
        with self._opened() as store:
            for blob in blobs:
                store.put(blob, tenant="a")
        with self._opened() as store:
            for blob in blobs:
                back = store.get(blob.entry.pages[0], tenant="a", want=EXACT).verify()
                assert blob_bytes(back) == blob_bytes(blob)
            assert len(list(store.entries())) == len(blobs)

    def test_a_store_may_be_closed_twice(self) -> None:
        store = self.store()
        store.close()
        store.close()

    @contextmanager
    def _opened(self) -> Iterator[Store]:
        with _closing(self.store()) as store:
            yield store


@contextmanager
def _closing(store: Store) -> Iterator[Store]:
    try:
        yield store
    finally:
        store.close()


def _raised(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the type is what the law is about
        return error
    return None
