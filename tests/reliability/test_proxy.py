"""A proxy that delays, truncates, duplicates, reorders and flips bits: what comes is right, or an error says so."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from avp.errors import AVPError, BundleError, DigestMismatch
from avp.network import connect_async

from .harness import Server, check_equal, check_kept, hand_over, run, serving, try_to
from .payloads import payload
from .proxy import Fault, Hurt, Proxy, delay, duplicate, flip, place, reorder, truncate

TOKENS = 600  # 2 segments of 256, one of 88: 307 KB
SEEDS = 8
AT_ONCE = 4
TIMEOUT = 6.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("proxied")
    listen = ("--listen", "http://127.0.0.1:0", "--listen", "grpc://127.0.0.1:0")
    with serving(folder, "--no-model", "--store", "memory:", *listen, "--log-level", "info") as started:
        yield started


async def case(url: str, hurt: Hurt, seed: int, *, up: bool) -> list[AVPError]:
    """A hand-over and a fetch, each with one fault in that direction; what the caller was told that failed."""
    random = Random(f"{url.partition(':')[0]} {hurt.__name__} {up} {seed}")
    context = payload(random.randrange(1 << 30), tokens=TOKENS, head_dim=16)
    told: list[AVPError] = []
    async with (
        Proxy(url, faults=[Fault(hurt, place(random, context.nbytes if up else 4096), up)]) as proxy,
        connect_async(proxy.url) as remote,
    ):
        handle = await try_to(remote.hand_over(context, timeout=TIMEOUT))
    if isinstance(handle, AVPError):
        told.append(handle)
        async with connect_async(url) as remote:
            handle = await hand_over(remote, context)
    await check_kept(url, context, handle)
    async with (
        Proxy(url, faults=[Fault(hurt, place(random, 4096 if up else context.nbytes), up)]) as proxy,
        connect_async(proxy.url) as remote,
    ):
        found = await try_to(remote.fetch(handle, timeout=TIMEOUT))
    if isinstance(found, AVPError):
        told.append(found)
    else:
        check_equal(found, context)
    return told


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
@pytest.mark.parametrize("hurt", [delay, truncate, duplicate, reorder, flip], ids=lambda hurt: hurt.__name__)
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_what_comes_through_is_right_or_an_error_says_that_it_is_not(
    server: Server, scheme: str, hurt: Hurt, up: bool
) -> None:
    async def scenario() -> list[AVPError]:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(seed: int) -> list[AVPError]:
            async with gate:
                return await case(server.urls[scheme], hurt, seed, up=up)

        return [error for told in await asyncio.gather(*map(one, range(SEEDS))) for error in told]

    told = run(scenario())
    assert bool(told) is (hurt is not delay)
    assert any(isinstance(each, DigestMismatch) for each in told) or hurt is not flip


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_bit_that_flips_in_the_text_of_a_context_is_found(server: Server, scheme: str) -> None:
    async def scenario() -> None:
        for up in (True, False):
            context = payload(77 + up, tokens=TOKENS, head_dim=16)
            async with connect_async(server.urls[scheme]) as remote:
                handle = await hand_over(remote, context)
            fault = Fault(flip, 0, up, mark=b"critic")
            async with Proxy(server.urls[scheme], faults=[fault]) as proxy, connect_async(proxy.url) as remote:
                with pytest.raises(BundleError, match="messages or ids are not those that were sent"):
                    await (remote.hand_over(context) if up else remote.fetch(handle))
            assert fault.happened

    run(scenario())


def test_the_server_that_all_this_went_through_lives_and_holds_no_connection(server: Server) -> None:
    async def scenario() -> None:
        for url in server.urls.values():
            async with connect_async(url) as remote:
                await check_kept(url, payload(5), await hand_over(remote, payload(5)))
        while len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) > 40:
            await asyncio.sleep(0.1)

    run(scenario())
