"""The background loop of the calls without `async`: results, errors, interrupts, and what it refuses."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from avp.errors import ConnectionFailed, TimedOut, UsageError
from avp.portal import PORTAL, Portal, within


async def give(value: int) -> int:
    return value


async def numbers(upto: int, fail: bool) -> AsyncIterator[int]:
    for number in range(upto):
        yield number
    if fail:
        raise ConnectionFailed("broken")


def test_work_is_done_and_its_error_is_raised_here() -> None:
    async def fail() -> None:
        raise ConnectionFailed("broken")

    assert PORTAL.run(give(3)) == 3
    with pytest.raises(ConnectionFailed, match="broken"):
        PORTAL.run(fail())


def test_all_threads_share_one_loop() -> None:
    async def which() -> int:
        return id(asyncio.get_running_loop())

    portal = PORTAL
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: portal.run(which()), range(40)))) == 1
    assert sum(thread.name == "avp-loop" for thread in threading.enumerate()) == 1


def test_a_blocking_call_inside_the_loop_is_refused_with_the_fix() -> None:
    async def inside() -> int:
        return PORTAL.run(give(1))

    with pytest.raises(UsageError, match="Fix: await the …_async twin"):
        PORTAL.run(inside())
    assert PORTAL.run(give(2)) == 2


def test_a_blocking_call_inside_another_loop_works() -> None:
    async def inside() -> int:
        return PORTAL.run(give(4))

    assert asyncio.run(inside()) == 4


def test_an_interrupt_ends_the_work_in_the_loop() -> None:
    started, ended = threading.Event(), threading.Event()

    async def endless() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    def interrupt() -> None:
        started.wait(10)
        signal.pthread_kill(main.ident or 0, signal.SIGINT)

    main, watcher = threading.main_thread(), threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        PORTAL.run(endless())
    assert ended.wait(10)
    watcher.join(10)


def test_the_items_of_an_asynchronous_iterator_come_one_by_one() -> None:
    assert list(PORTAL.iterate(numbers(3, fail=False))) == [0, 1, 2]
    found: list[int] = []
    with pytest.raises(ConnectionFailed):
        found.extend(PORTAL.iterate(numbers(2, fail=True)))
    assert found == [0, 1]


def test_a_portal_starts_no_thread_before_its_first_use() -> None:
    before = threading.active_count()
    Portal()
    assert threading.active_count() == before


def test_what_takes_too_long_is_ended_and_said_to_be() -> None:
    ended = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with pytest.raises(TimedOut, match=r"the call took longer than 0\.01 s"):
        asyncio.run(within(endless(), 0.01, "the call"))
    assert ended == [True]


@pytest.mark.parametrize("seconds", [None, 10.0])
def test_a_time_out_of_the_work_itself_is_not_said_to_be_ours(seconds: float | None) -> None:
    async def unreachable() -> None:
        raise TimeoutError(110, "Connection timed out")

    async def far() -> None:
        raise TimedOut("the far end took too long")

    with pytest.raises(TimeoutError, match="Connection timed out"):
        asyncio.run(within(unreachable(), seconds, "the call"))
    with pytest.raises(TimedOut, match="the far end"):
        asyncio.run(within(far(), seconds, "the call"))


def test_without_a_bound_work_may_take_its_time() -> None:
    assert asyncio.run(within(give(5), None, "the call")) == 5
