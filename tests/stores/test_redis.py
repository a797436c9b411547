"""The store in Redis, against a redis-server of our own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from avp.blob import Blob
from avp.errors import MissingExtra, SegmentMissing, StoreFailed, UsageError
from avp.protocols import Store
from avp.stores import open_store
from avp.stores.rows import describe
from avp.testing.store import BOUNDED, EXACT, StoreConformance, stored_blobs

from .servers import free_port

redis = pytest.importorskip("redis", reason="redis is not installed (pip install 'avp[redis]')")
from avp.stores import redis as ours  # noqa: E402 - needs the library


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(redis_url)
    client.flushdb()
    yield client
    client.close()


@pytest.fixture
def store(redis_url: str, client: redis.Redis) -> Iterator[ours.RedisStore]:
    store = ours.RedisStore(redis_url)
    yield store
    store.close()


def bundle_name(blob: Blob, tenant: str) -> str:
    row = describe(blob, tenant=tenant, now=0)
    return next(f"avp:{{{ours.tenant_key(tenant)}}}:b:{key}" for key in [row.key])


class TestRedis(StoreConformance):
    @pytest.fixture(autouse=True)
    def _place(self, redis_url: str, client: redis.Redis) -> None:
        self.url, self.client = redis_url, client

    def store(self) -> Store:
        return ours.RedisStore(self.url)

    def damage(self, blob: Blob, offset: int, *, tenant: str) -> bool:
        name = bundle_name(blob, tenant)
        byte = self.client.getrange(name, offset, offset)[0]
        self.client.setrange(name, offset, bytes([byte ^ 1]))
        return True


def test_a_page_whose_bundle_was_evicted_counts_as_absent(store: ours.RedisStore, client: redis.Redis) -> None:
    exact, lossy = stored_blobs(tokens=64)[0], stored_blobs(tokens=64, engine="other")[0]
    store.put(exact, tenant="a")
    store.put(lossy, tenant="a")
    client.delete(bundle_name(exact, "a"))
    assert store.have(exact.entry.pages, tenant="a", want=EXACT) == [False, False]
    with pytest.raises(SegmentMissing):
        store.get(exact.entry.pages[0], tenant="a", want=EXACT)
    assert store.get(exact.entry.pages[0], tenant="a", want=BOUNDED).entry.engine == "other"
    assert [entry.engine for entry in store.entries()] == ["other"]
    assert store.collect() == 0
    names = [name for name in client.scan_iter() if b":p:" in name]
    assert [client.hlen(name) for name in names] == [1, 1]
    client.delete(bundle_name(lossy, "a"))
    store.collect()
    assert list(client.scan_iter()) == []


def test_have_asks_once_for_many_pages(store: ours.RedisStore, client: redis.Redis) -> None:
    blobs = [blob for seed in range(20) for blob in stored_blobs(seed=seed, tokens=256)]
    for blob in blobs:
        store.put(blob, tenant="a")
    pages = [page for blob in blobs for page in blob.entry.pages]
    store.have(pages, tenant="a", want=EXACT)
    before = client.info("stats")["total_commands_processed"]
    assert store.have(pages, tenant="a", want=EXACT) == [True] * 160
    calls = client.info("commandstats")
    assert client.info("stats")["total_commands_processed"] - before <= 160 * 2 + 8
    assert calls["cmdstat_evalsha"]["calls"] >= 2


def test_a_segment_has_the_ttl_of_its_last_put(redis_url: str, client: redis.Redis) -> None:
    store = open_store(f"{redis_url}?ttl=2h&prefix=mine:")
    (blob,) = stored_blobs(tokens=40)
    store.put(blob, tenant="a")
    names = list(client.scan_iter())
    assert len(names) == 3
    assert all(name.startswith(b"mine:") and 7100 < client.ttl(name) <= 7200 for name in names)
    for name in names:
        client.expire(name, 10)
    store.put(blob, tenant="a")
    assert all(client.ttl(name) > 7100 for name in names)
    store.close()


def test_what_is_no_row_counts_as_absent(store: ours.RedisStore, client: redis.Redis) -> None:
    (blob,) = stored_blobs(tokens=32)
    store.put(blob, tenant="a")
    (page,) = (name for name in client.scan_iter() if b":p:" in name)
    for noise in (b"", b"{", b"[]", b"{}", b'{"pages": 3}', b"\xff"):
        for field in client.hkeys(page):
            client.hset(page, field, noise)
        assert store.have(blob.entry.pages, tenant="a", want=EXACT) == [False]
        assert list(store.entries()) == []


def test_a_server_that_is_not_there_is_said_with_the_fix() -> None:
    port = free_port()
    store = ours.RedisStore(f"redis://:secret@127.0.0.1:{port}/0", timeout=2)
    with pytest.raises(StoreFailed, match=r"Redis at 127\.0\.0\.1 cannot be reached: .* Fix: start it") as raised:
        store.have(["0" * 64], tenant="a", want=EXACT)
    assert "secret" not in str(raised.value)
    store.close()


def test_a_redis_out_of_memory_is_said_with_the_fix(store: ours.RedisStore, client: redis.Redis) -> None:
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreFailed, match="Fix: if it is out of memory, raise maxmemory"):
            store.put(stored_blobs(tokens=256)[0], tenant="a")
    finally:
        client.config_set("maxmemory", 0)


def test_a_segment_beyond_the_largest_value_is_refused(store: ours.RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "LARGEST", 1000)
    with pytest.raises(StoreFailed, match="Redis takes no larger value"):
        store.put(stored_blobs()[0], tenant="a")


def test_its_budget_is_redis_own(redis_url: str) -> None:
    with pytest.raises(UsageError, match="no setting 'budget'"):
        open_store(f"{redis_url}?budget=1GiB")
    assert issubclass(MissingExtra, ImportError)
