"""Sessions and handles, by an injected clock: how long they live, whose they are, and how much is kept."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest

from avp.context import Context, text_context
from avp.errors import AVPError, Busy, HandleExpired
from avp.security import Tenant
from avp.session import Handles, Quota
from avp.testing import synthetic_context

from .samples import kv_context

ANNA, BERT = Tenant.named("anna"), Tenant.named("bert")


class Clock:
    """Time that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def handles(clock: Clock | None = None, **quota: float) -> Handles:
    return Handles(Quota(**quota), clock=clock or Clock())  # type: ignore[arg-type]


def page_bytes(context: Context) -> int:
    assert context.model is not None
    return 32 * context.model.layout.bytes_per_token(context.segments[0].dtype)


def test_a_handle_gives_its_context_to_every_caller_of_the_tenant() -> None:
    kept = handles()
    context = synthetic_context()
    name, ttl = kept.keep(context, kept.open(ANNA))
    assert ttl == Quota().ttl
    assert len(name) >= 43  # 32 random bytes
    for _ in range(2):
        with kept.use(name, Tenant.named("anna")) as found:
            assert found is context


def test_a_handle_ends_with_its_time_and_each_use_begins_it_again() -> None:
    clock = Clock()
    kept = handles(clock, ttl=10)
    name, _ = kept.keep(synthetic_context(), kept.open(ANNA))
    for _ in range(3):
        clock.now += 9
        with kept.use(name, ANNA):
            pass
        clock.now += 9
        assert kept.renew(name, ANNA) == 10
    clock.now += 10
    with pytest.raises(HandleExpired), kept.use(name, ANNA):
        pass
    with pytest.raises(HandleExpired):
        kept.renew(name, ANNA)
    assert (len(kept), kept.memory()) == (0, 0)


def test_a_handle_may_be_revoked_once() -> None:
    kept = handles()
    name, _ = kept.keep(synthetic_context(), kept.open(ANNA))
    kept.revoke(name, ANNA)
    assert kept.memory() == 0
    for call in (kept.revoke, kept.renew):
        with pytest.raises(HandleExpired, match="Fix: hand the context over again"):
            call(name, ANNA)


def test_another_tenants_handle_is_refused_in_the_words_of_an_unknown_one() -> None:
    kept = handles()
    name, _ = kept.keep(synthetic_context(), kept.open(ANNA))
    words = set()
    for tried in (name, "unknown"):
        for call in (kept.renew, kept.revoke, lambda name, tenant: kept.use(name, tenant).__enter__()):
            with pytest.raises(HandleExpired) as caught:
                call(tried, BERT)  # type: ignore[operator]
            words.add(str(caught.value))
    assert len(words) == 1
    with pytest.raises(HandleExpired):
        kept.renew(name, Tenant("anna"))  # the name alone, without the salt
    with kept.use(name, ANNA):
        pass


def test_another_tenants_session_is_refused_in_the_words_of_an_unknown_one() -> None:
    kept = handles()
    session = kept.open(ANNA)
    words = []
    for tried in (session.id, "unknown"):
        with pytest.raises(HandleExpired) as caught:
            kept.session(tried, BERT)
        words.append(str(caught.value))
    assert words[0] == words[1]
    assert kept.session(session.id, ANNA) is session


def test_a_session_that_expires_ends_its_handles_and_use_of_a_handle_keeps_it() -> None:
    clock = Clock()
    kept = handles(clock, ttl=10)
    session = kept.open(ANNA)
    name, _ = kept.keep(synthetic_context(), session)
    clock.now += 9
    kept.renew(name, ANNA)
    clock.now += 9
    assert kept.session(session.id, ANNA) is session
    clock.now += 10
    with pytest.raises(HandleExpired, match="shake hands again"):
        kept.session(session.id, ANNA)
    assert len(kept) == 0


def test_a_context_that_was_made_in_a_call_longer_than_the_sessions_time_gets_a_handle_that_lives() -> None:
    clock = Clock()
    kept = handles(clock, ttl=10)
    session = kept.open(ANNA)
    clock.now += 60
    len(kept)  # what is over is forgotten
    name, _ = kept.keep(synthetic_context(), session)
    clock.now += 9
    with kept.use(name, ANNA):
        pass
    assert kept.session(session.id, ANNA) is session


