"""gRPC: the laws of a transport, TLS, and what is not ours at either end."""

from __future__ import annotations

import asyncio
import importlib
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme

from avp import errors
from avp.errors import AccessDenied, AVPError, Busy, ConnectionFailed, TimedOut, UsageError
from avp.manifest import Limits
from avp.protocols import Channel, Item, Listener, Meter, Transport
from avp.security import Security, Tenant
from avp.testing.echo import EchoEndpoint, as_bytes, ask, ask_with, failure, large_blob, sending
from avp.testing.transport import TransportConformance
from avp.transports import grpc_piece
from avp.transports.grpc import SECURE, TRANSPORT, GrpcTransport
from avp.wire import Decoder, encode_item

PROTO = Path(__file__).parents[2] / "docs" / "spec" / "avp.proto"
METHOD = "/avp.v1.Agent/Call"
NOBODY = Security()


@dataclass(frozen=True)
class Certificates:
    """Files of an authority that is trusted, one that is not, and what they signed."""

    ca: Path
    other: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]
    stranger: tuple[Path, Path]

    def serving(self, *, mutual: bool = False) -> Security:
        return Security(ca=self.ca if mutual else None, cert=self.server[0], key=self.server[1])

    def calling(self, own: tuple[Path, Path] | None = None) -> Security:
        return Security(ca=self.ca, cert=own and own[0], key=own and own[1])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    ours, theirs = trustme.CA(), trustme.CA()

    def issue(ca: trustme.CA, stem: str, *names: str) -> tuple[Path, Path]:
        found, cert, key = ca.issue_cert(*names), folder / f"{stem}.crt", folder / f"{stem}.key"
        cert.write_bytes(b"".join(part.bytes() for part in found.cert_chain_pems))
        found.private_key_pem.write_to_path(str(key))
        return cert, key

    for ca, name in ((ours, "ca.crt"), (theirs, "other.crt")):
        ca.cert_pem.write_to_path(str(folder / name))
    return Certificates(
        folder / "ca.crt",
        folder / "other.crt",
        issue(ours, "server", "127.0.0.1", "localhost"),
        issue(ours, "client", "an-agent"),
        issue(theirs, "stranger", "an-agent"),
    )


class TestGrpc(TransportConformance):
    lead = 48  # the window of HTTP/2 grows with the speed of the line: up to 40 were seen

    def transport(self) -> Transport:
        return TRANSPORT

    def address(self, tmp_path: Path) -> str:
        return "grpc://127.0.0.1:0"


class TestGrpcs(TransportConformance):
    lead = 48  # the window of HTTP/2 grows with the speed of the line: up to 40 were seen

    @pytest.fixture(autouse=True)
    def _certificates(self, certificates: Certificates) -> None:
        self.certificates = certificates

    def transport(self) -> Transport:
        return SECURE

    def address(self, tmp_path: Path) -> str:
        return "grpcs://127.0.0.1:0"

    def security(self) -> tuple[Security, Security]:
        return self.certificates.serving(), self.certificates.calling()


class TestMutualTls(TestGrpcs):
    def security(self) -> tuple[Security, Security]:
        return self.certificates.serving(mutual=True), self.certificates.calling(self.certificates.client)


