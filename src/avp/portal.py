"""One event loop in the background, in which the calls without `async` run, and the servers that they start."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import TypeVar

from avp.errors import TimedOut, UsageError

T = TypeVar("T")
_DONE = object()


class Portal:
    """A loop in a daemon thread, started at the first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[object, object, T]) -> T:
        """Do `work` in the loop and wait for it; an interrupt here ends it there.

        Raises:
            UsageError: called in the loop itself, which would wait for itself.
        """
        loop = self._started()
        if threading.current_thread() is self._thread:
            work.close()
            raise UsageError("a blocking call was made in AVP's own event loop. Fix: await the …_async twin.")
        running: list[asyncio.Task[object] | None] = []
        stopped = False

        async def tracked() -> T:
            if stopped:
                work.close()
                raise asyncio.CancelledError
            running.append(asyncio.current_task())
            return await work

        def stop() -> None:
            nonlocal stopped
            stopped = True
            for task in running:
                if task is not None:
                    task.cancel()

        try:
            return asyncio.run_coroutine_threadsafe(tracked(), loop).result()
        except BaseException:  # an interrupt may come even before there is a future to cancel
            loop.call_soon_threadsafe(stop)
            raise

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """The items of an asynchronous iterator, one by one."""

        async def following() -> object:
            return await anext(items, _DONE)

        while (item := self.run(following())) is not _DONE:
            yield item  # type: ignore[misc]  # not _DONE, hence a T

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="avp-loop", daemon=True)
                self._thread.start()
            return self._loop


PORTAL = Portal()


async def within(work: Coroutine[object, object, T], seconds: float | None, what: str) -> T:
    """Wait for `work` so long at most.

    Raises:
        TimedOut: it took longer; it was cancelled.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await work
    except TimeoutError as error:
        if isinstance(error, TimedOut) or not limit.expired():
            raise
        raise TimedOut(
            f"{what} took longer than {seconds:g} s and was ended. "
            "Fix: pass a longer timeout, or look at the other end."
        ) from error