def test_callers_that_shake_no_hands_share_a_session_of_their_tenant() -> None:
    kept = handles(sessions=3)
    assert len({kept.unnamed(ANNA).id for _ in range(100)}) == 1
    assert kept.unnamed(BERT).id != kept.unnamed(ANNA).id


def test_sessions_are_limited_until_one_expires() -> None:
    clock = Clock()
    kept = handles(clock, ttl=10, sessions=2)
    kept.open(ANNA)
    kept.open(BERT)
    with pytest.raises(Busy) as caught:
        kept.open(ANNA)
    assert caught.value.retry_after > 0
    clock.now += 10
    kept.open(ANNA)


def test_pages_that_two_contexts_share_are_counted_once() -> None:
    kept = handles()
    long = synthetic_context(tokens=96)
    session, page = kept.open(ANNA), page_bytes(long)
    first, _ = kept.keep(long, session)
    second, _ = kept.keep(long[:64], session)
    third, _ = kept.keep(long[:40], session)  # one page of its own, of 8 positions
    assert kept.memory() == 3 * page + page // 4
    kept.revoke(first, ANNA)
    assert kept.memory() == 2 * page + page // 4
    kept.revoke(second, ANNA)
    assert kept.memory() == page + page // 4
    kept.revoke(third, ANNA)
    assert kept.memory() == 0


def test_tenants_share_no_page_in_the_count() -> None:
    kept = handles()
    context = synthetic_context(tokens=32)
    for tenant in (ANNA, BERT):
        kept.keep(context, kept.open(tenant))
    assert kept.memory("anna") == kept.memory("bert") == page_bytes(context)
    assert kept.memory() == 2 * page_bytes(context)


