"""Kill -9 of the receiver, the sender, the giver and the store, at seeded places: 88 kills among 240 hand-overs.

After each: no wrong KV, nothing lost that was acknowledged, a result or an error of ours, and a second try that sends
what is missing and no more.
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from avp.errors import AVPError
from avp.network import connect_async
from avp.remote import Own
from avp.stores.memory import MemoryStore

from ..stores.servers import free_port, wait_for
from .agents import LISTEN, Agent, agent, killing
from .harness import PATIENCE, SLACK, check_equal, check_kept, hand_over, run, try_to
from .payloads import payload
from .proxy import Proxy, place

TIMEOUT = 30.0  # of a hand-over that is disturbed
SENDER = str(Path(__file__).with_name("sender.py"))


def whole(sent: int) -> int:
    """How many segments are whole in the first so many bytes of a hand-over of a `payload`."""
    return max(0, sent - SLACK) // (payload(0).nbytes // len(payload(0).segments) + 2048)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_receiver_that_is_killed_has_what_it_acknowledged_and_takes_the_rest(scheme: str, tmp_path: Path) -> None:
    """2 * 12 kills, as many hand-overs of the same afterwards, and as many of others."""

    async def scenario(receiver: Agent) -> int:
        reused = 0
        async with Proxy(receiver.server.urls[scheme]) as proxy:
            for seed in range(12):
                random, context, at_once = Random(f"receiver {scheme} {seed}"), payload(seed), seed % 4 != 1

                def die(at_once: bool = at_once) -> None:
                    receiver.server.kill()
                    if at_once:  # the hand-over that is under way finds it again
                        receiver.start()
                        proxy.target = receiver.server.urls[scheme]

                at = place(random, context.nbytes)
                fault = killing(die, at=at, ready=receiver.has_taken(whole(at) if seed % 2 else 0))
                proxy.arm(fault)
                async with connect_async(proxy.url) as remote:
                    found = await try_to(remote.hand_over(context, timeout=TIMEOUT))
                await fault.over.wait()
                if at_once and not isinstance(found, AVPError):
                    await check_kept(receiver.server.urls[scheme], context, found)
                    receiver.acknowledged.append(context)
                if not at_once:
                    assert isinstance(found, AVPError)
                    receiver.start()
                url = proxy.target = receiver.server.urls[scheme]
                await receiver.check_acknowledged(url, random)
                spared = await receiver.deliver(url, context)
                reused += spared if isinstance(found, AVPError) else 0
                await receiver.deliver(url, payload(1000 + seed))
        return reused

    with agent(tmp_path / "receiver", *LISTEN) as receiver:
        reused = run(scenario(receiver))
        assert receiver.starts == 13
        assert reused  # segments that came before a kill did not travel again


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_sender_that_is_killed_leaves_whole_segments_and_no_handle(scheme: str, tmp_path: Path) -> None:
    """2 * 10 kills, and as many hand-overs of the same afterwards."""

    async def scenario(receiver: Agent) -> int:
        reused, url = 0, receiver.server.urls[scheme]
        async with Proxy(url) as proxy:
            for seed in range(10):
                random, context = Random(f"sender {scheme} {seed}"), payload(seed)
                command = [sys.executable, SENDER, proxy.url, str(seed)]
                sender = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                at = place(random, context.nbytes)
                fault = killing(sender.kill, at=at, ready=receiver.has_taken(whole(at)))
                proxy.arm(fault)
                await fault.over.wait()
                said, _ = sender.communicate(timeout=PATIENCE)
                assert (sender.returncode, said) == (-signal.SIGKILL, b"")
                reused += await receiver.deliver(url, context)
                await receiver.check_acknowledged(url, random)
        return reused

    room = 3 * payload(0).nbytes  # room that a dead sender does not give back would soon be missed
    with agent(tmp_path / "receiver", *LISTEN, "--memory", f"{room}B") as receiver:
        assert run(scenario(receiver)) > 0


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_the_same_over_unix_where_kv_passes_as_memory(victim: str, tmp_path: Path) -> None:
    """2 * 6 kills, each after some segments, and as many hand-overs afterwards."""

    async def scenario(receiver: Agent) -> int:
        reused = 0
        url = receiver.server.urls["unix"]
        for seed in range(6):
            random, context = Random(f"unix {victim} {seed}"), payload(seed)
            after = random.randrange(len(context.segments))
            shot = receiver.server.process.pid if victim == "receiver" else 0
            command = [sys.executable, SENDER, url, str(seed), str(after), str(shot)]
            sender = subprocess.run(command, capture_output=True, check=False, text=True, timeout=PATIENCE)
            if victim == "sender":
                assert (sender.returncode, sender.stdout) == (-signal.SIGKILL, "")
            else:
                assert (sender.returncode, sender.stdout) == (0, "ConnectionFailed\n"), sender.stderr
                receiver.restart()
            await receiver.check_acknowledged(url, random)
            reused += await receiver.deliver(url, context)
        return reused

    with agent(tmp_path / "receiver", "--listen", f"unix:{tmp_path}/a.sock") as receiver:
        reused = run(scenario(receiver))
        assert reused or victim == "receiver"  # which may not have kept any yet


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_giver_that_is_killed_is_no_source_of_wrong_kv(scheme: str, tmp_path: Path) -> None:
    """2 * 10 fetches, each with a kill in the middle, and as many afterwards; what came is not fetched again."""

    async def scenario(giver: Agent) -> int:
        reused = 0
        own = Own(store=MemoryStore())

        def die() -> None:
            giver.restart()
            proxy.target = giver.server.urls[scheme]

        async with Proxy(giver.server.urls[scheme]) as proxy:
            for seed in range(10):
                random, context = Random(f"giver {scheme} {seed}"), payload(seed)
                async with connect_async(giver.server.urls[scheme]) as direct:
                    handle = await hand_over(direct, context)
                giver.acknowledged.append(context)
                fault = killing(die, at=random.randrange(context.nbytes), up=False)
                proxy.arm(fault)
                async with connect_async(proxy.url, own=own) as remote:
                    found = await try_to(remote.fetch(handle, timeout=TIMEOUT))
                await fault.over.wait()
                assert isinstance(found, AVPError)  # its handles ended with it
                await giver.check_acknowledged(proxy.target, random)
                async with connect_async(proxy.target) as direct:
                    again = await hand_over(direct, context)
                async with connect_async(proxy.url, own=own) as remote:
                    fetched, receipt = await remote.receive(again, timeout=PATIENCE)
                check_equal(fetched, context)
                reused += receipt.bytes_reused
        return reused

    with agent(tmp_path / "giver", *LISTEN) as giver:
        assert run(scenario(giver)) > payload(0).nbytes


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator["Redis"]:
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    pytest.importorskip("redis", reason="redis is not installed (pip install 'avp[redis]')")
    server = Redis(binary, tmp_path)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait(PATIENCE)


class Redis:
    """A redis-server that has on its disk what it acknowledged."""

    def __init__(self, binary: str, folder: Path) -> None:
        self._port, self._log = free_port(), folder / "redis.log"
        address = ["--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self._command = [binary, *address, "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        wait_for(self._port, self.process, self._log)

    def restart(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        self.start()


def test_a_store_that_is_killed_is_a_clear_error_and_loses_nothing(redis_server: Redis, tmp_path: Path) -> None:
    """12 kills of a Redis on which an agent keeps what it receives, and as many hand-overs afterwards."""

    async def scenario(proxy: Proxy, receiver: Agent) -> set[str]:
        told, url = set(), receiver.server.urls["http"]
        for seed in range(12):
            random, context = Random(f"store {seed}"), payload(seed, tokens=600)
            fault = killing(redis_server.restart, at=place(random, context.nbytes))
            proxy.arm(fault)
            async with connect_async(url) as remote:
                found = await try_to(remote.hand_over(context, timeout=TIMEOUT))
            await fault.over.wait()
            if isinstance(found, AVPError):
                told.add(type(found).__name__)
            else:
                await check_kept(url, context, found)
            await receiver.check_acknowledged(url, random)
            await receiver.deliver(url, context)
        receiver.restart()  # and nothing of it was only in its memory
        receiver.acknowledged = receiver.acknowledged[::5]
        await receiver.check_acknowledged(receiver.server.urls["http"], Random(0))
        return told

    async def proxied() -> set[str]:
        async with Proxy(redis_server.url) as proxy:
            with agent(tmp_path / "receiver", *LISTEN, "--store", proxy.url) as receiver:
                return await scenario(proxy, receiver)

    assert run(proxied()) == {"StoreFailed"}
