"""Every decoder of bytes or JSON from outside, given what is nearly right: it raises an error of ours, or what it gives
is what was written or can be told to be something else; and it allocates no more than its limits.

What is fuzzed where:

- here: all of `DECODERS`, and both ends of a hand-over and a fetch in which one event is changed
- `avp.bundle` (`unpack`, `read`, `peek`, `tensor_sizes`, `header_size`, `read_head`), `Context.from_bytes`,
  `avp.manifest.parse_json`, `identity_from_json`: tests/test_bundle_properties.py, tests/test_manifest.py
- `avp.wire` (`decode`, `Decoder`): tests/test_wire.py
- `hello_from_json`: tests/test_greeting.py
- `ranges_from_json`: tests/test_delta.py
- verbs with events of any kind: tests/endpoint/test_endpoint.py
- `parse_metadata`: tests/interop/test_avp04_proto.py
- HTTP and HTTP/2: tests/transports/test_http_attacks.py; their parsers are httptools and h2
"""

from __future__ import annotations

import ast
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import avp
from avp.agent import Agent
from avp.blob import Blob, BundleReader, open_bundle, open_shared, seal
from avp.context import text_context
from avp.delta import outline, outline_from_items, outline_to_items
from avp.errors import AVPError, BundleError
from avp.identity import identity_from_json, identity_to_json
from avp.interop.avp04 import expanded_size, peek_frame, read_frame
from avp.interop.avp04_context import context_from_frame, context_from_message, message_from_context
from avp.manifest import Limits
from avp.protocols import Item
from avp.shared import SharedTensors
from avp.stores.rows import describe, is_whole, open_row, row_to_json, rows_from_json
from avp.transports.fds import Inbox, Outbox
from avp.transports.grpc_piece import make_piece, read_piece
from avp.vocabulary import check_vocabulary, vocabulary_digest
from avp.wire import encode_item, error_from_json, error_to_json

from ..endpoint.peers import run, tapped
from ..interop.wire import HASH, kv_frame
from ..samples import bundle_of, described, kv_bytes, kv_context, shared, small_blob
from .mutations import changed, mutants

LIMITS = Limits(bytes=1 << 20, header=1 << 16, tensors=256, layers=64, tokens=4096)
ROOM = 8 << 20  # bytes that a decoder may allocate under these limits, at most 64 times of what came included
CONTEXT = kv_context(range(70), pending=(3,), dtype="float16")
BLOB = seal(CONTEXT.model, CONTEXT.segments[0])
ROW = describe(BLOB, tenant="one", now=1.0)
Decoder = Callable[[bytes], object]


def in_memory() -> Blob:
    """The same segment, its tensors in memory that others can map."""
    lying = shared(CONTEXT, capacity=100)
    assert lying.model is not None
    return seal(lying.model, lying.segments[0])


def in_pieces(data: bytes) -> None:
    reader, piece = BundleReader(LIMITS), memoryview(data)
    while piece:
        found, rest = reader.feed(piece[:50])
        if found is not None:
            open_bundle(found, limits=LIMITS)
        piece = piece[50 - len(rest) :] if len(piece) > 50 else rest


def bundle(data: bytes) -> None:
    """What passes is what was written."""
    found = open_bundle(data, limits=LIMITS)
    if isinstance(found, Blob):
        found.verify()
        assert found.tensors is not None
        assert any(bytes(found.tensors[0]) == sealed[-len(found.tensors[0]) :] for sealed in BLOBS)


def header(data: bytes) -> None:
    """The tensors lie where they are, whatever came as their header."""
    tensors = in_memory().segment.tensors
    assert isinstance(tensors, SharedTensors)
    open_shared(data, tensors, limits=LIMITS).verify()


def frames(data: bytes) -> None:
    inbox = Inbox(limits=LIMITS, trusted=True, greeting=False)
    try:
        list(inbox.feed(memoryview(data), []))
        inbox.finish()
    finally:
        inbox.close()


def greeting(data: bytes) -> None:
    list(Inbox(limits=LIMITS, trusted=True, greeting=True).feed(memoryview(data), []))


def frame04(data: bytes) -> None:
    peek_frame(data, limits=LIMITS)
    expanded_size(data, limits=LIMITS)
    frame = read_frame(data, limits=LIMITS)
    assert CONTEXT.model is not None
    context_from_frame(frame, model=CONTEXT.model, trust_model_hash=HASH, limits=LIMITS)


