"""What a stranger may do to a server at a unix socket: garbage, silence, half frames, descriptors of every kind."""

from __future__ import annotations

import array
import asyncio
import fcntl
import gc
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from avp.blob import Blob
from avp.errors import AccessDenied, AVPError, BundleError, ConnectionFailed, LimitExceeded, TimedOut, TruncatedBundle
from avp.manifest import Limits
from avp.protocols import Item
from avp.security import Security
from avp.shared import MemoryFile, SharedTensors
from avp.testing.echo import EchoEndpoint, ask, blobs_of, large_blob
from avp.testing.synthetic import synthetic_context
from avp.transports.fds import WINDOW, Inbox, Outbox, Packet, Signal
from avp.transports.unix import UnixTransport
from avp.wire import encode_item

QUICK = UnixTransport(patience=0.2, grace=0.1)
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE
REQUEST = b"".join(map(bytes, encode_item({"call": "count", "token": None})))


def shared_blob() -> Blob:
    """A blob whose KV lies in a memory file."""
    plain = blobs_of(synthetic_context(tokens=32))[0]
    layout = plain.model.layout
    kv = plain.segment
    rows = b"".join(kv.read(layer, part).tobytes() for layer in range(2) for part in ("k", "v"))
    file = MemoryFile.create(len(rows))
    os.pwrite(file.fd, rows, 0)
    tensors = SharedTensors.of(file, layout, "bfloat16", 32, 0, 32)
    return Blob(plain.model, plain.entry, type(kv)(*_fields(kv), tensors), plain.header, None)


def _fields(segment: object) -> list[object]:
    names = ("start", "tokens", "parent", "pages", "dtype", "engine", "exactness")
    return [getattr(segment, name) for name in names]


def memfd(data: bytes, *, seals: int = 0) -> int:
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def bundle() -> bytes:
    return b"".join(large_blob().runs)


def bytes_of(packed: Packet) -> bytes:
    return b"".join(packed.runs)


def open_files() -> list[str]:
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))


def feed(data: bytes, *fds: int, trusted: bool = True, limits: Limits | None = None) -> AVPError:
    """The error with which an inbox ends; it has then closed all descriptors, which were given to it."""
    inbox = Inbox(limits=limits or Limits(), trusted=trusted, greeting=False)
    copies = [os.dup(fd) for fd in fds]
    before = open_files()
    try:
        with pytest.raises(AVPError) as caught:
            list(inbox.feed(memoryview(data), copies))
    finally:
        inbox.close()
        del inbox
    error = caught.value
    del caught
    error.__traceback__ = None
    assert len(open_files()) == len(before) - len(copies)
    return error


# --- descriptors


def test_a_file_that_could_still_change_is_refused() -> None:
    for seals in (0, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW):
        fd = memfd(bundle(), seals=seals)
        error = feed(b"F", fd)
        assert (type(error), "not sealed" in str(error)) == (BundleError, True)
        os.close(fd)


def test_what_is_no_file_in_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.avp").write_bytes(bundle())
    near, far = socket.socketpair()
    reading, writing = os.pipe()
    fds = [near.fileno(), reading, os.open(tmp_path, os.O_RDONLY), os.open(tmp_path / "a.avp", os.O_RDONLY)]
    blob = shared_blob()
    frame = bytes_of(Outbox(trusted=True).pack(blob))
    for fd in fds:
        assert "not sealed" in str(feed(b"F", fd))
        assert "not sealed" in str(feed(frame, fd))
    near.close()
    far.close()
    for fd in (reading, writing, *fds[2:]):
        os.close(fd)


def test_a_file_of_a_wrong_size_is_refused_before_it_is_read() -> None:
    whole = bundle()
    cases: list[tuple[bytes, type[AVPError]]] = [
        (b"", TruncatedBundle),
        (whole[:7], TruncatedBundle),
        (whole[:100], TruncatedBundle),
        (whole[:-1], TruncatedBundle),
        (whole + b"\0", BundleError),
        (bytes(4096), BundleError),
    ]
    for data, kind in cases:
        fd = memfd(data, seals=SEALS)
        assert type(feed(b"F", fd)) is kind
        os.close(fd)


def test_a_file_beyond_the_limits_is_refused_before_it_is_mapped() -> None:
    fd = os.memfd_create("large", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 2**40)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    assert isinstance(feed(b"F", fd), LimitExceeded)
    os.close(fd)


def test_shared_memory_that_could_be_cut_is_refused() -> None:
    blob = shared_blob()
    fd = memfd(bytes(100000), seals=0)
    assert "could be cut" in str(feed(bytes_of(Outbox(trusted=True).pack(blob)), fd))
    os.close(fd)


