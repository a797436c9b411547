"""What passes between processes as memory: what is shared, copied or refused, and what runs out."""

from __future__ import annotations

import array
import asyncio
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from avp.blob import Blob, seal
from avp.context import Context
from avp.errors import Busy, ConnectionFailed, DigestMismatch
from avp.protocols import Item, Meter
from avp.security import Security
from avp.shared import SharedTensors
from avp.testing.echo import EchoEndpoint, as_bytes, ask, ask_with, blobs_of, failure, large_blob
from avp.transports.fds import receive

from .unix_tools import QUICK, opened, shared_context


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
