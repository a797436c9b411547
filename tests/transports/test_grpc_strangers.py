"""gRPC with clients and servers that are not ours: stubs made from the .proto, garbage, statuses."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import pytest

from avp import errors
from avp.errors import AccessDenied, AVPError, Busy, ConnectionFailed, TimedOut, UsageError
from avp.manifest import Limits
from avp.protocols import Channel, Item, Listener, Meter
from avp.security import Security, Tenant
from avp.testing.echo import as_bytes, ask, ask_with, failure, large_blob
from avp.transports import grpc_piece
from avp.transports.grpc import TRANSPORT
from avp.wire import Decoder, encode_item

from .grpc_tools import opened, run

PROTO = Path(__file__).parents[2] / "docs" / "spec" / "avp.proto"
METHOD = "/avp.v1.Agent/Call"


@asynccontextmanager
async def foreign(behaviour: Callable[[Any, Any], Any]) -> AsyncIterator[Channel]:
    """A channel of ours to a server that is not ours."""
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(behaviour)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("avp.v1.Agent", {"Call": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = TRANSPORT.connect(f"grpc://127.0.0.1:{port}", security=Security())
    try:
        yield channel
    finally:
        await channel.close()
        await server.stop(0)


# Clients that are not ours


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, ModuleType]:
    """What grpcio-tools makes of the .proto: the messages, and the stub."""
    folder = tmp_path_factory.mktemp("stub")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO.parent}", f"--python_out={folder}"]
    subprocess.run([*command, f"--grpc_python_out={folder}", PROTO.name], check=True)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("avp_pb2"), importlib.import_module("avp_pb2_grpc")
    finally:
        sys.path.remove(str(folder))


def port_of(listener: Listener) -> str:
    return listener.url.removeprefix("grpc://")


def test_a_stub_made_from_the_proto_talks_to_our_server(stub: tuple[ModuleType, ModuleType]) -> None:
    messages, services = stub
    items: list[Item] = [{"n": 1}, large_blob(), {"n": 2}]
    stream = b"".join(bytes(run) for item in items for run in encode_item(item)) + b"E"

    async def scenario() -> None:
        server, metadata = Security(tokens={"one": Tenant()}), [("avp-verb", "echo"), ("authorization", "bearer one")]
        async with opened(server) as (_, _, listener), grpc.aio.insecure_channel(port_of(listener)) as channel:
            for size in (1000, 65536, 3 << 20):
                pieces = [messages.Piece(data=stream[at : at + size]) for at in range(0, len(stream), size)]
                call = services.AgentStub(channel).Call(iter([messages.Piece(), *pieces]), metadata=metadata)
                decoder = Decoder(Limits())
                back = [item async for piece in call for item in decoder.feed(piece.data)]
                assert [as_bytes(item) for item in back] == [as_bytes(item) for item in items]
                assert decoder.ended
                assert await call.code() is grpc.StatusCode.OK

    run(scenario)


def test_a_server_made_from_the_proto_talks_to_our_client(stub: tuple[ModuleType, ModuleType]) -> None:
    messages, _ = stub

    async def echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        assert dict(context.invocation_metadata())["avp-verb"] == "sing"
        async for request in requests:
            yield messages.Piece(data=messages.Piece.FromString(request).data).SerializeToString()

    async def scenario() -> None:
        async with foreign(echo) as channel:
            items: list[Item] = [{"n": 1}, large_blob()]
            assert [as_bytes(item) for item in await ask(channel, "sing", *items)] == [as_bytes(i) for i in items]

    run(scenario)


def test_our_messages_are_those_of_protobuf(stub: tuple[ModuleType, ModuleType]) -> None:
    messages, _ = stub
    for size in (1, 127, 128, 129, 16383, 16384, 2**20, 2**21 - 1, 2**21):
        data = bytes([size % 251]) * size
        made = grpc_piece.make_piece([data[:1], memoryview(data)[1:]])
        assert made == messages.Piece(data=data).SerializeToString()
        assert grpc_piece.read_piece(made) == data
    assert grpc_piece.read_piece(messages.Piece().SerializeToString()) == b""


@pytest.mark.parametrize(
    "body",
    [
        b"\x0a",
        b"\x0a\x05abc",
        b"\x0a\x01ab",
        b"\x12\x01a",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff",
        b"\x0a\x80",
        b"garbage",
        grpc_piece.make_piece([b"garbage"]),
        grpc_piece.make_piece([b"J\x04\x00\x00\x00[1]"]),
        grpc_piece.make_piece([b"J\x02\x00\x00\x00[]E"]),
        grpc_piece.make_piece([b"J\xff\xff\xff\xff"]),
        grpc_piece.make_piece([b"B" + b"\xff" * 16]),
        grpc_piece.make_piece([b"EE"]),
    ],
    ids=repr,
)
def test_garbage_is_refused_with_a_reason_and_the_server_lives_on(body: bytes) -> None:
    async def scenario() -> None:
        async with opened() as (_, ours, listener), grpc.aio.insecure_channel(port_of(listener)) as channel:
            call = channel.stream_stream(METHOD)(iter([body]), metadata=[("avp-verb", "count")])
            decoder = Decoder(Limits())
            with pytest.raises(AVPError, match="Fix: "):
                [item async for message in call for item in decoder.feed(grpc_piece.read_piece(message))]
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "Fix: " in await call.details()
            assert await ask(ours, "echo", {"n": 1}) == [{"n": 1}]

    run(scenario)


async def status(listener: Listener, body: list[bytes], metadata: list[tuple[str, str]]) -> grpc.aio.AioRpcError:
    """What a client that knows nothing of AVP sees."""
    async with grpc.aio.insecure_channel(port_of(listener)) as channel:
        call = channel.stream_stream(METHOD)(iter(body), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [message async for message in call]
        return caught.value


def test_every_error_has_a_status_that_fits() -> None:
    codes = {
        UsageError: "INVALID_ARGUMENT",
        errors.TruncatedBundle: "INVALID_ARGUMENT",
        errors.HandleExpired: "NOT_FOUND",
        errors.IdentityMismatch: "FAILED_PRECONDITION",
        AccessDenied: "UNAUTHENTICATED",
        Busy: "RESOURCE_EXHAUSTED",
        TimedOut: "DEADLINE_EXCEEDED",
        ConnectionFailed: "UNAVAILABLE",
    }

    async def scenario() -> None:
        async with opened() as (_, _, listener):
            for kind, code in codes.items():
                event = {"type": kind.__name__, "message": "ż. Fix: none.", "retry_after": 2.5}
                body = [*grpc_piece.pieces_of(event), grpc_piece.make_piece([b"E"])]
                error = await status(listener, body, [("avp-verb", "fail")])
                assert (error.code().name, error.details()) == (code, "ż. Fix: none.")
                assert dict(error.trailing_metadata()).get("retry-after") == ("2.5" if kind is Busy else None)

    run(scenario)
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, AVPError)]
    unknown = [kind for kind in kinds if grpc_piece.status_of(kind("")) is grpc.StatusCode.UNKNOWN]
    assert unknown == [AVPError]


def test_a_long_message_is_shortened_for_the_status_only() -> None:
    message = "ż" * 5000 + " Fix: none."

    async def scenario() -> None:
        async with opened() as (_, channel, listener):
            event = {"type": "NoAgreement", "message": message}
            assert str(await failure(ask(channel, "fail", event))) == message
            error = await status(listener, list(grpc_piece.pieces_of(event)), [("avp-verb", "fail")])
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert (error.details() or "").startswith("żż")

    run(scenario)


def test_a_call_without_a_verb_or_of_another_method_says_so() -> None:
    async def scenario() -> None:
        async with opened() as (endpoint, _, listener):
            error = await status(listener, [], [])
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "avp-verb" in (error.details() or "")
            async with grpc.aio.insecure_channel(port_of(listener)) as channel:
                call = channel.stream_stream("/avp.v1.Agent/Dance")(iter([]))
                assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
            assert not endpoint.started.is_set()

    run(scenario)


def test_a_message_beyond_the_limit_is_not_taken() -> None:
    async def scenario() -> None:
        async with opened() as (_, ours, listener):
            error = await status(listener, [bytes(grpc_piece.MESSAGE_LIMIT + 1)], [("avp-verb", "count")])
            assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)
            assert await ask(ours, "echo", {"n": 1}) == [{"n": 1}]

    run(scenario)


# Servers that are not ours


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "who are you?", AccessDenied),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "late", TimedOut),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!", Busy),
        (grpc.StatusCode.UNAVAILABLE, "closing", ConnectionFailed),
        (grpc.StatusCode.CANCELLED, "closing", ConnectionFailed),
        (grpc.StatusCode.PERMISSION_DENIED, "no", ConnectionFailed),
    ],
)
def test_a_status_without_an_error_in_the_stream_becomes_one_of_ours(
    code: grpc.StatusCode, details: str, kind: type[AVPError]
) -> None:
    async def refuse(_: object, context: Any) -> None:
        await context.abort(code, details)

    async def scenario() -> None:
        async with foreign(refuse) as channel:
            error = await failure(ask(channel, "echo"))
            assert type(error) is kind
            assert details in str(error)
            assert "Fix: " in str(error)

    run(scenario)


@pytest.mark.parametrize(
    "answer", [b"garbage", grpc_piece.make_piece([b"J\x02\x00\x00\x00{}"]), grpc_piece.make_piece([b"x"])]
)
def test_an_answer_that_is_cut_or_nonsense_is_a_failed_connection(answer: bytes) -> None:
    async def reply(_: object, context: Any) -> None:
        await context.write(answer)

    async def scenario() -> None:
        async with foreign(reply) as channel:
            assert type(await failure(ask(channel, "echo"))) is ConnectionFailed

    run(scenario)


def test_an_answer_that_does_not_wait_for_the_request_is_whole() -> None:
    """The server stops reading; grpc.aio calls that an internal error."""

    async def reply(_: object, context: Any) -> None:
        await context.write(grpc_piece.make_piece([b"J\x02\x00\x00\x00{}E"]))

    async def forever() -> AsyncIterator[Item]:
        while True:
            yield large_blob()

    async def scenario() -> None:
        async with foreign(reply) as channel:
            for _ in range(20):
                assert await ask_with(channel, "echo", forever()) == [{}]

    run(scenario)


def test_the_meter_is_the_sum_of_the_messages() -> None:
    seen = Meter()

    async def count(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
        async for request in requests:
            seen.sent += len(request)
            seen.received += len(request)
            yield request

    async def scenario() -> None:
        meter = Meter()
        async with foreign(count) as channel:
            await ask(channel, "echo", {"n": 1}, *[large_blob()] * 3, meter=meter)
        assert meter == seen
        assert meter.sent > 3 * large_blob().nbytes

    run(scenario)


def test_a_piece_has_a_bounded_size_whatever_the_item() -> None:
    for item in (large_blob(), {"text": "x" * (3 * grpc_piece.PIECE)}, {}):
        messages = list(grpc_piece.pieces_of(item))
        data = [grpc_piece.read_piece(message) for message in messages]
        assert b"".join(data) == b"".join(map(bytes, encode_item(item)))
        assert all(len(piece) == grpc_piece.PIECE for piece in data[:-1])
        assert 0 < len(data[-1]) <= grpc_piece.PIECE