def test_shared_memory_that_is_too_small_is_refused_before_it_is_mapped() -> None:
    fd = memfd(bytes(4095), seals=fcntl.F_SEAL_SHRINK)
    assert "smaller than what it is said to hold" in str(feed(bytes_of(Outbox(trusted=True).pack(shared_blob())), fd))
    os.close(fd)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1, 32, 0, 32), "was never shown"),
        ((2**32 - 1, 32, 0, 32), "was never shown"),
        ((0, 33, 0, 32), "smaller than what"),
        ((0, 2**64 - 1, 0, 32), "smaller than what"),
        ((0, 32, 1, 33), "smaller than what"),
        ((0, 32, 0, 31), "describes other tensors"),
        ((0, 32, 32, 0), "describes other tensors"),
        ((0, 32, 2**64 - 32, 2**64 - 1), "describes other tensors"),
        ((0, 0, 0, 0), "describes other tensors"),
    ],
)
def test_numbers_that_do_not_fit_the_memory_are_refused(numbers: tuple[int, int, int, int], message: str) -> None:
    blob = shared_blob()
    tensors = blob.segment.tensors
    assert isinstance(tensors, SharedTensors)
    number, capacity, start, stop = numbers
    frame = b"M" + struct.pack("<IIQQQ", number, len(blob.header), capacity, start, stop) + blob.header
    assert message in str(feed(frame, tensors.file.fd))


def test_a_header_that_is_too_long_is_refused_by_its_length_alone() -> None:
    frame = b"M" + struct.pack("<IIQQQ", 0, 2**32 - 1, 32, 0, 32)
    assert isinstance(feed(frame), LimitExceeded)


def test_a_header_of_something_else_is_refused() -> None:
    context = synthetic_context(tokens=32).to_bytes()
    blob = shared_blob()
    tensors = blob.segment.tensors
    assert isinstance(tensors, SharedTensors)
    lossless = blobs_of(synthetic_context(tokens=32), codec="lossless")[0].header
    for header in (b"", b"\0" * 8, bytes(blob.header)[:-1], context, context[:2000], lossless, b"\xff" * 2000):
        frame = b"M" + struct.pack("<IIQQQ", 0, len(header), 32, 0, 32) + header
        assert isinstance(feed(frame, tensors.file.fd), BundleError)


def test_shared_memory_of_another_user_is_refused_and_is_not_sent_to_one() -> None:
    blob = shared_blob()
    tensors = blob.segment.tensors
    assert isinstance(tensors, SharedTensors)
    frame = bytes_of(Outbox(trusted=True).pack(blob))
    error = feed(frame, tensors.file.fd, trusted=False)
    assert isinstance(error, AccessDenied)
    assert "Fix: run both as one user" in str(error)
    assert bytes_of(Outbox(trusted=True).pack(blob))[:1] == b"M"
    assert bytes_of(Outbox(trusted=False).pack(blob))[:1] == b"B"


def test_a_descriptor_that_no_frame_speaks_of_is_closed_and_refused() -> None:
    fd = memfd(bundle(), seals=SEALS)
    event = b"".join(map(bytes, encode_item({"n": 1})))
    for data, count in ((event, 1), (b"A", 1), (b"E", 1), (event[:3], 1), (b"F", 2), (b"M", 2)):
        assert "no frame speaks of" in str(feed(data, *[fd] * count))
    os.close(fd)


def test_a_frame_whose_descriptor_did_not_come_is_refused() -> None:
    assert "did not come" in str(feed(b"F"))
    assert "did not come" in str(feed(bytes_of(Outbox(trusted=True).pack(shared_blob()))))


def test_nothing_but_acknowledgements_follows_the_end() -> None:
    assert "after the end" in str(feed(b"EAAF"))
    assert "frame begins" in str(feed(b"EAJ"))


def test_a_frame_may_come_byte_by_byte() -> None:
    blob = shared_blob()
    outbox, inbox = Outbox(trusted=True), Inbox(limits=Limits(), trusted=True, greeting=False)
    got: list[object] = []
    for item in (blob, {"n": 1}, large_blob(), blob):
        packed = outbox.pack(item)
        data, fds = bytes_of(packed), [] if packed.fd is None else [os.dup(packed.fd)]
        for index in range(len(data)):
            got += inbox.feed(memoryview(data)[index : index + 1], fds if index == 0 else [])
    assert [type(each) for each in got] == [Blob, dict, Blob, Blob]
    assert all(each.verify() for each in got if isinstance(each, Blob))


# --- connections


def run(tmp_path: Path, attack: Callable[[str, EchoEndpoint], Awaitable[None]]) -> None:
    """Serve, attack, and see that the server still answers and holds nothing."""

    async def scenario() -> None:
        endpoint, path = EchoEndpoint(), f"{tmp_path}/a.sock"
        listener = await QUICK.serve(endpoint, f"unix:{path}", security=Security())
        channel = QUICK.connect(listener.url, security=Security())
        await ask(channel, "echo", {"n": 1})
        before = len(open_files())
        async with asyncio.timeout(20):
            await attack(path, endpoint)
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
            while len(open_files()) > before:
                await asyncio.sleep(0.01)
        await listener.close()

    asyncio.run(scenario())


