"""The transport between processes of one machine: what passes as memory, what is refused, what never leaks."""

from __future__ import annotations

import array
import asyncio
import gc
import os
import resource
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from avp.blob import Blob, seal
from avp.buffers import STORAGE
from avp.context import Context
from avp.errors import AVPError, Busy, ConnectionFailed, DigestMismatch, LimitExceeded, UsageError
from avp.manifest import Limits
from avp.protocols import Channel, Item, Meter, Transport
from avp.security import Caller, Security
from avp.segment import Exactness, cut_segments
from avp.shared import MemoryFile, SharedTensors, arena_bytes
from avp.testing.echo import EchoEndpoint, as_bytes, ask, ask_with, blobs_of, failure, large_blob, sending
from avp.testing.synthetic import synthetic_context
from avp.testing.transport import TransportConformance
from avp.transports.fds import receive
from avp.transports.unix import TRANSPORT, UnixListener, UnixTransport

QUICK = UnixTransport(patience=0.2, grace=1.0)


class TestUnix(TransportConformance):
    moves_bytes = False

    def transport(self) -> Transport:
        return QUICK

    def address(self, tmp_path: Path) -> str:
        return f"unix:{tmp_path}/a.sock"


def shared_context(*, tokens: int = 600, seed: int = 0) -> tuple[Context, MemoryFile]:
    """A context whose KV lies in one arena with slack, as a connector leaves it."""
    plain = synthetic_context(layers=3, kv_heads=2, tokens=tokens, head_dim=32, seed=seed)
    assert plain.model is not None
    layout, capacity = plain.model.layout, tokens + 100
    file = MemoryFile.create(arena_bytes(layout, "bfloat16", capacity))
    whole = SharedTensors.of(file, layout, "bfloat16", capacity, 0, tokens)
    for layer in range(3):
        for part in ("k", "v"):
            rows = np.zeros((2, capacity, 32), STORAGE["bfloat16"])
            for segment in plain.segments:
                rows[:, segment.start : segment.stop] = segment.read(layer, part).array
            os.pwrite(file.fd, rows.tobytes(), whole.offsets[layer][part == "v"])
    segments = cut_segments(
        plain.model,
        plain.tokens,
        dtype="bfloat16",
        engine="synthetic",
        tensors=lambda start, stop: SharedTensors.of(file, layout, "bfloat16", capacity, start, stop),
        grade=lambda _stop: Exactness.EXACT,
    )
    return Context("kv", plain.model, plain.tokens, tokens, segments=segments), file


def open_files() -> list[str]:
    """What this process has open, apart from event loops."""
    gc.collect()
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if name.startswith(("/memfd:", "socket:")))


@asynccontextmanager
async def opened(tmp_path: Path, *, limits: Limits | None = None) -> AsyncIterator[tuple[EchoEndpoint, Channel, str]]:
    """A served endpoint, a channel and the path; afterwards no descriptor is open that was not before."""
    before = open_files()
    endpoint, path = EchoEndpoint(limits=limits), f"{tmp_path}/a.sock"
    listener = await QUICK.serve(endpoint, f"unix:{path}", security=Security())
    channel = QUICK.connect(listener.url, security=Security())
    try:
        yield endpoint, channel, path
    finally:
        await channel.close()
        await listener.close()
    async with asyncio.timeout(5):
        while open_files() != before:  # a thread may still be busy with a copy that nobody wants any more
            await asyncio.sleep(0.01)


# --- memory


def test_blobs_of_one_arena_arrive_as_one_file_and_none_of_their_bytes_is_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        context, file = shared_context()
        blobs, meter = blobs_of(context), Meter()
        async with opened(tmp_path) as (_, channel, _):
            back = await ask(channel, "echo", *blobs, meter=meter)
            assert [as_bytes(item) for item in back] == [as_bytes(blob) for blob in blobs]
            files = set()
            for item in back:
                assert isinstance(item, Blob)
                assert isinstance(item.verify().segment.tensors, SharedTensors)
                files.add(item.segment.tensors.file)
            (received,) = files
            assert received is not file
            assert os.fstat(received.fd).st_ino == os.fstat(file.fd).st_ino
            headers = sum(len(blob.header) for blob in blobs)
            assert headers < meter.sent < headers + 600
            assert headers < meter.received < headers + 600
            del back, item, files, received

    asyncio.run(scenario())