@pytest.mark.parametrize("first", [0, 1])
def test_kv_of_one_page_id_in_two_dtypes_is_counted_twice_and_given_back_twice(first: int) -> None:
    kept = handles()
    session = kept.open(ANNA)
    both = [kv_context(range(40), dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert both[0].segments[0].pages == both[1].segments[0].pages
    names = [kept.keep(context, session)[0] for context in both]
    assert kept.memory() == sum(context.nbytes for context in both)
    kept.revoke(names[first], ANNA)
    assert kept.memory() == both[1 - first].nbytes
    kept.revoke(names[1 - first], ANNA)
    assert kept.memory() == 0


def test_text_counts_too() -> None:
    kept = handles()
    name, _ = kept.keep(text_context("hello"), kept.open(ANNA))
    assert kept.memory() == 5
    kept.revoke(name, ANNA)
    assert kept.memory() == 0


def test_the_handle_that_was_used_longest_ago_makes_room() -> None:
    clock = Clock()
    contexts = [synthetic_context(tokens=32, seed=seed) for seed in range(4)]
    kept = handles(clock, memory=3 * page_bytes(contexts[0]))
    names = []
    for context in contexts[:3]:
        clock.now += 1
        names.append(kept.keep(context, kept.open(ANNA))[0])
    clock.now += 1
    kept.renew(names[0], ANNA)
    clock.now += 1
    kept.keep(contexts[3], kept.open(ANNA))
    with pytest.raises(HandleExpired):
        kept.renew(names[1], ANNA)
    kept.renew(names[0], ANNA)
    kept.renew(names[2], ANNA)


def test_what_is_in_use_is_not_evicted_and_who_needs_the_room_is_told_when_to_come_again() -> None:
    one, two = synthetic_context(tokens=32, seed=1), synthetic_context(tokens=32, seed=2)
    kept = handles(memory=page_bytes(one))
    session = kept.open(ANNA)
    name, _ = kept.keep(one, session)
    with kept.use(name, ANNA), kept.use(name, ANNA):
        for call in (lambda: kept.keep(two, session), lambda: kept.reserve(ANNA, 1)):
            with pytest.raises(Busy, match="try again in") as caught:
                call()  # type: ignore[no-untyped-call]
            assert 0 < caught.value.retry_after < 60
    kept.keep(two, session)
    with pytest.raises(HandleExpired):
        kept.renew(name, ANNA)


def test_a_context_in_use_outlives_its_time_until_it_is_done() -> None:
    clock = Clock()
    kept = handles(clock, ttl=10)
    name, _ = kept.keep(synthetic_context(), kept.open(ANNA))
    with kept.use(name, ANNA):
        clock.now += 100
        assert len(kept) == 1
    assert (len(kept), kept.memory()) == (0, 0)


def test_a_handle_revoked_while_in_use_ends_without_a_trace() -> None:
    kept = handles()
    name, _ = kept.keep(synthetic_context(), kept.open(ANNA))
    with kept.use(name, ANNA):
        kept.revoke(name, ANNA)
    assert (len(kept), kept.memory()) == (0, 0)


def test_a_tenants_quota_evicts_only_its_own() -> None:
    contexts = [synthetic_context(tokens=32, seed=seed) for seed in range(3)]
    page = page_bytes(contexts[0])
    kept = handles(memory=10 * page, tenant=page)
    other, _ = kept.keep(contexts[0], kept.open(BERT))
    kept.keep(contexts[1], kept.open(ANNA))
    kept.keep(contexts[2], kept.open(ANNA))
    assert (kept.memory("anna"), kept.memory("bert"), len(kept)) == (page, page, 2)
    kept.renew(other, BERT)


def test_what_can_never_fit_is_refused_and_evicts_nothing() -> None:
    large, small = synthetic_context(tokens=96), synthetic_context(tokens=64)
    kept = handles(memory=2 * page_bytes(small))
    session = kept.open(ANNA)
    name, _ = kept.keep(small, session)
    for call in (lambda: kept.keep(large, session), lambda: kept.reserve(ANNA, large.nbytes)):
        with pytest.raises(Busy, match="Fix: hand over a shorter context"):
            call()  # type: ignore[no-untyped-call]
    kept.renew(name, ANNA)


def test_the_quota_holds_where_evicting_frees_what_the_new_context_counted_on() -> None:
    clock = Clock()
    long, other = synthetic_context(tokens=96), synthetic_context(tokens=32, seed=1)
    page = page_bytes(long)
    kept = handles(clock, memory=3 * page)
    session = kept.open(ANNA)
    kept.keep(long[:64], session)  # shares two pages with `long`; is the first to go
    clock.now += 1
    kept.keep(other, session)
    clock.now += 1
    kept.keep(long, session)
    assert kept.memory() == 3 * page
    assert len(kept) == 1


def test_room_is_reserved_and_given_back_once() -> None:
    kept = handles(memory=100)
    rooms = [kept.reserve(ANNA, 40), kept.reserve(BERT, 40)]
    with pytest.raises(Busy):
        kept.reserve(ANNA, 40)
    for _ in range(2):
        rooms[0].release()
        assert (kept.memory(), kept.memory("anna"), kept.memory("bert")) == (40, 0, 40)
    rooms[1].release()
    assert kept.memory() == 0


def test_threads_may_do_all_of_it_at_once_and_nothing_is_lost_or_counted_twice() -> None:
    base = synthetic_context(tokens=160)
    contexts = [base[:n] for n in (32, 64, 70, 128, 160)] + [replace(text_context("hello there"))]
    kept = Handles(Quota(memory=8 * page_bytes(base), tenant=6 * page_bytes(base), sessions=50))
    names: list[tuple[str, Tenant]] = []
    broken: list[str] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            tenant = draw.choice([ANNA, BERT])
            with suppress(Busy, HandleExpired):
                step = draw.randrange(5)
                if step == 0:
                    names.append((kept.keep(draw.choice(contexts), kept.unnamed(tenant))[0], tenant))
                elif step == 1:
                    room = kept.reserve(tenant, draw.randrange(4 * page_bytes(base)))
                    room.release()
                elif names:
                    name, owner = draw.choice(names)
                    if step == 2:
                        kept.revoke(name, owner)
                    else:
                        with kept.use(name, owner) as context:
                            assert context in contexts
            if not 0 <= kept.memory() <= 8 * page_bytes(base) or min(kept.memory("anna"), kept.memory("bert")) < 0:
                broken.append(f"{kept.memory()} bytes")

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, seed) for seed in range(8)]:
            done.result(timeout=60)
    assert not broken
    for name, owner in names:
        with suppress(HandleExpired):
            kept.revoke(name, owner)
    assert (len(kept), kept.memory()) == (0, 0)


def test_one_who_waits_for_a_long_use_does_not_hold_up_others() -> None:
    kept = handles()
    name, _ = kept.keep(synthetic_context(), kept.open(ANNA))
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with kept.use(name, ANNA):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    kept.renew(name, ANNA)
    kept.keep(synthetic_context(seed=3), kept.open(ANNA))
    leave.set()
    thread.join(10)


def test_the_errors_are_ours() -> None:
    assert issubclass(HandleExpired, AVPError)
    assert issubclass(Busy, AVPError)
