"""An agent that is killed and started again, and what it acknowledged."""

from __future__ import annotations

import asyncio
import select
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic

from avp.context import Context
from avp.network import connect_async

from .harness import Server, check_kept, hand_over, start
from .proxy import Cut, Fault

LISTEN = ("--listen", "http://127.0.0.1:0", "--listen", "grpc://127.0.0.1:0")


@dataclass
class Agent:
    """`avp serve --no-model`, which listens at new ports after each restart."""

    folder: Path
    arguments: tuple[str, ...]
    server: Server = field(init=False)
    acknowledged: list[Context] = field(default_factory=list)
    starts: int = 0

    def start(self) -> None:
        self.server = start(self.folder, "--no-model", *self.arguments)
        self.starts += 1

    def restart(self) -> None:
        self.server.kill()
        self.start()

    def stored(self) -> int:
        """How many segments are in its store on disk."""
        return sum(1 for _ in (self.folder / "store" / "segments").rglob("*.avp"))

    def has_taken(self, count: int) -> Callable[[], bool]:
        """Whether it has stored so many more by then: what was sent is not yet received."""
        due = self.stored() + count
        return lambda: self.stored() >= due

    async def deliver(self, url: str, context: Context) -> int:
        """A hand-over that nobody disturbs, and what it brings is there; the bytes that it did not send."""
        async with connect_async(url) as remote:
            handle = await hand_over(remote, context)
        await check_kept(url, context, handle)
        self.acknowledged.append(context)
        assert handle.receipt is not None
        return handle.receipt.bytes_reused

    async def check_acknowledged(self, url: str, random: Random) -> None:
        """Of what it acknowledged nothing is asked for again, and it is what it was; looked at in three samples."""
        for context in random.sample(self.acknowledged, min(2, len(self.acknowledged))):
            async with connect_async(url) as remote:
                handle = await hand_over(remote, context)
            assert handle.receipt is not None
            assert handle.receipt.bytes_reused == context.nbytes
            await check_kept(url, context, handle)


@contextmanager
def agent(folder: Path, *arguments: str) -> Iterator[Agent]:
    """One that lives to the end of the block, over a store on disk unless the arguments name another; then its folder
    goes.
    """
    folder.mkdir()
    started = Agent(folder, ("--store", f"disk:{folder}/store", *arguments))
    started.start()
    try:
        yield started
    finally:
        started.server.kill()
        shutil.rmtree(folder)


def killing(kill: Callable[[], None], *, at: int, up: bool = True, ready: Callable[[], bool] = lambda: True) -> Fault:
    """A fault that kills somebody once that is ready, or ten seconds have passed, and ends the connection."""

    def work() -> None:
        late = monotonic() + 10
        while not ready() and monotonic() < late:
            select.select([], [], [], 0.01)
        kill()

    async def die(_: bytes) -> list[bytes]:
        await asyncio.to_thread(work)
        raise Cut

    return Fault(die, at, up)
