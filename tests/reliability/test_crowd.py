"""64 clients at once on a server that keeps a few of their contexts: who is refused is told when to come again."""

import asyncio
from pathlib import Path

import pytest

from avp.context import Context
from avp.errors import AVPError, Busy, HandleExpired
from avp.network import connect_async

from .harness import PATIENCE, Server, check_equal, hand_over, run, serving, try_to
from .payloads import payload

CLIENTS = 64
WIDTH = 160  # 5 MiB a context, 320 in all
BUDGET = 5 * payload(0, head_dim=WIDTH).nbytes
SLACK = 96 << 20  # 1.5 MiB a connection: buffers, and segments that are being verified, and what malloc keeps of them


@pytest.fixture(scope="module")
def contexts() -> list[Context]:
    """Made before the clock runs."""
    return [payload(seed, head_dim=WIDTH) for seed in range(2 + CLIENTS)]


async def client(url: str, context: Context, refusals: list[Busy]) -> None:
    """Hand a context over, coming again when told to, and fetch it while it is there."""
    async with connect_async(url) as remote:
        while True:
            try:
                handle = await remote.hand_over(context, timeout=PATIENCE)
                break
            except Busy as told:
                refusals.append(told)
                await asyncio.sleep(told.retry_after)
        found = await try_to(remote.fetch(handle, timeout=PATIENCE))
    if isinstance(found, AVPError):
        assert isinstance(found, HandleExpired)  # it made room for another
    else:
        check_equal(found, context)


@pytest.mark.parametrize("scheme", ["http", "grpc", "unix"])
def test_a_crowd_is_served_or_told_when_to_come_again_within_the_memory(
    scheme: str, contexts: list[Context], tmp_path: Path
) -> None:
    async def scenario(server: Server) -> list[Busy]:
        url = server.urls[scheme]
        async with connect_async(url) as remote:
            for context in contexts[:2]:
                await hand_over(remote, context)  # so that all libraries are loaded
        before = server.status("VmHWM")
        refusals: list[Busy] = []
        async with asyncio.TaskGroup() as group:
            for context in contexts[2:]:
                group.create_task(client(url, context, refusals))
        assert server.status("VmHWM") - before < BUDGET + SLACK
        return refusals

    listen = f"unix:{tmp_path}/a.sock" if scheme == "unix" else f"{scheme}://127.0.0.1:0"
    with serving(
        tmp_path, "--no-model", "--store", f"disk:{tmp_path}/store", "--memory", f"{BUDGET}B", "--listen", listen
    ) as server:
        refusals = run(scenario(server), seconds=120)
    assert refusals
    assert all(told.retry_after == 1.0 and "Fix: try again" in str(told) for told in refusals)
