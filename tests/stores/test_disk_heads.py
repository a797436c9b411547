"""Headers that a store on disk keeps as it read them: the files still have the last word."""

from __future__ import annotations

from pathlib import Path

import pytest

from avp.blob import Blob
from avp.errors import BundleError, DigestMismatch
from avp.stores import disk
from avp.stores.disk import DiskStore
from avp.testing.store import EXACT, blob_bytes, stored_blobs


def file_of(store: DiskStore) -> Path:
    (path,) = (store.folder / "segments").glob("*/*.avp")
    return path


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def one(seed: int = 0) -> Blob:
    return stored_blobs(seed=seed, tokens=32)[0]


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "store")


def test_a_segment_that_was_read_before_is_read_again_as_it_is(store: DiskStore) -> None:
    blob = one()
    store.put(blob, tenant="a")
    for _ in range(3):
        back = store.get(blob.entry.pages[0], tenant="a", want=EXACT)
        assert blob_bytes(back.verify()) == blob_bytes(blob)


@pytest.mark.parametrize("offset", [0, 3, 8, 40, 200])
def test_a_header_that_is_damaged_after_it_was_read_is_refused(store: DiskStore, offset: int) -> None:
    blob = one()
    store.put(blob, tenant="a")
    store.get(blob.entry.pages[0], tenant="a", want=EXACT)
    flip(file_of(store), offset)
    with pytest.raises(BundleError):
        store.get(blob.entry.pages[0], tenant="a", want=EXACT)


def test_a_tensor_that_is_damaged_after_it_was_read_is_refused(store: DiskStore) -> None:
    blob = one()
    store.put(blob, tenant="a")
    store.get(blob.entry.pages[0], tenant="a", want=EXACT).verify()
    flip(file_of(store), blob.nbytes - 1)
    with pytest.raises(DigestMismatch):
        store.get(blob.entry.pages[0], tenant="a", want=EXACT).verify()


def test_a_file_that_is_cut_after_it_was_read_is_refused(store: DiskStore) -> None:
    blob = one()
    store.put(blob, tenant="a")
    store.get(blob.entry.pages[0], tenant="a", want=EXACT)
    path = file_of(store)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError):
        store.get(blob.entry.pages[0], tenant="a", want=EXACT)


def test_only_so_many_headers_are_kept(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_HEADS", 2)
    blobs = [one(seed) for seed in range(5)]
    for blob in blobs:
        store.put(blob, tenant="a")
    for blob in [*blobs, *blobs]:
        assert store.get(blob.entry.pages[0], tenant="a", want=EXACT).entry == blob.entry
    assert len(store._heads) == 2
