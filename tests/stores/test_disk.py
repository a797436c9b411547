"""The store on disk: the laws of a store, budgets and time, damage to files and index, what the system refuses."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from avp.blob import Blob, seal
from avp.errors import BundleError, DigestMismatch, SegmentMissing, StoreFailed, UsageError
from avp.protocols import Store
from avp.stores.disk import LEFTOVER_SECONDS, DiskStore, open_disk
from avp.testing.store import BOUNDED, EXACT, StoreConformance, blob_bytes, stored_blobs


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def files(folder: Path) -> list[Path]:
    return sorted((folder / "segments").glob("*/*.avp"))


class TestDisk(StoreConformance):
    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "store"

    def store(self) -> Store:
        return DiskStore(self.folder)

    def small_store(self, budget: int) -> Store:
        return DiskStore(self.folder, budget=budget)

    def damage(self, blob: Blob, offset: int, *, tenant: str) -> bool:
        (path,) = files(self.folder)
        flip(path, offset)
        return True


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[DiskStore]:
    store = DiskStore(folder)
    yield store
    store.close()


def ones(count: int) -> list[Blob]:
    return [stored_blobs(seed=seed, tokens=32)[0] for seed in range(count)]


def here(store: Store, blobs: list[Blob]) -> list[bool]:
    return [store.have(blob.entry.pages, tenant="a", want=EXACT)[0] for blob in blobs]


def fill(store: Store, blobs: list[Blob]) -> None:
    for blob in blobs:
        store.put(blob, tenant="a")


# --- time and budget


def test_the_least_lately_used_makes_room(folder: Path, clock: Clock) -> None:
    blobs = ones(4)
    store = DiskStore(folder, budget=3 * max(blob.nbytes for blob in blobs), clock=clock)
    for blob in blobs[:3]:
        store.put(blob, tenant="a")
        clock.now += 10
    store.get(blobs[0].entry.pages[0], tenant="a", want=EXACT)
    clock.now += 10
    store.put(blobs[3], tenant="a")
    assert here(store, blobs) == [True, False, True, True]
    assert len(files(folder)) == 3
    assert [entry.page for entry in store.entries()] == [blobs[i].entry.pages[-1] for i in (3, 0, 2)]
    store.close()


def test_a_lower_budget_is_enforced_by_collect(folder: Path, clock: Clock) -> None:
    blobs = ones(4)
    store = DiskStore(folder, clock=clock)
    for blob in blobs:
        store.put(blob, tenant="a")
        clock.now += 10
    store.close()
    smaller = DiskStore(folder, budget=2 * max(blob.nbytes for blob in blobs), clock=clock)
    assert smaller.collect() == blobs[0].nbytes + blobs[1].nbytes
    assert here(smaller, blobs) == [False, False, True, True]
    smaller.close()


def test_a_segment_expires_after_its_last_put_whether_it_is_read_or_not(folder: Path, clock: Clock) -> None:
    old, again = ones(2)
    store = DiskStore(folder, ttl=100, clock=clock)
    fill(store, [old, again])
    clock.now += 60
    store.get(old.entry.pages[0], tenant="a", want=EXACT)
    store.put(again, tenant="a")
    clock.now += 60
    assert here(store, [old, again]) == [False, True]
    with pytest.raises(SegmentMissing):
        store.get(old.entry.pages[0], tenant="a", want=EXACT)
    assert [entry.page for entry in store.entries()] == [again.entry.pages[-1]]
    assert len(files(folder)) == 2
    assert store.collect() == old.nbytes
    assert len(files(folder)) == 1
    store.close()


def test_expiry_survives_the_loss_of_the_index(folder: Path, clock: Clock) -> None:
    blobs = ones(1)
    store = DiskStore(folder, ttl=100, clock=clock)
    fill(store, blobs)
    store.close()
    for path in folder.glob("index-*"):
        path.unlink()
    clock.now += 60
    assert here(store, blobs) == [True]
    clock.now += 60
    assert here(store, blobs) == [False]
    store.close()


def test_a_file_that_was_evicted_while_mapped_stays_readable(store: DiskStore) -> None:
    (blob,) = ones(1)
    store.put(blob, tenant="a")
    mapped = store.get(blob.entry.pages[0], tenant="a", want=EXACT)
    assert store.remove(blob.entry.pages[0], tenant="a") == 1
    assert files(store.folder) == []
    assert blob_bytes(mapped.verify()) == blob_bytes(blob)


# --- what is on the disk


def test_files_and_folders_are_the_owners_only(store: DiskStore) -> None:
    fill(store, ones(3))
    for path in [store.folder, *store.folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert list((store.folder / "tmp").iterdir()) == []


def test_a_stored_file_is_a_bundle_that_stock_tools_open(store: DiskStore) -> None:
    fill(store, ones(1))
    assert blob_bytes(ones(1)[0]) == files(store.folder)[0].read_bytes()


def test_a_row_without_its_file_is_repaired_where_it_is_met(store: DiskStore) -> None:
    blobs = ones(2)
    lossy = stored_blobs(seed=0, tokens=32, engine="other")[0]
    fill(store, [*blobs, lossy])
    exact = next(path for path in files(store.folder) if path.read_bytes() == blob_bytes(blobs[0]))
    exact.unlink()
    assert store.get(blobs[0].entry.pages[0], tenant="a", want=BOUNDED).entry.engine == "other"
    assert here(store, blobs) == [False, True]
    for path in files(store.folder):
        path.unlink()
    assert list(store.verify()) == []
    assert list(store.entries()) == []


def test_collect_makes_files_and_rows_agree(store: DiskStore) -> None:
    kept, lost, cut, strange = ones(4)
    fill(store, [kept, lost, cut])
    by_bytes = {path.read_bytes(): path for path in files(store.folder)}
    by_bytes[blob_bytes(lost)].unlink()
    with by_bytes[blob_bytes(cut)].open("r+b") as file:
        file.truncate(100)
    tenant = by_bytes[blob_bytes(kept)].name.partition("-")[0]
    fresh = store.folder / "segments" / "00" / f"{tenant}-{'0' * 64}-{'0' * 32}.avp"
    fresh.parent.mkdir(exist_ok=True)
    fresh.write_bytes(blob_bytes(strange))
    assert store.collect() == 100 + strange.nbytes
    assert files(store.folder) == [by_bytes[blob_bytes(kept)]]
    assert here(store, [kept, lost, cut]) == [True, False, False]


def test_collect_finds_a_file_whose_row_was_never_written(store: DiskStore) -> None:
    blobs = ones(3)
    fill(store, blobs)
    store.close()
    with sqlite3.connect(next(store.folder.glob("index-*.sqlite"))) as connection:
        connection.execute("DELETE FROM segments")
    connection.close()
    assert here(store, blobs) == [False] * 3
    assert store.collect() == 0
    assert here(store, blobs) == [True] * 3


def test_collect_deletes_what_dead_writers_left_after_an_hour(store: DiskStore) -> None:
    (store.folder / "tmp" / "left").write_bytes(bytes(1000))
    assert store.collect() == 0
    later = DiskStore(store.folder, clock=lambda: time.time() + LEFTOVER_SECONDS + 60)
    assert later.collect() == 1000
    assert list((store.folder / "tmp").iterdir()) == []
    later.close()


def test_an_empty_file_is_an_error_and_is_listed(store: DiskStore) -> None:
    (blob,) = ones(1)
    store.put(blob, tenant="a")
    os.truncate(files(store.folder)[0], 0)
    with pytest.raises(BundleError, match=r"is empty\. Fix: run `avp store verify --repair`"):
        store.get(blob.entry.pages[0], tenant="a", want=EXACT)
    assert len(list(store.verify())) == 1
    store.put(blob, tenant="a")
    assert store.get(blob.entry.pages[0], tenant="a", want=EXACT).verify()


def test_a_damaged_tensor_is_refused_when_it_is_first_used(store: DiskStore) -> None:
    (blob,) = ones(1)
    store.put(blob, tenant="a")
    flip(files(store.folder)[0], blob.nbytes - 1)
    back = store.get(blob.entry.pages[0], tenant="a", want=EXACT)
    assert back.segment.read(0, "k").tobytes() == blob.segment.read(0, "k").tobytes()
    with pytest.raises(DigestMismatch):
        back.segment.read(1, "v")


# --- the index


@pytest.mark.parametrize("harm", ["lost", "noise", "empty", "cut", "middle", "another version"])
def test_an_index_that_is_lost_or_damaged_is_built_again(folder: Path, harm: str) -> None:
    blobs = ones(40)
    store = DiskStore(folder)
    fill(store, blobs)
    store.put(blobs[0], tenant="an other/ténant")
    store.close()
    spoil(next(folder.glob("index-*.sqlite")), harm)
    again = DiskStore(folder)
    assert again.collect() == 0  # reads all of the index; damage in its middle may be met only here
    assert here(again, blobs) == [True] * 40
    assert [entry.page for entry in again.entries(tenant="an other/ténant")] == [blobs[0].entry.pages[-1]]
    assert len(list(again.entries())) == 41
    assert list(again.verify()) == []
    again.close()


def spoil(path: Path, harm: str) -> None:
    size = path.stat().st_size
    if harm == "lost":
        path.unlink()
    elif harm == "noise":
        path.write_bytes(os.urandom(size))
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "cut":
        os.truncate(path, size // 2)
    elif harm == "middle":
        with path.open("r+b") as file:
            file.seek(8192)
            file.write(bytes(size - 8192))
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version=99")
        connection.close()


def test_an_index_that_is_lost_while_it_is_open_is_built_again(folder: Path) -> None:
    blobs = ones(4)
    first, second = DiskStore(folder), DiskStore(folder)
    fill(first, blobs[:2])
    for path in folder.glob("index-*"):
        path.unlink()
    fill(second, blobs[2:3])
    assert here(first, blobs) == [True, True, True, False]
    fill(first, blobs[3:])
    assert here(second, blobs) == [True] * 4
    first.close()
    second.close()
    assert here(first, blobs) == [True] * 4
    first.close()


def test_a_row_that_nobody_wrote_is_damage(store: DiskStore) -> None:
    blobs = ones(2)
    fill(store, blobs)
    with sqlite3.connect(next(store.folder.glob("index-*.sqlite"))) as connection:
        connection.execute("UPDATE segments SET exactness = 99")
    connection.close()
    assert here(store, blobs) == [True, True]


def test_an_index_that_cannot_be_opened_is_said_with_the_fix(folder: Path) -> None:
    DiskStore(folder).close()
    (folder / "index-9999999999999999999.sqlite").mkdir()
    with pytest.raises(StoreFailed, match=r"the index of the store in .* cannot be used: .* delete its index-\* files"):
        DiskStore(folder)


def test_of_two_files_of_one_segment_collect_keeps_that_of_the_row(store: DiskStore) -> None:
    first = ones(1)[0]
    second = seal(replace(first.model, id="another/name"), first.segment)
    store.put(first, tenant="a")
    (path,) = files(store.folder)
    store.put(second, tenant="a")
    assert files(store.folder) != [path]
    path.write_bytes(blob_bytes(first))
    assert store.collect() == first.nbytes
    assert store.get(first.entry.pages[0], tenant="a", want=EXACT).model == second.model


def test_uses_are_noted_for_other_processes(folder: Path, clock: Clock) -> None:
    store, other = DiskStore(folder, clock=clock), DiskStore(folder, clock=clock)
    blobs = ones(2)
    fill(store, blobs)
    for _ in range(3):
        clock.now += 10
        store.get(blobs[0].entry.pages[0], tenant="a", want=EXACT)
        store.get(blobs[1].entry.pages[0], tenant="a", want=EXACT)
    assert min(entry.used for entry in other.entries()) >= clock.now - 20
    store.close()
    assert min(entry.used for entry in other.entries()) == clock.now
    other.close()


# --- what the system refuses


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreFailed, match=r"the store in .* cannot be used: .* Fix: choose a folder on a local disk"):
        DiskStore(tmp_path / "file" / "store")


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ENOSPC, "Fix: free space on that disk"), (errno.EACCES, "Fix: make the folder writable")]
)
def test_a_full_or_forbidden_disk_is_said_with_the_fix(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    def refuse(fd: int, runs: list[memoryview]) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", refuse)
        with pytest.raises(StoreFailed, match=fix):
            fill(store, ones(1))
    assert list((store.folder / "tmp").iterdir()) == []
    assert here(store, ones(1)) == [False]
    fill(store, ones(1))
    assert here(store, ones(1)) == [True]


def test_a_disk_that_writes_piece_by_piece_loses_nothing(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, runs: writev(fd, [bytes(runs[0][:1000])]))
    blob = stored_blobs()[0]
    store.put(blob, tenant="a")
    assert files(store.folder)[0].read_bytes() == blob_bytes(blob)


# --- its URL


def test_its_url_says_folder_budget_and_ttl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_disk(f"disk:{tmp_path}/my%20store?budget=5MiB&ttl=7d")
    assert isinstance(store, DiskStore)
    assert (store.folder, store.budget, store.ttl) == (tmp_path / "my store", 5 * 2**20, 7 * 86400)
    store.close()
    with pytest.raises(UsageError, match="names a host"):
        open_disk("disk://host/path")
    monkeypatch.setenv("AVP_CACHE", str(tmp_path / "cache"))
    store = open_disk("disk:")
    assert isinstance(store, DiskStore)
    assert store.folder == tmp_path / "cache" / "store"
    store.close()