def row(data: bytes) -> None:
    for found in rows_from_json([data]):
        with suppress(BundleError):
            assert open_row(BLOBS[0], found, limits=LIMITS).verify()


def stored(data: bytes) -> None:
    """A store never gives out other KV than what was put under the row."""
    if is_whole(data, ROW, limits=LIMITS):
        assert data == b"".join(BLOB.runs)
    open_row(data, ROW, limits=LIMITS)


BLOBS = (
    b"".join(BLOB.runs),
    small_blob(),
    small_blob("lossless"),
    bundle_of(CONTEXT, CONTEXT.segments[0], codec="lossless"),
)
CONTEXTS = (CONTEXT.to_bytes(), text_context("hé").to_bytes())
ITEMS = tuple(b"".join(map(bytes, encode_item(item))) for item in ({"call": "have", "token": None}, BLOB, CONTEXT))
SHARED = b"".join(map(bytes, Outbox(trusted=True).pack(in_memory()).runs))
MESSAGE = message_from_context(text_context("hé"))

DECODERS: MappingProxyType[str, tuple[Decoder, tuple[bytes, ...]]] = MappingProxyType(
    {
        "blob.open_bundle": (bundle, (*BLOBS, *CONTEXTS)),
        "blob.BundleReader.feed": (in_pieces, (BLOBS[0] + BLOBS[1], *CONTEXTS)),
        "blob.open_shared": (header, (bytes(in_memory().header),)),
        "transports.fds.Inbox.feed": (frames, (*ITEMS, b"".join(ITEMS) + b"E", SHARED, b"A" + SHARED)),
        "transports.fds.Inbox.feed, its greeting": (greeting, ITEMS),
        "transports.grpc_piece.read_piece": (read_piece, (make_piece([b"x" * 300]), make_piece([]))),
        "interop.avp04.read_frame": (frame04, (kv_frame(tokens=9), kv_frame(tokens=40, layers=1))),
        "interop.avp04_context.read_message": (lambda data: context_from_message(data, limits=LIMITS), (MESSAGE,)),
        "stores.rows.rows_from_json": (row, (row_to_json(ROW),)),
        "stores.rows.open_row": (stored, (BLOBS[0],)),
    }
)


@pytest.mark.parametrize("name", DECODERS)
def test_nearly_right_bytes_raise_nothing_but_our_own_errors(name: str) -> None:
    decode, originals = DECODERS[name]

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(mutants(originals))
    def refused_or_right(data: bytes) -> None:
        with suppress(AVPError):
            decode(data)

    refused_or_right()


@pytest.mark.parametrize("name", DECODERS)
def test_no_length_that_comes_makes_a_decoder_allocate_more_than_its_limits(name: str) -> None:
    decode, originals = DECODERS[name]
    random = Random(name)
    tracemalloc.start()
    try:
        for _ in range(150):
            data = bytearray(random.choice(originals))
            for _ in range(random.randint(1, 3)):
                at = random.randrange(max(1, min(len(data), random.choice((16, 4096)))))
                data[at : at + random.choice((1, 4, 8))] = random.choice((b"\xff" * 8, b"9" * 8, b"\x7f", b"\0", b"9"))
            tracemalloc.reset_peak()
            with suppress(AVPError):
                decode(bytes(data))
            assert tracemalloc.get_traced_memory()[1] < ROOM
    finally:
        tracemalloc.stop()


# --- JSON


def announced(value: object) -> None:
    told, skeleton = outline_to_items(outline(CONTEXT, "kv", salt=b"")[0])
    del told
    assert isinstance(value, dict)
    outline_from_items(value, skeleton, salt=b"")


WORDS = ["a", "b", "é"]
VALUES: MappingProxyType[str, tuple[Callable[[object], object], object]] = MappingProxyType(
    {
        "wire.error_from_json": (error_from_json, error_to_json(BundleError("x"))),
        "identity.identity_from_json": (
            lambda value: identity_from_json(value, max_layers=64),
            identity_to_json(CONTEXT.model) if CONTEXT.model else None,
        ),
        "delta.outline_from_items": (
            lambda value: announced(value) if isinstance(value, dict) else None,
            dict(outline_to_items(outline(CONTEXT, "kv", salt=b"")[0])[0]),
        ),
        "vocabulary.check_vocabulary": (
            lambda value: check_vocabulary(value, vocabulary_digest(WORDS)) == tuple(WORDS) or pytest.fail(str(value)),
            WORDS,
        ),
    }
)