def run(scenario: Callable[[], Coroutine[object, object, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


@asynccontextmanager
async def opened(
    server: Security = NOBODY, client: Security = NOBODY, *, transport: GrpcTransport = TRANSPORT
) -> AsyncIterator[tuple[EchoEndpoint, Channel, Listener]]:
    endpoint = EchoEndpoint(security=server)
    listener = await transport.serve(endpoint, f"{transport.scheme}://127.0.0.1:0", security=server)
    channel = transport.connect(listener.url, security=client)
    try:
        yield endpoint, channel, listener
    finally:
        await channel.close()
        await listener.close()


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


# TLS


def test_a_client_without_the_right_certificate_is_not_served(certificates: Certificates) -> None:
    async def scenario() -> None:
        for own in (None, certificates.stranger):
            both = certificates.serving(mutual=True), certificates.calling(own)
            async with opened(*both, transport=SECURE) as (endpoint, channel, _):
                error = await failure(ask(channel, "who"))
                assert type(error) is ConnectionFailed
                assert "client certificates" in str(error)
                assert not endpoint.started.is_set()

    run(scenario)


def test_a_server_whose_certificate_another_authority_signed_is_not_trusted(certificates: Certificates) -> None:
    async def scenario() -> None:
        for client in (Security(ca=certificates.other), Security()):
            async with opened(certificates.serving(), client, transport=SECURE) as (endpoint, channel, _):
                error = await failure(ask(channel, "who"))
                assert type(error) is AccessDenied
                assert "Fix: give the authority" in str(error)
                assert not endpoint.started.is_set()

    run(scenario)


def test_tls_and_plain_do_not_meet(certificates: Certificates) -> None:
    async def scenario() -> None:
        async with opened(certificates.serving(), transport=SECURE) as (_, _, listener):
            plain = TRANSPORT.connect(listener.url.replace("grpcs", "grpc"), security=Security())
            assert type(await failure(ask(plain, "who"))) is ConnectionFailed
            await plain.close()
        async with opened() as (_, _, listener):
            secure = SECURE.connect(listener.url.replace("grpc", "grpcs"), security=certificates.calling())
            assert type(await failure(ask(secure, "who"))) is ConnectionFailed
            await secure.close()

    run(scenario)


# What is refused before anything is sent


def test_a_server_that_would_be_open_to_all_is_refused() -> None:
    async def scenario() -> None:
        with pytest.raises(UsageError, match="can be reached from other machines"):
            await TRANSPORT.serve(EchoEndpoint(), "grpc://0.0.0.0:0", security=Security())
        tokens = Security(tokens={"one": Tenant.named("a")})
        listener = await TRANSPORT.serve(EchoEndpoint(), "grpc://0.0.0.0:0", security=tokens)
        await listener.close()

    run(scenario)


def test_certificates_that_would_do_nothing_are_refused(certificates: Certificates) -> None:
    async def scenario() -> None:
        for security in (certificates.serving(), Security(ca=certificates.ca)):
            with pytest.raises(UsageError, match="grpc:// knows no certificates"):
                await TRANSPORT.serve(EchoEndpoint(), "grpc://127.0.0.1:0", security=security)

    run(scenario)


def test_files_that_are_no_certificates_are_named(certificates: Certificates, tmp_path: Path) -> None:
    cert, key = certificates.server
    wrong = [
        (Security(), "a certificate and its key are needed"),
        (Security(cert=cert), "a certificate and its key are needed"),
        (Security(cert=cert, key=certificates.client[1]), "are no certificate and its key"),
        (Security(cert=cert, key=tmp_path / "none"), "are no certificate and its key"),
        (Security(cert=cert, key=key, ca=key), "holds no authorities"),
        (Security(cert=cert, key=key, ca=tmp_path / "none"), "holds no authorities"),
    ]

    async def scenario() -> None:
        for security, message in wrong:
            with pytest.raises(UsageError, match=message):
                await SECURE.serve(EchoEndpoint(), "grpcs://127.0.0.1:0", security=security)

    run(scenario)
    for security, message in wrong[1:]:
        with pytest.raises(UsageError, match=message):
            SECURE.connect("grpcs://127.0.0.1:1", security=security)


def test_what_is_no_address_of_ours_is_refused() -> None:
    for url in ("grpcs://127.0.0.1:1", "127.0.0.1:1", "grpc://127.0.0.1", "grpc://:1"):
        with pytest.raises(UsageError, match="Fix: write it as"):
            TRANSPORT.connect(url, security=Security())
    with pytest.raises(UsageError, match="printable ASCII"):
        TRANSPORT.connect("grpc://127.0.0.1:1", security=Security(token="two\nlines"))

    async def scenario() -> None:
        async with opened() as (_, _, listener):
            with pytest.raises(UsageError, match="another program listens there"):
                await TRANSPORT.serve(EchoEndpoint(), listener.url, security=Security())

    run(scenario)


def test_ipv6_addresses_have_brackets() -> None:
    async def scenario() -> None:
        listener = await TRANSPORT.serve(EchoEndpoint(), "grpc://[::1]:0", security=Security())
        assert listener.url.startswith("grpc://[::1]:")
        channel = TRANSPORT.connect(listener.url, security=Security())
        answer = (await ask(channel, "who"))[0]
        assert isinstance(answer, dict)
        assert str(answer["address"]).startswith("[::1]:")
        await channel.close()
        await listener.close()

    run(scenario)


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


# Ends


def test_a_fault_of_the_callers_own_items_is_the_callers() -> None:
    async def broken() -> AsyncIterator[Item]:
        yield {"n": 1}
        raise ZeroDivisionError("mine")

    async def scenario() -> None:
        async with opened() as (_, channel, _):
            with pytest.raises(ZeroDivisionError, match="mine"):
                await ask_with(channel, "count", broken())
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]

    run(scenario)


def test_closing_a_channel_ends_its_calls_and_the_next_call_opens_it_again() -> None:
    async def scenario() -> None:
        async with opened() as (endpoint, channel, _):
            call = asyncio.create_task(failure(ask(channel, "hang")))
            assert await asyncio.to_thread(endpoint.started.wait, 10)
            await channel.close()
            error = await call
            assert type(error) is ConnectionFailed
            assert "closing its channel" in str(error)
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]

    run(scenario)


def test_a_server_that_was_started_again_is_found_by_the_same_channel() -> None:
    async def scenario() -> None:
        async with opened() as (_, channel, listener):
            assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
            await listener.close()
            assert type(await failure(ask(channel, "echo", {"n": 1}))) is ConnectionFailed
            again = await TRANSPORT.serve(EchoEndpoint(), listener.url, security=Security())
            async with asyncio.timeout(10):
                while True:
                    try:
                        assert await ask(channel, "echo", {"n": 2}) == [{"n": 2}]
                        break
                    except ConnectionFailed:
                        await asyncio.sleep(0.05)
            await again.close()

    run(scenario)


def test_several_loops_in_one_process_do_not_disturb_each_other(caplog: pytest.LogCaptureFixture) -> None:
    """One poller of grpc.aio serves them all; older versions logged a BlockingIOError (grpc/grpc#25364)."""
    caplog.set_level(logging.WARNING)
    failed: list[object] = []

    def client(url: str) -> None:
        async def calls() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
            channel = TRANSPORT.connect(url, security=Security())
            for number in range(50):
                assert await ask(channel, "echo", {"n": number}) == [{"n": number}]
            await channel.close()

        try:
            asyncio.run(calls())
        except BaseException as error:  # noqa: BLE001 - a thread's error would be lost
            failed.append(error)

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        async with opened() as (_, _, listener):
            threads = [threading.Thread(target=client, args=(listener.url,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                await asyncio.to_thread(thread.join)

    run(scenario)
    assert failed == []
    assert caplog.records == []


def test_a_process_that_served_and_called_ends_without_a_word() -> None:
    code = """
import asyncio, threading
from avp.protocols import Meter
from avp.security import Security
from avp.testing.echo import EchoEndpoint, ask, sending
from avp.transports.grpc import TRANSPORT

loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
serving = TRANSPORT.serve(EchoEndpoint(), "grpc://127.0.0.1:0", security=Security())
listener = asyncio.run_coroutine_threadsafe(serving, loop).result()

async def main():
    channel = TRANSPORT.connect(listener.url, security=Security())
    assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
    async with channel.call("hang", sending(), meter=Meter()):
        pass
    {close}

for _ in range(3):
    asyncio.run(main())
{stop}
"""
    endings = [
        ("await channel.close()", "asyncio.run_coroutine_threadsafe(listener.close(), loop).result()"),
        ("pass", ""),
    ]
    for close, stop in endings:
        script = code.replace("{close}", close).replace("{stop}", stop)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_call_that_is_left_at_once_sends_nothing_more() -> None:
    async def scenario() -> None:
        given = 0

        async def many() -> AsyncIterator[Item]:
            nonlocal given
            while True:
                given += 1
                yield large_blob()

        async with opened() as (_, channel, _):
            async with channel.call("hang", many(), meter=Meter()):
                pass
            left = given
            assert await ask_with(channel, "echo", sending({"n": 1})) == [{"n": 1}]
            assert given == left

    run(scenario)