async def converse(path: str, data: bytes, fds: Sequence[int] = (), *, shut: bool = False) -> AVPError | list[Item]:
    """Connect, send, and read what the server says until it closes."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(path)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        if data:
            raw.sendmsg([data], [rights] if fds else [])
        raw.setblocking(False)
        if shut:
            return []
        inbox, items = Inbox(limits=Limits(), trusted=True, greeting=False), list[Item]()
        try:
            while answer := await loop.sock_recv(raw, 65536):
                items += [got for got in inbox.feed(memoryview(answer), []) if not isinstance(got, Signal)]
        except ConnectionResetError:
            pass
        except AVPError as error:
            return error
        return items


def test_garbage_is_answered_with_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "avp")

    async def attack(path: str, _: EchoEndpoint) -> None:
        for data in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\0" * 100000,
            b"A",
            b"E",
            b"B" + bundle()[:60000],
            b"J\xff\xff\xff\xff",
        ):
            caplog.clear()
            error = await converse(path, data)
            assert isinstance(error, ConnectionFailed | LimitExceeded), error
            assert [record.name for record in caplog.records if record.name == "avp"] == ["avp"]
            assert type(error).__name__ in caplog.text

    run(tmp_path, attack)


def test_a_first_frame_that_is_no_request_is_refused(tmp_path: Path) -> None:
    async def attack(path: str, endpoint: EchoEndpoint) -> None:
        endpoint.started.clear()
        for event in (b"{}", b'{"call":1}', b"[]", b"nonsense", b'{"call":null,"token":"t"}'):
            error = await converse(path, b"J" + struct.pack("<I", len(event)) + event)
            assert isinstance(error, ConnectionFailed), error
        assert not endpoint.started.is_set()

    run(tmp_path, attack)


def test_whoever_says_nothing_is_let_go_in_time(tmp_path: Path) -> None:
    async def attack(path: str, _: EchoEndpoint) -> None:
        answers = await asyncio.gather(*(converse(path, data) for data in (b"", b"J", REQUEST[:-1])))
        assert [type(answer) for answer in answers] == [TimedOut] * 3

    run(tmp_path, attack)


def test_a_connection_may_break_at_any_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "avp")
    blob = shared_blob()
    small = b"".join(map(bytes, encode_item(blobs_of(synthetic_context(tokens=1))[0])))
    stream = REQUEST + bytes_of(Outbox(trusted=True).pack(blob)) + small + b"AE"
    tensors = blob.segment.tensors
    assert isinstance(tensors, SharedTensors)

    async def attack(path: str, _: EchoEndpoint) -> None:
        sizes = (*range(0, 120), *range(120, len(stream), 37))
        for size in sizes:
            await converse(path, stream[:size], [tensors.file.fd] if size > len(REQUEST) else [], shut=True)
        await asyncio.sleep(0.1)
        assert len([record for record in caplog.records if record.name == "avp"]) <= len(sizes)

    run(tmp_path, attack)


def test_descriptors_that_no_one_asked_for_are_closed(tmp_path: Path) -> None:
    async def attack(path: str, _: EchoEndpoint) -> None:
        fd = memfd(bundle(), seals=SEALS)
        for count in (1, 2, 4, 5, 100):
            for data in (b"J", REQUEST, REQUEST + b"F?", REQUEST + b"FF?", REQUEST + b"M" * 99, b"?"):
                answer = await converse(path, data, [fd] * count)
                assert isinstance(answer, AVPError), (count, data, answer)
        os.close(fd)

    run(tmp_path, attack)


def test_whoever_sends_more_than_the_window_is_refused(tmp_path: Path) -> None:
    hang = b"".join(map(bytes, encode_item({"call": "hang", "token": None})))
    event = b"".join(map(bytes, encode_item({"n": 1})))

    async def attack(path: str, _: EchoEndpoint) -> None:
        assert isinstance(await converse(path, REQUEST + event * 100), ConnectionFailed)
        assert isinstance(await converse(path, REQUEST + b"A" * 100), ConnectionFailed)
        await converse(path, hang + event * 1000, shut=True)
        count = b"".join(map(bytes, encode_item({"call": "count", "token": None})))
        assert await converse(path, count + event * (WINDOW - 1) + b"E") == [{"items": 7, "blobs": 0, "bytes": 0}]

    run(tmp_path, attack)


def test_what_a_log_says_never_quotes_the_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "avp")

    async def attack(path: str, _: EchoEndpoint) -> None:
        channel = QUICK.connect(f"unix:{path}", security=Security(token="a secret token"))
        for verb, event in (
            ("crash", {"text": "a secret prompt"}),
            ("fail", {"type": "UsageError", "message": "a secret prompt"}),
            ("a secret verb" * 100, {}),
        ):
            with pytest.raises(AVPError):
                await ask(channel, verb, event)

    run(tmp_path, attack)
    assert "RuntimeError" in caplog.text
    assert "secret prompt" not in caplog.text
    assert "secret token" not in caplog.text