def test_a_connector_adopts_the_arena_of_another_process(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from avp.connectors.arena import Shape
    from avp.connectors.state import from_segments

    async def scenario() -> None:
        context, file = shared_context()
        blobs = blobs_of(context)
        async with opened(tmp_path) as (_, channel, _):
            back = await ask(channel, "echo", *blobs)
            segments = tuple(item.segment for item in back if isinstance(item, Blob))
            received = Context("kv", context.model, context.tokens, len(context), segments=segments)
            assert context.model is not None
            shape = Shape(context.model.layout, torch.bfloat16, torch.device("cpu"))
            snapshot = from_segments(received, shape)
            assert (snapshot.length, snapshot.arena.copied) == (600, 0)
            assert snapshot.arena.file is segments[0].tensors.file  # type: ignore[attr-defined]
            fork = snapshot.arena.fork(600)
            fork.keys[0][:, :, 600:601] = 1.0
            assert not any(os.pread(file.fd, 64, 600 * 64))
            del back, segments, received, snapshot, fork

    asyncio.run(scenario())


def test_memory_that_nobody_shares_is_copied_once_and_sealed(tmp_path: Path) -> None:
    async def scenario() -> None:
        blob, meter = large_blob(), Meter()
        async with opened(tmp_path) as (_, channel, _):
            (back,) = await ask(channel, "echo", blob, meter=meter)
            assert isinstance(back, Blob)
            assert as_bytes(back.verify()) == as_bytes(blob)
            assert back.runs[0].readonly
            assert meter.sent < 200
            del back

    asyncio.run(scenario())


def test_between_two_users_memory_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)

    async def scenario() -> None:
        blobs = blobs_of(shared_context()[0])
        async with opened(tmp_path) as (_, channel, _):
            back = await ask(channel, "echo", *blobs)
            assert [as_bytes(item) for item in back] == [as_bytes(blob) for blob in blobs]
            assert not any(isinstance(item, Blob) and isinstance(item.segment.tensors, SharedTensors) for item in back)
            del back

    asyncio.run(scenario())


