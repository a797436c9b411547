"""Items as bytes and again: in pieces of any size, cut anywhere, and out of bytes that nobody of ours wrote."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from avp import errors
from avp.blob import Blob, seal
from avp.context import Context, text_context
from avp.errors import AVPError, BundleError, Busy, ConnectionFailed, LimitExceeded, UsageError
from avp.manifest import Limits
from avp.protocols import Item
from avp.testing import synthetic_context
from avp.wire import CHUNK, Decoder, decode, encode, encode_item, error_from_json, error_to_json, gather

from .samples import described, hidden_context, kv_context, tokens_context

LIMITS = Limits()


def blobs(tokens: int, codec: str = "raw") -> list[Blob]:
    context = synthetic_context(layers=1, kv_heads=1, head_dim=2, tokens=tokens)
    assert context.model is not None
    return [seal(context.model, segment, codec=codec) for segment in context.segments]


SAMPLES: tuple[Item, ...] = (
    {},
    {"text": "Grüße 👋", "list": [1, 2.5, None, True, {"deep": []}]},
    blobs(34)[0],
    blobs(300, "lossless")[1],
    text_context("a message"),
    tokens_context(5),
    hidden_context(3, "float16"),
    synthetic_context(layers=1, tokens=0),
)


async def each(items: Sequence[Item], error: AVPError | None = None) -> AsyncIterator[Item]:
    for item in items:
        yield item
    if error is not None:
        raise error


def written(items: Sequence[Item], error: AVPError | None = None) -> bytes:
    async def run() -> bytes:
        return b"".join([bytes(piece) async for piece in encode(each(items, error))])

    return asyncio.run(run())


def read(data: bytes, cuts: Sequence[int] = (), limits: Limits = LIMITS) -> list[Item]:
    """The items of the stream, which comes in pieces cut at these places."""
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    decoder = Decoder(limits)
    found: list[Item] = []
    for start, stop in itertools.pairwise(bounds):
        found += decoder.feed(bytearray(data[start:stop]))
    decoder.finish()
    return found


def told(item: Item) -> object:
    """Everything of an item, comparable."""
    if isinstance(item, Blob):
        return item.model, item.entry, b"".join(item.runs)
    return described(item) if isinstance(item, Context) else dict(item)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SAMPLES), max_size=4), st.lists(st.integers(0, 10**6), max_size=12))
def test_items_come_back_from_pieces_of_any_size(items: list[Item], cuts: list[int]) -> None:
    assert [told(item) for item in read(written(items), cuts)] == [told(item) for item in items]


def test_items_come_back_from_single_bytes() -> None:
    data = written(SAMPLES[1:3])
    assert [told(item) for item in read(data, range(len(data)))] == [told(item) for item in SAMPLES[1:3]]


def test_a_stream_cut_at_any_byte_gives_whole_items_and_then_an_error() -> None:
    items = (SAMPLES[1], SAMPLES[2], SAMPLES[4], SAMPLES[0])
    data = written(items)
    whole = [told(item) for item in items]
    seen = set()
    for stop in range(len(data)):
        decoder = Decoder(LIMITS)
        found = [told(item) for item in decoder.feed(data[:stop])]
        assert found == whole[: len(found)]
        seen.add(len(found))
        with pytest.raises(ConnectionFailed, match="Fix: call again"):
            decoder.finish()
    assert seen == {0, 1, 2, 3, 4}


def test_a_damaged_byte_of_a_blob_is_found_at_the_latest_when_it_is_verified() -> None:
    data = bytearray(written([SAMPLES[2]]))
    data[-6] ^= 1  # within the last tensor, before the end's mark
    with pytest.raises(BundleError):
        [item.verify() for item in read(bytes(data)) if isinstance(item, Blob)]


def test_an_error_ends_the_stream_with_its_class_message_and_time() -> None:
    data = written([{"n": 1}], Busy("full. Fix: wait.", retry_after=7.5))
    decoder = Decoder(LIMITS)
    found = []
    with pytest.raises(Busy, match=r"full\. Fix: wait\.") as caught:
        found += list(decoder.feed(data))
    assert caught.value.retry_after == 7.5


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AVPError)]
)
def test_every_error_keeps_its_class_and_message(kind: type[AVPError]) -> None:
    back = error_from_json(error_to_json(kind("what. Fix: this.")))
    assert (type(back), str(back)) == (kind, "what. Fix: this.")


@pytest.mark.parametrize("kind", ["KeyError", "SystemExit", "annotations", "__doc__", "", "TooNew", None, 5, ["Busy"]])
def test_an_error_of_a_class_that_is_not_ours_is_a_failed_connection_with_its_message(kind: object) -> None:
    back = error_from_json({"type": kind, "message": "it broke"})
    assert type(back) is ConnectionFailed
    assert "it broke" in str(back)


@pytest.mark.parametrize("value", [None, [], "x", {}, {"type": "Busy"}, {"type": "Busy", "message": 3}])
def test_an_error_without_a_message_is_still_an_error(value: object) -> None:
    assert type(error_from_json(value)) is ConnectionFailed


@pytest.mark.parametrize("after", [None, "soon", True, -1, 10**400, float("nan"), float("inf"), 1e9])
def test_a_time_to_wait_that_makes_no_sense_is_a_second(after: object) -> None:
    back = error_from_json({"type": "Busy", "message": "full", "retry_after": after})
    assert isinstance(back, Busy)
    assert back.retry_after == 1.0


def test_an_error_that_quotes_half_a_surrogate_pair_can_be_told() -> None:
    with pytest.raises(UsageError, match=r"no agent \?\. Fix"):
        read(written([], UsageError("no agent \ud800. Fix: another name.")))


def test_an_item_that_is_no_json_ends_the_stream_with_that_error() -> None:
    with pytest.raises(UsageError, match="cannot be written as JSON"):
        read(written([{"n": float("nan")}]))


def test_an_event_that_is_too_large_is_refused_by_its_length_before_it_comes() -> None:
    decoder = Decoder(Limits(header=100))
    with pytest.raises(LimitExceeded, match="an event of 4294967295 bytes"):
        list(decoder.feed(b"J" + struct.pack("<I", 2**32 - 1) + b"{"))
    list(Decoder(Limits(header=100)).feed(b"J" + struct.pack("<I", 100)))


def test_a_bundle_that_is_too_large_is_refused_by_its_header_before_it_comes() -> None:
    blob = blobs(256)[0]
    head = bytes(blob.header)
    with pytest.raises(LimitExceeded, match=r"Fix: raise Limits\.bytes"):
        list(Decoder(Limits(bytes=len(head) + 10)).feed(b"B" + head))
    with pytest.raises(LimitExceeded):
        list(Decoder(Limits(header=64)).feed(b"B" + struct.pack("<Q", 65)))


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"3",
        b'"text"',
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda text: repr(text)[:16],
)
def test_an_event_that_is_no_plain_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(ConnectionFailed, match="no JSON object"):
        read(b"J" + struct.pack("<I", len(text)) + text + b"E")


@pytest.mark.parametrize("data", [b"X", b"EJ", b"EE", b"{", b"HTTP/1.1 200 OK"])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ConnectionFailed, match="where a frame begins"):
        read(data)


KINDS = st.sampled_from([b"J", b"B", b"E", b"J\x02\x00\x00\x00{}", b"B" + struct.pack("<Q", 40)])


@settings(max_examples=300, deadline=None)
@given(st.lists(KINDS | st.binary(max_size=60), max_size=6).map(b"".join), st.integers(1, 20))
@example(b'J\x0e\x00\x00\x00{"error":null}E', 5)
def test_random_bytes_raise_nothing_but_our_own_errors(data: bytes, size: int) -> None:
    with suppress(AVPError):
        read(data, range(0, len(data), size))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255), st.sampled_from([SAMPLES[1], SAMPLES[2], SAMPLES[3], SAMPLES[5]]))
def test_a_changed_byte_raises_nothing_but_our_own_errors(place: int, bits: int, item: Item) -> None:
    data = bytearray(written([item]))
    data[place % len(data)] ^= bits
    with suppress(AVPError):
        for found in read(bytes(data)):
            if isinstance(found, Blob):
                found.verify()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 10, CHUNK - 1, CHUNK, CHUNK + 1]), max_size=6))
def test_gathering_keeps_the_bytes_and_does_not_copy_large_runs(sizes: list[int]) -> None:
    runs = [memoryview(bytes([number]) * size) for number, size in enumerate(sizes)]
    found = list(gather(runs))
    assert b"".join(found) == b"".join(runs)
    assert all(any(piece is run for piece in found) for run in runs if len(run) >= CHUNK)
    assert all(len(piece) <= max(2 * CHUNK, *sizes) for piece in found)


def test_the_kv_of_a_blob_is_not_copied() -> None:
    context = kv_context(range(256))
    assert context.model is not None
    blob = seal(context.model, context.segments[0])

    async def run() -> list[bytes | memoryview]:
        return [piece async for piece in encode(each([blob]))]

    assert list(encode_item(blob))[1:] == list(blob.runs)
    assert b"".join(asyncio.run(run())) == b"B" + b"".join(blob.runs) + b"E"


def test_a_reader_that_leaves_early_leaves_nothing_open() -> None:
    async def run() -> Item:
        async def chunks() -> AsyncIterator[bytes]:
            for place in range(0, len(data), 7):
                yield data[place : place + 7]

        async with aclosing(decode(chunks(), limits=LIMITS)) as items:
            return await anext(items)

    data = written(SAMPLES)
    assert told(asyncio.run(run())) == {}
