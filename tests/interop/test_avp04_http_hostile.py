"""What the routes of AVP 0.4 refuse: clearly, with the right status, at once, and with nothing kept or logged of it."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

import pytest

from avp import Agent, Limits, Security
from avp.context import text_context
from avp.interop import avp04_endpoint
from avp.interop.avp04 import read_frame, write_frame
from avp.interop.avp04_context import message_from_context
from avp.interop.avp04_endpoint import Endpoint04
from avp.interop.avp04_proto import METADATA_BYTES, Metadata, PayloadType, metadata_bytes
from avp.security import Tenant
from avp.session import Quota
from avp.stores.memory import MemoryStore
from avp.transports.http import HttpTransport

from ..transports.http_tools import Answer, open_raw, raw, read_answer, run
from ..transports.http_tools import serving as listening
from .server import KINDS, Served, connector, frame_of, prefilled, request, serving
from .wire import HASH

SECRET = "the parcel weighs twelve kilograms"
RULES = HttpTransport(grace=0.2, idle=0.3)
BODIES = {
    "handshake": b"{}",
    "transmit": frame_of(text_context(SECRET)),
    "text": message_from_context(text_context(SECRET)),
}
HEAD = struct.Struct("<2sBBII")
KV = Metadata(payload_type=PayloadType.KV_CACHE)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(Agent(connector(), name="ours", limits=Limits(bytes=2**20, header=2**12))) as served:
        yield served


@pytest.mark.parametrize("route", KINDS)
@pytest.mark.parametrize("version", ["0.3", "1.0", "", None])
def test_another_version_is_refused(served: Served, route: str, version: str | None) -> None:
    refused = served.post(route, BODIES[route], avp_version=version)
    assert (refused.status, refused.error) == (400, "UsageError")
    assert "AVP-Version: 0.4" in refused.message


@pytest.mark.parametrize("route", KINDS)
@pytest.mark.parametrize("kind", ["text/plain", "application/vnd.avp.stream", None])
def test_another_content_type_is_refused(served: Served, route: str, kind: str | None) -> None:
    refused = served.post(route, BODIES[route], content_type=kind)
    assert (refused.status, refused.error) == (415, "UsageError")
    assert KINDS[route] in refused.message
    assert served.post(route, BODIES[route], content_type=f"{KINDS[route].upper()}; charset=utf-8").status == 200


@pytest.mark.parametrize("route", KINDS)
def test_another_method_is_refused(served: Served, route: str) -> None:
    assert request("GET", f"{served.url}/avp/v2/{route}").status == 405


@pytest.mark.parametrize("route", KINDS)
def test_the_token_comes_before_everything_else(route: str) -> None:
    security = Security(tokens=MappingProxyType({"right": Tenant.named("a")}))
    with serving(Agent(connector(), security=security)) as served:
        for token in (None, "Bearer wrong", "right"):
            refused = served.post(route, b"", content_type=None, avp_version=None, authorization=token)
            assert (refused.status, refused.error) == (401, "AccessDenied")
            assert refused.fields["www-authenticate"] == "Bearer"
        assert served.post(route, BODIES[route], authorization="Bearer right").status == 200
        assert request("GET", f"{served.url}/health").json == {"status": "ok"}


@pytest.mark.parametrize("size", [0, 1, 11, 12, 30, -1])
def test_a_frame_that_is_cut_short_is_refused(served: Served, size: int) -> None:
    refused = served.post("transmit", frame_of(prefilled())[:size])
    assert (refused.status, refused.error) == (400, "TruncatedBundle")
    assert served.keeps_nothing()


@pytest.mark.parametrize(
    ("data", "status", "error"),
    [
        (b"{}" * 20, 400, "BundleError"),
        (b"AV\x02" + bytes(20), 400, "UnsupportedBundle"),
        (frame_of(text_context("hi")) + b"x", 400, "BundleError"),
        (HEAD.pack(b"AV", 1, 0, 4, 5) + b"abcd", 400, "BundleError"),
        (HEAD.pack(b"AV", 1, 0, 2**17, METADATA_BYTES + 1), 413, "LimitExceeded"),
        (write_frame(Metadata(session_id="elsewhere"), b"1234"), 404, "HandleExpired"),
        (
            write_frame(replace(KV, extra={"model_hash": HASH}), bytes(2**18), compression="zstd"),
            413,
            "LimitExceeded",
        ),
    ],
)
def test_a_frame_that_is_wrong_is_refused(served: Served, data: bytes, status: int, error: str) -> None:
    refused = served.post("transmit", data)
    assert (refused.status, refused.error) == (status, error)
    assert served.keeps_nothing()


def test_a_payload_that_was_changed_is_refused(served: Served) -> None:
    data = bytearray(frame_of(prefilled()))
    data[-1] ^= 1
    refused = served.post("transmit", bytes(data))
    assert (refused.status, refused.error) == (400, "DigestMismatch")
    assert served.keeps_nothing()


def test_state_that_was_projected_for_another_model_is_refused(served: Served) -> None:
    frame = read_frame(frame_of(prefilled()))
    refused = served.post("transmit", write_frame(replace(frame.metadata, avp_map_id="vocab:1234"), frame.payload))
    assert (refused.status, refused.error) == (409, "IdentityMismatch")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "BundleError"),
        (b"[]", "BundleError"),
        (b'{"identity": []}', "BundleError"),
        (b'{"identity": {"model_hash": 1}}', "BundleError"),
        (b'{"identity": {"model_hash": "../../etc"}}', "BundleError"),
        (b"[" * 60000, "BundleError"),
    ],
)
def test_a_handshake_that_is_none_is_refused(served: Served, body: bytes, error: str) -> None:
    refused = served.post("handshake", body)
    assert (refused.status, refused.error) == (400, error)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b'{"content": 1}', 400),
        (b'{"content": "hi", "session_id": 1}', 400),
        (b'{"content": "hi", "session_id": "elsewhere"}', 404),
        (json.dumps({"content": "x" * 5000}).encode(), 413),
    ],
)
def test_a_message_that_is_none_is_refused(served: Served, body: bytes, status: int) -> None:
    refused = served.post("text", body)
    assert refused.status == status
    assert "Fix: " in refused.message
    assert served.keeps_nothing()


# --- sizes and time


def head_of(route: str, length: int | None = None) -> bytes:
    """The head of a request whose body has that length, or comes in chunks."""
    fields = f"POST /avp/v2/{route} HTTP/1.1\r\nHost: x\r\nAVP-Version: 0.4\r\nContent-Type: {KINDS[route]}\r\n"
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"{fields}{size}\r\n\r\n".encode()


async def begun(url: str, route: str, *, length: int, body: bytes) -> Answer:
    """The answer to a request of which no more than that comes."""
    return await raw(url, head_of(route, length), body)


@pytest.mark.parametrize(
    ("quota", "limits", "status"),
    [(Quota(memory=2**20), Limits(), 413), (Quota(tenant=2**20), Limits(), 503), (Quota(), Limits(bytes=2**20), 413)],
)
def test_a_frame_for_which_there_is_no_room_is_refused_after_its_metadata(
    quota: Quota, limits: Limits, status: int
) -> None:
    async def scenario() -> None:
        with Agent(connector(), quota=quota, limits=limits) as agent:
            async with listening(Endpoint04(agent.endpoint, trust=[HASH])) as url:
                tracemalloc.start()
                metadata = metadata_bytes(Metadata(extra={"model_hash": HASH}))
                head = HEAD.pack(b"AV", 1, 4, 2**32 - 1, len(metadata))
                answer = await begun(url, "transmit", length=2**32, body=head + metadata)
                grown = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                assert answer.status == status
                assert grown < 2**23
                assert agent.endpoint.desk.handles.memory() == 0

    run(scenario())


@pytest.mark.parametrize(
    ("named", "error"),
    [
        (Metadata(extra={"model_hash": "cd" * 32}), "IdentityMismatch"),
        (Metadata(), "IdentityMismatch"),
        (Metadata(session_id="elsewhere", extra={"model_hash": HASH}), "HandleExpired"),
    ],
)
def test_what_is_not_trusted_is_refused_before_it_comes_and_takes_no_room_from_others(
    named: Metadata, error: str
) -> None:
    async def scenario() -> None:
        with Agent(connector(), quota=Quota(memory=2**16)) as agent:
            handles = agent.endpoint.desk.handles
            async with listening(Endpoint04(agent.endpoint, trust=[HASH])) as url:
                kept = frame_of(prefilled())
                assert (await begun(url, "transmit", length=len(kept), body=kept)).status == 200
                metadata = metadata_bytes(named)
                head = HEAD.pack(b"AV", 1, 4, 2**16 - 100, len(metadata)) + metadata
                answer = await begun(url, "transmit", length=2**16, body=head)
                assert answer.json["error"]["type"] == error
                assert len(handles) == 1

    run(scenario())


@pytest.mark.parametrize("route", ["handshake", "text"])
def test_a_body_of_json_is_refused_at_the_byte_that_is_too_much(route: str) -> None:
    async def scenario() -> None:
        with Agent(connector(), limits=Limits(header=2**16)) as agent:
            async with listening(Endpoint04(agent.endpoint)) as url:
                answer = await begun(url, route, length=2**40, body=b" " * (2**16 + 1))
                assert (answer.status, answer.json["error"]["type"]) == (413, "LimitExceeded")

    run(scenario())


@pytest.mark.parametrize("route", KINDS)
@pytest.mark.parametrize("count", [0, 20])
def test_a_body_that_stops_is_given_up_and_its_room_is_free_again(route: str, count: int) -> None:
    async def scenario() -> None:
        with Agent(connector()) as agent:
            async with listening(Endpoint04(agent.endpoint, trust=[HASH]), rules=RULES) as url:
                body = frame_of(prefilled()) if route == "transmit" else BODIES[route]
                answer = await begun(url, route, length=2**20, body=body[:count])
                assert (answer.status, answer.json["error"]["type"]) == (408, "TimedOut")
                assert agent.endpoint.desk.handles.memory() == 0

    run(scenario())


@pytest.mark.parametrize("route", KINDS)
def test_a_byte_now_and_then_does_not_hold_a_place_for_ever(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avp04_endpoint, "_PATIENCE", 0.2)
    monkeypatch.setattr(avp04_endpoint, "_SLOWEST", 2**30)

    async def scenario() -> None:
        with Agent(connector(), quota=Quota(idle=0.2)) as agent:
            async with listening(Endpoint04(agent.endpoint, trust=[HASH])) as url:
                reader, writer = await open_raw(url)
                writer.write(head_of(route, 2**20) + frame_of(prefilled())[:20])
                drip = asyncio.create_task(_drip(writer))
                answer = await read_answer(reader)
                drip.cancel()
                writer.close()
                assert (answer.status, answer.json["error"]["type"]) == (408, "TimedOut")
                assert "in time" in answer.json["error"]["message"]
                assert agent.endpoint.desk.handles.memory() == 0

    run(scenario())


async def _drip(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(0.02)
        writer.write(b" ")


def test_a_client_that_leaves_in_the_middle_leaves_nothing() -> None:
    async def scenario() -> None:
        with Agent(connector()) as agent:
            handles = agent.endpoint.desk.handles
            async with listening(Endpoint04(agent.endpoint, trust=[HASH])) as url:
                data = frame_of(prefilled())
                reader, writer = await open_raw(url)
                writer.write(head_of("transmit", len(data)) + data[:-1])
                while not handles.memory():  # the room for it
                    await asyncio.sleep(0)
                writer.close()
                while handles.memory():
                    await asyncio.sleep(0)
                assert len(handles) == 0
                assert await reader.read() == b""

    run(scenario())


def test_a_frame_in_small_pieces_is_one_frame() -> None:
    async def scenario() -> None:
        with Agent(connector()) as agent:
            async with listening(Endpoint04(agent.endpoint, trust=[HASH])) as url:
                data = frame_of(prefilled())
                reader, writer = await open_raw(url)
                writer.write(head_of("transmit"))
                for piece in (data[:1], data[1:11], data[11:13], data[13:]):
                    writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    await writer.drain()
                writer.write(b"0\r\n\r\n")
                answer = await read_answer(reader)
                assert answer.status == 200
                assert answer.json["receipt"]["bytes_sent"] == len(data)
                writer.close()

    run(scenario())


# --- logs


class Broken(MemoryStore):
    """A store with a fault of its own."""

    def put(self, blob: object, *, tenant: str) -> None:
        raise RuntimeError(f"{SECRET} {tenant}")


def test_a_fault_of_ours_is_500_and_neither_it_nor_the_log_quotes_anything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(Agent(connector(), store=Broken())) as served:
        refused = served.post("transmit", frame_of(prefilled(SECRET)))
    assert (refused.status, refused.error) == (500, "ConnectionFailed")
    assert "RuntimeError" in caplog.text
    assert SECRET not in refused.message + caplog.text


def test_the_log_has_no_word_of_what_was_sent(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    told = [served.post(route, body) for route, body in BODIES.items()]
    assert [each.status for each in told] == [200, 200, 200]
    served.post("text", json.dumps({"content": SECRET, "session_id": 5}).encode())
    served.post("transmit", BODIES["transmit"][:-1])
    served.shake(model_hash="cd" * 32)
    assert "/avp/v2/text" in caplog.text
    assert "cd" * 32 in caplog.text
    assert SECRET not in caplog.text
    assert told[1].json["handle"] not in caplog.text
