"""The store in S3, against moto's server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from avp.blob import Blob
from avp.errors import SegmentMissing, StoreFailed, UsageError
from avp.protocols import Store
from avp.stores import open_store
from avp.testing.store import BOUNDED, EXACT, StoreConformance, stored_blobs

from .servers import CREDENTIALS, free_port

obstore = pytest.importorskip("obstore", reason="obstore is not installed (pip install 'avp[s3]')")
from avp.stores.s3 import S3Store  # noqa: E402 - needs the library

NUMBERS = itertools.count()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{next(NUMBERS)}"
    import boto3

    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=name)
    client.close()
    return name


@pytest.fixture
def store(bucket: str, s3_endpoint: str) -> Iterator[S3Store]:
    store = S3Store(bucket, prefix="some/where", endpoint=s3_endpoint)
    yield store
    store.close()


def names(store: S3Store, part: str = "") -> list[str]:
    return [meta["path"] for chunk in obstore.list(store._s3) for meta in chunk if part in meta["path"]]


class TestS3(StoreConformance):
    @pytest.fixture(autouse=True)
    def _place(self, bucket: str, s3_endpoint: str) -> None:
        self.bucket, self.endpoint = bucket, s3_endpoint

    def store(self) -> Store:
        return S3Store(self.bucket, endpoint=self.endpoint)

    def damage(self, blob: Blob, offset: int, *, tenant: str) -> bool:
        store = S3Store(self.bucket, endpoint=self.endpoint)
        (name,) = names(store, "/segments/")
        data = bytearray(bytes(obstore.get(store._s3, name).bytes()))
        data[offset] ^= 1
        obstore.put(store._s3, name, bytes(data))
        store.close()
        return True


def test_all_lies_below_the_prefix(store: S3Store) -> None:
    (blob,) = stored_blobs(tokens=64)
    store.put(blob, tenant="a")
    assert len(names(store)) == 4
    assert all(name.startswith("some/where/") for name in names(store))
    assert len(list(store.entries())) == 1


def test_a_page_whose_bundle_is_gone_counts_as_absent(store: S3Store) -> None:
    (blob,) = stored_blobs(tokens=64)
    store.put(blob, tenant="a")
    obstore.delete(store._s3, names(store, "/segments/"))
    assert store.have(blob.entry.pages, tenant="a", want=EXACT) == [False, False]
    assert store.have(blob.entry.pages, tenant="a", want=BOUNDED) == [False, False]
    with pytest.raises(SegmentMissing):
        store.get(blob.entry.pages[0], tenant="a", want=EXACT)
    assert list(store.entries()) == []
    assert store.collect() == 0
    assert names(store) == []


def test_a_bundle_to_which_nothing_leads_is_collected_after_a_day(bucket: str, s3_endpoint: str) -> None:
    import time

    (blob,) = stored_blobs(tokens=64)
    for days, freed in ((0, 0), (2, blob.nbytes)):
        store = S3Store(bucket, endpoint=s3_endpoint, clock=lambda days=days: time.time() + 86400 * days)  # type: ignore[misc]
        store.put(blob, tenant="a")
        obstore.delete(store._s3, names(store, "/rows/"))
        assert store.collect() == freed
        store.close()


def test_a_shorter_segment_does_not_hide_a_longer_one_unless_that_is_gone(store: S3Store) -> None:
    from avp.blob import seal

    long = stored_blobs(tokens=250)[0]
    short = seal(long.model, long.segment.cut(0, 70))
    store.put(long, tenant="a")
    store.put(short, tenant="a")
    page = short.entry.pages[0]
    assert store.get(page, tenant="a", want=EXACT).entry == long.entry
    longest = max(names(store, "/segments/"), key=lambda name: obstore.head(store._s3, name)["size"])
    obstore.delete(store._s3, [longest])
    store.put(short, tenant="a")
    assert store.get(page, tenant="a", want=EXACT).entry == short.entry


def test_have_of_hundreds_of_pages(store: S3Store) -> None:
    blobs = [blob for seed in range(3) for blob in stored_blobs(seed=seed, tokens=256)]
    for blob in blobs[:2]:
        store.put(blob, tenant="a")
    pages = [page for blob in blobs for page in blob.entry.pages] * 10
    assert store.have(pages, tenant="a", want=EXACT) == ([True] * 16 + [False] * 8) * 10


def test_a_bucket_that_is_not_there_is_said_with_the_fix(bucket: str, s3_endpoint: str) -> None:
    store = open_store(f"s3://{bucket}-not/here?endpoint={s3_endpoint}&region=us-east-1")
    with pytest.raises(StoreFailed, match=r"the bucket .*-not cannot be used: .* Fix: see that it exists"):
        store.put(stored_blobs()[0], tenant="a")
    store.close()


def test_a_server_that_is_not_there_is_said_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    store = S3Store("bucket", endpoint=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StoreFailed, match="Fix: see that it exists, that endpoint"):
        store.have(["0" * 64], tenant="a", want=EXACT)
    store.close()


def test_its_url_names_a_bucket() -> None:
    with pytest.raises(UsageError, match="names no bucket"):
        open_store("s3:///only/a/path")
    with pytest.raises(UsageError, match="keys come from the environment"):
        open_store("s3://key:secret@bucket/prefix")