@pytest.mark.parametrize("name", VALUES)
def test_a_changed_value_raises_nothing_but_our_own_errors(name: str) -> None:
    read, original = VALUES[name]

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(changed(original))
    def refused_or_read(value: object) -> None:
        with suppress(AVPError):
            read(value)

    refused_or_read()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.booleans(), st.integers(0, 7), st.data())
def test_a_changed_event_of_a_hand_over_or_a_fetch_gives_an_error_or_the_same_kv(
    there: bool, number: int, data: st.DataObject
) -> None:
    """Events 0 to 7 of the five calls: hello, have, receive; fetch, fetch."""
    seen = 0

    async def change(verb: str, item: Item) -> Item:
        nonlocal seen
        del verb
        if isinstance(item, Blob) or not isinstance(item, dict | MappingProxyType):
            return item
        seen += 1
        if seen - 1 != number:
            return item
        value = data.draw(changed(dict(item)))
        return value if isinstance(value, dict) else {}

    async def scenario() -> None:
        with Agent(name="a") as a, Agent(name="b") as b:
            remote, _ = tapped(a, b, **{"there" if there else "back": change})
            try:
                handle = await remote.hand_over(CONTEXT, timeout=20)
                found = await remote.fetch(handle, timeout=20)
            except AVPError:
                return
            assert kv_bytes(found) == kv_bytes(CONTEXT)
            assert described(found) == described(CONTEXT)

    run(scenario())


# --- that nothing was forgotten


ELSEWHERE = {
    "context.Context.from_bytes",
    *(f"bundle.{name}" for name in ("peek", "tensor_sizes", "header_size", "unpack", "read", "read_head")),
    "manifest.parse_json",
    *(f"wire.{name}" for name in ("Decoder.feed", "Decoder.take", "decode")),
    "greeting.hello_from_json",
    "delta.ranges_from_json",
    "interop.avp04_proto.parse_metadata",
    "oneline.unpack",  # `Context.from_bytes` of what is bytes
    "blob.open_blob",  # tests/test_blob.py
    "interop.avp04_endpoint.Endpoint04.handshake",  # tests/interop/test_avp04_http_hostile.py
    "interop.avp04_endpoint.Endpoint04.transmit",
    "interop.avp04_endpoint.Endpoint04.text",
    "endpoint.desk.Desk.session",  # tests/endpoint/test_endpoint.py
    "endpoint.desk.text",
}
TOGETHER = {  # fuzzed by one of the `DECODERS` beside the one that it is named for
    "interop.avp04.peek_frame",
    "interop.avp04.expanded_size",
    "interop.avp04_context.context_from_message",
    "stores.rows.is_whole",
}
ENCODERS = {
    *("buffers.from_memory", "buffers.drop", "wire.gather", "transports.grpc_piece.make_piece"),
    *("identity.canonical_json", "identity.fingerprint"),
}


def decoders() -> Iterator[str]:
    """Public functions below the transports of HTTP whose first argument is bytes, an event, or any JSON value."""
    root = Path(avp.__file__).parent
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        if name.startswith(("cli.", "bench.", "testing.", "connectors.", "transports.http")):
            continue
        yield from (f"{name}.{each}" for each in reading(ast.parse(path.read_text())))


def reading(body: ast.Module | ast.ClassDef) -> Iterator[str]:
    for node in body.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (f"{node.name}.{each}" for each in reading(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            first = [each for each in node.args.args if each.arg not in ("self", "cls")][:1]
            kind = ast.unparse(first[0].annotation) if first and first[0].annotation else ""
            if "bytes" in kind or "memoryview" in kind or kind in ("object", "Event"):
                yield node.name


def test_every_function_that_reads_bytes_or_json_is_fuzzed_somewhere() -> None:
    known, there = {*DECODERS, *VALUES} | ELSEWHERE | TOGETHER | ENCODERS, set(decoders())
    assert sorted(there - known) == []
    assert sorted((ELSEWHERE | TOGETHER | ENCODERS) - there) == []
