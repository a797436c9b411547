"""`avp serve` as processes that a test may kill, contexts to hand over, and what must be true of them afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from avp.context import Context
from avp.errors import AVPError
from avp.handle import Handle
from avp.network import connect_async
from avp.remote import AsyncRemote

from ..samples import described, kv_bytes

PATIENCE = 120.0  # seconds, for machines that are busy
COMMAND = [sys.executable, "-c", "from avp.cli import main; main()"]
SLACK = 1 << 16  # bytes of a hand-over that are no KV
T = TypeVar("T")


@dataclass
class Server:
    """A server that listens; its log is a file."""

    process: subprocess.Popen[str]
    urls: dict[str, str]  # by scheme
    log: Path

    def kill(self) -> None:
        """As the kernel does it when memory is short: nothing is told to anybody."""
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)

    def status(self, name: str) -> int:
        """Bytes, as the kernel counts them: VmRSS, VmHWM, …"""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024

    def said(self) -> str:
        """Its log so far."""
        return self.log.read_text()


def start(folder: Path, *arguments: str | Path) -> Server:
    """`avp serve …`, once it listens. The log goes on where that of an earlier server in the folder ended."""
    log = folder / "log"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AVP_TOKEN")}
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [*COMMAND, "serve", "--json", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**kept, "OMP_NUM_THREADS": "1"},
        )
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline() if selector.select(PATIENCE) else ""
    server = Server(process, {}, log)
    if not line:
        server.kill()
        raise AssertionError(server.said()[-2000:])
    server.urls = {urlsplit(url).scheme: url for url in json.loads(line)["urls"]}
    return server


@contextmanager
def serving(folder: Path, *arguments: str | Path) -> Iterator[Server]:
    """`avp serve …` from when it listens to the end of the block."""
    server = start(folder, *arguments)
    try:
        yield server
    finally:
        server.kill()


def run(work: Coroutine[object, object, T], *, seconds: float = 200) -> T:
    """Do it in a loop of its own, which is not to take forever."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds):
            return await work

    return asyncio.run(bounded())


async def try_to(work: Coroutine[object, object, T]) -> T | AVPError:
    """The result or the error of a call; anything but a clear error of ours fails the test."""
    try:
        return await work
    except AVPError as told:
        if "Fix: " not in str(told):
            raise
        return told


async def check_kept(url: str, context: Context, handle: Handle | str) -> None:
    """The handle stands for that context, byte for byte."""
    async with connect_async(url) as remote:
        check_equal(await remote.fetch(handle, timeout=PATIENCE), context)


def check_equal(found: Context, context: Context) -> None:
    assert described(found) == described(context)
    assert kv_bytes(found) == kv_bytes(context)


async def hand_over(remote: AsyncRemote, context: Context) -> Handle:
    """A hand-over that must succeed, and sends what is missing and no more."""
    handle = await remote.hand_over(context, timeout=PATIENCE)
    assert handle.receipt is not None
    assert handle.receipt.mode == "kv"
    assert handle.receipt.bytes_sent <= context.nbytes - handle.receipt.bytes_reused + SLACK
    return handle