def test_a_process_that_can_open_no_more_files_says_so_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def exhaust() -> None:
        spare = os.dup(0)
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))

    async def starved() -> AsyncIterator[Item]:
        yield {"n": 1}
        exhaust()
        yield large_blob()

    async def scenario() -> None:
        async with opened(tmp_path) as (_, channel, path):
            error = await failure(ask_with(channel, "count", starved()))
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert isinstance(error, Busy)
            assert "raise `ulimit -n`" in str(error)
            with socket.socket(socket.AF_UNIX) as waiting:
                exhaust()
                waiting.connect(path)
                await asyncio.sleep(0.25)
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
        assert caplog.text.count("no connection can be taken") == 1

    try:
        asyncio.run(scenario())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_descriptors_that_this_process_cannot_hold_end_the_call(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def scenario() -> None:
        near, far = socket.socketpair()
        fd = os.memfd_create("a")
        with near, far:
            near.sendmsg([b"F"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
            os.close(fd)
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (fd, limits[1]))
                with pytest.raises(ConnectionFailed, match="ulimit -n"):
                    receive(far, memoryview(bytearray(10)))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    asyncio.run(scenario())


def test_a_lossless_blob_of_shared_memory_goes_as_its_own_bytes(tmp_path: Path) -> None:
    async def scenario() -> None:
        context, _ = shared_context()
        blobs = blobs_of(context, codec="lossless")
        async with opened(tmp_path) as (_, channel, _):
            back = await ask(channel, "echo", *blobs)
            assert [as_bytes(item) for item in back] == [as_bytes(blob) for blob in blobs]
            del back

    asyncio.run(scenario())


def test_what_the_owner_changes_after_it_was_sealed_is_noticed(tmp_path: Path) -> None:
    async def scenario() -> None:
        context, file = shared_context()
        assert context.model is not None
        blob = seal(context.model, context.segments[0])
        async with opened(tmp_path) as (_, channel, _):
            os.pwrite(file.fd, b"\xff" * 64, 0)
            (back,) = await ask(channel, "echo", blob)
            assert isinstance(back, Blob)
            with pytest.raises(DigestMismatch, match="shared memory"):
                back.verify()
            del back

    asyncio.run(scenario())


def test_many_arenas_in_one_call_are_kept_apart(tmp_path: Path) -> None:
    async def scenario() -> None:
        blobs = [blobs_of(shared_context(tokens=40, seed=seed)[0])[0] for seed in range(70)]
        async with opened(tmp_path) as (_, channel, _):
            back = await ask(channel, "echo", *blobs, *blobs)
            assert [as_bytes(item) for item in back] == 2 * [as_bytes(blob) for blob in blobs]
            del back

    asyncio.run(scenario())


def test_another_process_reads_the_same_memory(tmp_path: Path) -> None:
    client = """
import asyncio, sys
from avp.protocols import Meter
from avp.security import Caller, Security
from avp.testing.echo import ask, sending
from avp.transports.fds import receive
from avp.transports.unix import TRANSPORT
async def main():
    channel = TRANSPORT.connect(sys.argv[1], security=Security())
    meter = Meter()
    back = [blob.verify() for blob in await ask(channel, "give", meter=meter)]
    assert len({blob.segment.tensors.file for blob in back}) == 1
    print(sum(blob.nbytes for blob in back), meter.received)
asyncio.run(main())
"""

    class Giver(EchoEndpoint):
        async def answer(self, verb: str, items: AsyncIterator[Item], *, caller: object) -> AsyncIterator[Item]:  # type: ignore[override]
            assert verb == "give"
            for blob in blobs:
                yield blob

    blobs = blobs_of(shared_context()[0])

    async def scenario() -> None:
        listener = await QUICK.serve(Giver(), f"unix:{tmp_path}/a.sock", security=Security())
        arguments = (sys.executable, "-c", client, listener.url)
        process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
        told, _ = await process.communicate()
        await listener.close()
        nbytes, received = map(int, told.split())
        assert process.returncode == 0
        assert nbytes == sum(blob.nbytes for blob in blobs)
        assert received < nbytes / 10

    asyncio.run(scenario())


# --- the count


def test_the_meter_counts_each_byte_on_the_socket(tmp_path: Path) -> None:
    counts = [0, 0]

    async def pump(source: socket.socket, target: socket.socket, index: int) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, 65536):
            counts[index] += len(data)
            await loop.sock_sendall(target, data)

    async def scenario() -> None:
        loop, meter = asyncio.get_running_loop(), Meter()
        listener = await QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/a.sock", security=Security())
        with (
            socket.socket(socket.AF_UNIX) as relay,
            socket.socket(socket.AF_UNIX) as far,
        ):
            relay.bind(f"{tmp_path}/relay.sock")
            relay.listen()
            relay.setblocking(False)
            far.setblocking(False)
            channel = QUICK.connect(f"unix:{tmp_path}/relay.sock", security=Security(token="t"))
            small = blobs_of(synthetic_context(tokens=40))[0]
            items: list[Item] = [{"text": "ż" * 100000}, small, {"n": 1}] * 5
            call = asyncio.create_task(ask(channel, "echo", *items, meter=meter))
            near, _ = await loop.sock_accept(relay)
            with near:
                near.setblocking(False)
                await loop.sock_connect(far, f"{tmp_path}/a.sock")
                pumps = [asyncio.create_task(pump(*way)) for way in ((near, far, 0), (far, near, 1))]
                assert len(await call) == 15
                for each in pumps:
                    each.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        assert [meter.sent, meter.received] == counts
        await listener.close()

    asyncio.run(scenario())


# --- the path


def test_only_the_owner_can_open_the_socket_and_it_goes_with_the_listener(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as (_, _, path):
            found = os.stat(path)
            assert stat.S_ISSOCK(found.st_mode)
            assert stat.S_IMODE(found.st_mode) == 0o600
        assert not os.path.exists(path)

    asyncio.run(scenario())


def test_the_socket_of_a_dead_server_is_replaced_and_that_of_a_live_one_is_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(f"{tmp_path}/a.sock")
        async with opened(tmp_path) as (_, channel, path):
            with pytest.raises(UsageError, match=r"is being served already\. Fix:"):
                await QUICK.serve(EchoEndpoint(), f"unix:{path}", security=Security())
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]

    asyncio.run(scenario())


def test_a_listener_leaves_the_socket_of_its_successor_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = await QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/a.sock", security=Security())
        os.unlink(tmp_path / "a.sock")
        second = await QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/a.sock", security=Security())
        await first.close()
        channel = QUICK.connect(second.url, security=Security())
        assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
        await second.close()

    asyncio.run(scenario())


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.sock").write_text("mine")
    with pytest.raises(UsageError, match="is no socket"):
        asyncio.run(QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/a.sock", security=Security()))
    assert (tmp_path / "a.sock").read_text() == "mine"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none/a\.sock: No such file or directory\. Fix:"):
        asyncio.run(QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/none/a.sock", security=Security()))


@pytest.mark.parametrize("url", ["unix:", "unix://host/a.sock", "mem:a", "/tmp/a.sock", "unix:a\0b"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"Fix: write unix:/path/to\.sock"):
        TRANSPORT.connect(url, security=Security())


def test_a_path_that_is_too_long_is_refused_with_its_length() -> None:
    with pytest.raises(UsageError, match=r"has 108 bytes; a unix socket's has at most 107\. Fix: choose a shorter"):
        TRANSPORT.connect("unix:/" + "a" * 107, security=Security())


@pytest.mark.parametrize("form", ["unix:a.sock", "unix:{0}/a.sock", "unix://{0}/a.sock"])
def test_a_path_may_be_relative_or_written_with_three_slashes(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async def scenario() -> None:
        listener = await QUICK.serve(EchoEndpoint(), form.format(tmp_path), security=Security())
        assert listener.url == f"unix:{tmp_path}/a.sock"
        monkeypatch.chdir("/")
        channel = QUICK.connect(listener.url, security=Security())
        assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
        await listener.close()
        assert os.listdir(tmp_path) == []

    asyncio.run(scenario())


# --- endings


def test_descriptors_are_closed_however_a_call_ends(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[Item]:
        yield large_blob()
        raise ZeroDivisionError("mine")

    async def scenario() -> None:
        context, _ = shared_context()
        blobs = [*blobs_of(context), large_blob()]
        async with opened(tmp_path) as (_, channel, _):
            for _ in range(5):
                async with channel.call("echo", sending(*blobs, *blobs), meter=Meter()) as answer:
                    await anext(answer)
                async with channel.call("hang", sending(*blobs, *blobs), meter=Meter()):
                    await asyncio.sleep(0)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await ask(channel, "hang", *blobs, *blobs)
                with pytest.raises(ZeroDivisionError, match="mine"):
                    await ask_with(channel, "echo", broken())
            del answer

    asyncio.run(scenario())


def test_what_exceeds_the_limits_in_shared_memory_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        blobs = blobs_of(shared_context()[0])
        for limits in (Limits(bytes=blobs[0].nbytes - 1), Limits(header=len(blobs[0].header) - 9)):
            async with opened(tmp_path, limits=limits) as (_, channel, _):
                assert isinstance(await failure(ask(channel, "count", *blobs)), LimitExceeded)
                assert await ask(channel, "echo", {"n": 2}) == [{"n": 2}]

    asyncio.run(scenario())


def test_a_call_works_in_uvloop(tmp_path: Path) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def scenario() -> None:
        blobs = [*blobs_of(shared_context()[0]), large_blob()]
        async with opened(tmp_path) as (endpoint, channel, _):
            back = await ask(channel, "echo", *blobs, *blobs)
            assert [as_bytes(item) for item in back] == 2 * [as_bytes(blob) for blob in blobs]
            del back
            async with channel.call("hang", sending(), meter=Meter()):
                assert await asyncio.to_thread(endpoint.started.wait, 10)
            assert await asyncio.to_thread(endpoint.left.wait, 10)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


def test_closing_a_channel_ends_its_calls(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as (endpoint, channel, _):
            async with channel.call("blobs", sending({"n": 1000}), meter=Meter()) as answer:
                await anext(answer)
                await channel.close()
                with pytest.raises(ConnectionFailed):
                    [item async for item in answer]
            assert await asyncio.to_thread(endpoint.left.wait, 10)
            del answer

    asyncio.run(scenario())


def test_a_listener_is_of_this_transport(tmp_path: Path) -> None:
    async def scenario() -> None:
        listener = await TRANSPORT.serve(EchoEndpoint(), f"unix:{tmp_path}/b.sock", security=Security())
        assert isinstance(listener, UnixListener)
        await listener.close()

    asyncio.run(scenario())


def test_a_fault_in_admitting_a_caller_ends_the_call_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(EchoEndpoint):
        def admit(self, token: str | None, *, address: str) -> Caller:
            raise ZeroDivisionError(f"{token} at {address}")

    async def scenario() -> None:
        listener = await QUICK.serve(Faulty(), f"unix:{tmp_path}/a.sock", security=Security())
        channel = QUICK.connect(listener.url, security=Security(token="secret"))
        assert isinstance(await failure(ask(channel, "echo", {"n": 1})), ConnectionFailed)
        await listener.close()

    asyncio.run(scenario())
    assert "ended with a fault: ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text


def test_a_caller_waits_while_the_queue_of_connections_is_full(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as first:
            full.bind(f"{tmp_path}/a.sock")
            full.listen(0)
            first.connect(f"{tmp_path}/a.sock")
            channel = QUICK.connect(f"unix:{tmp_path}/a.sock", security=Security())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await ask(channel, "echo")
            with pytest.raises(UsageError, match="is being served already"):
                await QUICK.serve(EchoEndpoint(), f"unix:{tmp_path}/a.sock", security=Security())

    asyncio.run(scenario())


def test_errors_of_a_call_are_ours(tmp_path: Path) -> None:
    channel = TRANSPORT.connect(f"unix:{tmp_path}/none.sock", security=Security())
    error = asyncio.run(failure(ask(channel, "echo")))
    assert isinstance(error, AVPError)
    assert "No such file or directory. Fix: start the server" in str(error)
