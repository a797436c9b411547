"""What is missing, what is sent, and a context again out of it: random stores, salts, and what a stranger sends."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp.blob import Blob, seal
from avp.context import Context, Turn, text_context
from avp.delta import (
    Outline,
    assemble,
    check_outline,
    check_piece,
    missing,
    origin,
    outline,
    outline_from_items,
    outline_to_items,
    pages_of,
    pieces,
    ranges_from_json,
    sealed,
    sendable,
    sender_of,
    store_new,
    to_ranges,
)
from avp.errors import BundleError, SegmentMissing, UsageError
from avp.handshake import Hello, negotiate
from avp.identity import canonical_json
from avp.manifest import Limits
from avp.security import Tenant
from avp.segment import LATENT, PAGE, Exactness, Want
from avp.stores.memory import MemoryStore

from .samples import hidden_context, kv_bytes, kv_context, subset, tokens_context

ANNA = Tenant.named("anna", secret=b"s")
LONG = kv_context(range(600))
LATE = kv_context([*range(300), *[LATENT] * 20, *range(60)])
EXACT = Exactness.EXACT


def outlined(context: Context, salt: bytes = b"") -> tuple[Outline, Sequence[object]]:
    return outline(context, "kv", salt=salt)


def blob_of(context: Context, first: int, last: int, *, salt: bytes = b"", codec: str = "raw") -> Blob:
    _, segments = outline(context, "kv", salt=salt)
    (piece,) = pieces(segments, ((first, last),))
    assert context.model is not None
    return seal(context.model, piece, codec=codec)


def through(given_: Outline) -> Outline:
    """The outline after it travelled."""
    import json

    event, skeleton = outline_to_items(given_)
    return outline_from_items(
        json.loads(canonical_json(dict(event))), Context.from_bytes(skeleton.to_bytes()), salt=b""
    )


# --- there and back


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([LONG, LATE]), st.data())
def test_a_context_out_of_any_mixture_of_stored_and_sent_segments_is_the_same_bytes(
    context: Context, data: st.DataObject
) -> None:
    store, salt = MemoryStore(), data.draw(st.sampled_from([b"", ANNA.salt]))
    told, segments = outline(context, "kv", salt=salt)
    assert context.model is not None
    kept = data.draw(st.lists(st.tuples(st.integers(0, len(told.pages) - 1), st.integers(1, 9)), max_size=5))
    for first, count in kept:  # runs of pages that came earlier, in whatever pieces
        for piece in pieces(segments, ((first, min(first + count, len(told.pages))),)):
            store.put(seal(context.model, piece, codec=data.draw(st.sampled_from(["raw", "lossless"]))), tenant="t")
    lacking = missing(told, store, tenant="t", least=EXACT)
    held = {page for first, count in kept for page in range(first, min(first + count, len(told.pages)))}
    assert set(pages_of(lacking)) == set(range(len(told.pages))) - held
    came = {}
    for piece in pieces(segments, lacking):
        blob = seal(context.model, piece)
        check_piece(blob, told, least=EXACT)
        came.update(dict.fromkeys(piece.pages, blob))

    def find(page: str, want: Want) -> Blob:
        return came[page] if page in came else store.get(page, tenant="t", want=want)

    back = assemble(told, find, least=EXACT)
    assert (back.tokens, len(back), back.exactness) == (context.tokens, len(context), context.exactness)
    positions = [(segment.start, segment.stop) for segment in back.segments]
    assert positions[0][0] == 0
    assert positions[-1][1] == len(context)
    assert all(one[1] == two[0] for one, two in itertools.pairwise(positions))
    for layer in range(2):
        for part in ("k", "v"):
            mine = [segment.read(layer, part).array for segment in context.segments]
            theirs = [segment.read(layer, part).array for segment in back.segments]
            heads = range(mine[0].shape[0])
            for head in heads:
                assert b"".join(each[head].tobytes() for each in mine) == b"".join(
                    each[head].tobytes() for each in theirs
                )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 200))
def test_a_context_that_grew_sends_what_is_new_and_at_most_a_page_again(count: int, more: int) -> None:
    whole = kv_context(range(count + more))
    store = MemoryStore()
    store_new(store, whole[:count], ANNA)
    told, segments = outline(whole, "kv", salt=ANNA.salt)
    sent = pieces(segments, missing(told, store, tenant="anna", least=EXACT))
    positions = sum(map(len, sent))
    assert more <= positions < more + PAGE
    if more == 0:
        assert not sent


def test_contexts_of_nothing_are_sent_as_nothing() -> None:
    empty = kv_context([], pending=[1, 2])
    told, segments = outlined(empty)
    assert (told.pages, segments, missing(told, MemoryStore(), tenant="", least=EXACT)) == ((), (), ())
    back = assemble(through(told), lambda page, want: pytest.fail(page), least=EXACT)
    assert (len(back), back.pending) == (0, (1, 2))


@pytest.mark.parametrize("context", [LONG, LATE, kv_context(range(40), pending=(7, 8))], ids=["long", "latent", "open"])
def test_an_outline_comes_back_as_it_was_told(context: Context) -> None:
    told, _ = outlined(context)
    back = through(told)
    assert (back.pages, back.grades) == (told.pages, told.grades)
    assert back.skeleton.tokens == context.tokens
    event, _ = outline_to_items(told)
    assert (event["pages"] is None) == (context is not LATE)  # ids follow from tokens; latent positions have none


def test_the_pages_of_two_tenants_have_nothing_in_common() -> None:
    for context in (LONG, LATE):
        here = [set(outline(context, "kv", salt=salt)[0].pages) for salt in (b"", ANNA.salt, b"other")]
        assert not here[0] & here[1]
        assert not here[1] & here[2]


def test_what_is_kept_again_is_kept_once() -> None:
    store = MemoryStore()
    for _ in range(2):
        for context in (LONG, LONG[:300], LATE):
            store_new(store, context, ANNA)
            names = sorted(entry.page for entry in store.entries())
    for context in (LATE, LONG, LONG[:300]):
        store_new(store, context, ANNA)
    assert sorted(entry.page for entry in store.entries()) == names
    assert not list(store.entries(tenant=""))
    for nothing in (text_context("a"), tokens_context(5), hidden_context(3, "float16"), kv_context([])):
        store_new(store, nothing, ANNA)
    assert sorted(entry.page for entry in store.entries()) == names


def test_a_store_that_lost_a_page_says_so() -> None:
    store = MemoryStore()
    store_new(store, LONG, ANNA)
    told, _ = outline(LONG, "kv", salt=ANNA.salt)
    store.remove(told.pages[9], tenant="anna")
    with pytest.raises(SegmentMissing):
        assemble(told, lambda page, want: store.get(page, tenant="anna", want=want), least=EXACT)


# --- what is told


def test_a_context_is_sent_only_in_modes_for_which_it_has_something() -> None:
    talk = replace(LATE, turns=(Turn({"role": "user", "content": "hi"}),))
    assert sendable(LONG) == ("kv", "translated", "projected", "tokens")
    assert sendable(talk) == ("kv", "translated", "projected", "text")
    assert sendable(tokens_context(5)) == ("tokens",)
    assert sendable(text_context("a")) == ("text",)
    assert sendable(Context("text")) == ()


def test_without_kv_a_context_is_its_ids_or_its_text_and_says_that_it_is_no_better() -> None:
    talk = replace(LONG, turns=(Turn({"role": "user", "content": "hi"}),))
    ids, segments = outline(talk, "tokens", salt=b"")
    assert (ids.skeleton.kind, len(ids.skeleton), ids.skeleton.tokens, segments) == ("tokens", 0, talk.tokens, ())
    text, _ = outline(talk, "text", salt=b"")
    assert (text.skeleton.kind, text.skeleton.text, text.skeleton.model) == ("text", "hi", None)
    assert ids.skeleton.exactness is text.skeleton.exactness is Exactness.TEXT
    with pytest.raises(UsageError, match="no text to hand over"):
        outline(LONG, "text", salt=b"")


def test_a_context_that_lacks_kv_is_not_sent_as_if_it_were_whole() -> None:
    with pytest.raises(UsageError, match="lacks some of its KV"):
        outline(subset(LONG, 0, 2), "kv", salt=b"")


def test_the_origin_of_a_context_is_that_of_all_its_segments() -> None:
    assert origin(LONG) == ("synthetic", "float32")
    assert origin(text_context("a")) == ("", "")
    other = replace(LONG, segments=(LONG.segments[0], replace(LONG.segments[1], engine="vllm"), LONG.segments[2]))
    assert origin(other) == ("mixed", "float32")
    assert sender_of(Hello("one"), LONG).model == LONG.model


# --- what a stranger sends


def test_a_piece_of_the_outline_is_taken_in_every_cut() -> None:
    told, _ = outlined(LATE)
    for first in range(len(told.pages)):
        for last in range(first + 1, len(told.pages) + 1):
            if first // 8 == (last - 1) // 8:
                check_piece(blob_of(LATE, first, last), told, least=EXACT)


def test_a_piece_that_is_none_of_the_outline_is_refused() -> None:
    told, segments = outlined(LONG)
    assert LONG.model is not None
    other = kv_context([5, *range(1, 600)])
    last = segments[-1]
    refused: dict[str, list[Blob]] = {
        "none of this context": [
            blob_of(other, 0, 1),
            blob_of(other, 3, 4),  # the same ids after other ones
            blob_of(LONG, 0, 1, salt=ANNA.salt),
            seal(LONG.model, replace(LONG.segments[1].cut(256, 288), start=0)),
            seal(LONG.model, last.cut(last.start, last.stop - 1)),
        ],
        "follows another page": [seal(LONG.model, replace(LONG.segments[1], parent="f" * 64))],
        "other weights": [replace(blob_of(LONG, 0, 1), model=replace(LONG.model, weights="f" * 64))],
        "of other tokens": [_with(blob_of(LONG, 0, 1), tokens=tuple(range(1, 33)))],
        "engine, dtype or class": [
            _with(blob_of(LONG, 0, 1), engine="vllm"),
            _with(blob_of(LONG, 0, 1), dtype="bfloat16"),
            _with(blob_of(LONG, 0, 1), exactness=Exactness.BOUNDED),
        ],
    }
    for why, wrong in refused.items():
        for blob in wrong:
            with pytest.raises(BundleError, match=why):
                check_piece(blob, told, least=EXACT)
    check_piece(_with(blob_of(LONG, 0, 1), exactness=Exactness.BOUNDED), told, least=Exactness.BOUNDED)


def _with(blob: Blob, **changes: object) -> Blob:
    return replace(blob, segment=replace(blob.segment, **changes))  # type: ignore[arg-type]


def test_latent_pages_are_taken_under_the_class_that_was_told_for_them() -> None:
    told, _ = outlined(LATE)
    assert [(grade.page, grade.exactness) for grade in told.grades] == [(0, EXACT), (8, Exactness.APPROXIMATE)]
    late = blob_of(LATE, 9, 10)
    assert late.segment.exactness is Exactness.APPROXIMATE
    check_piece(late, told, least=EXACT)
    early = _with(blob_of(LATE, 0, 1), exactness=Exactness.APPROXIMATE)
    with pytest.raises(BundleError, match="class"):
        check_piece(early, told, least=EXACT)


def test_a_latent_page_of_fewer_positions_than_were_told_is_refused() -> None:
    told, _ = outlined(LATE)
    late = blob_of(LATE, 9, 10)
    short = _with(late, tokens=late.segment.tokens[:-3])
    with pytest.raises(BundleError, match="other tokens"):
        check_piece(short, told, least=EXACT)


@pytest.mark.parametrize(
    "skeleton", [None, {}, LONG, text_context("a").to_bytes()], ids=["nothing", "event", "with-kv", "bytes"]
)
def test_an_outline_without_its_context_is_refused(skeleton: object) -> None:
    with pytest.raises(BundleError, match="an outline came without"):
        outline_from_items({}, skeleton, salt=b"")


@pytest.mark.parametrize(
    "change",
    [
        {"grades": [[1, "exact", "x", "float32"]]},
        {"grades": []},
        {"grades": None},
        {"grades": [[0, "exact", "x", "float32"], [0, "exact", "x", "float32"]]},
        {"grades": [[0, "exact", "x", "float32"], [99, "exact", "x", "float32"]]},
        {"grades": [[0, "splendid", "x", "float32"]]},
        {"grades": [[0, "exact"]]},
        {"grades": [[True, "exact", "x", "float32"]]},
        {"grades": [[0, "exact", None, "float32"]]},
        {"grades": [[0, "exact", "x", "float31"]]},
        {"grades": [0]},
        {"tokens": 599},
        {"tokens": None},
    ],
    ids=str,
)
def test_an_outline_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    event, skeleton = outline_to_items(outlined(LONG)[0])
    with pytest.raises((BundleError, UsageError)):
        outline_from_items({**event, **change}, skeleton, salt=b"")


@pytest.mark.parametrize("pages", [None, [], ["a" * 64], [5] * 12, ["g" * 64] * 12, ["A" * 64] * 12, "a" * 768])
def test_page_ids_of_latent_positions_must_be_all_there(pages: object) -> None:
    event, skeleton = outline_to_items(outlined(LATE)[0])
    with pytest.raises(BundleError, match="page ids"):
        outline_from_items({**event, "pages": pages}, skeleton, salt=b"")


def test_what_was_announced_must_be_what_was_agreed() -> None:
    assert LONG.model is not None
    hello = sender_of(Hello("one"), LONG)
    agreed = negotiate(hello, Hello("two"))
    told, _ = outlined(LONG)
    check_outline(told, hello, agreed)
    for other in (text_context("a"), tokens_context(5)):
        with pytest.raises(BundleError, match="where kv was agreed"):
            check_outline(Outline(other, (), ()), hello, agreed)
    with pytest.raises(BundleError, match="other weights"):
        check_outline(told, replace(hello, model=replace(LONG.model, weights="f" * 64)), agreed)
    with pytest.raises(BundleError, match="other weights"):
        check_outline(told, replace(hello, model=None), agreed)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 30) | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


@settings(max_examples=200, deadline=None)
@given(json_values | st.lists(st.lists(st.integers(-1, 21), min_size=2, max_size=2), max_size=5))
def test_ranges_that_came_are_ascending_and_within_or_refused(value: object) -> None:
    with suppress(BundleError):
        found = ranges_from_json(value, 20)
        numbers = pages_of(found)
        assert numbers == sorted(set(numbers))
        assert not numbers or (numbers[0] >= 0 and numbers[-1] < 20)
        assert [list(each) for each in found] == value


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 40)))
def test_numbers_are_told_as_the_fewest_ranges(numbers: set[int]) -> None:
    ranges = to_ranges(sorted(numbers))
    assert pages_of(ranges) == sorted(numbers)
    assert all(one[1] < two[0] for one, two in itertools.pairwise(ranges))
    assert ranges_from_json([list(each) for each in ranges], 41) == ranges


def test_blobs_are_made_ahead_and_a_reader_may_leave_early() -> None:
    async def run() -> tuple[list[Blob], Blob]:
        assert LONG.model is not None
        segments = list(LONG.segments)
        every = [blob async for blob in sealed(LONG.model, segments, "raw")]
        async with aclosing(sealed(LONG.model, segments, "lossless")) as blobs:
            return every, await anext(blobs)

    every, one = asyncio.run(run())
    assert [blob.segment.pages for blob in every] == [segment.pages for segment in LONG.segments]
    assert one.entry.codec == "lossless"


def test_bytes_of_ranges_are_those_of_their_positions() -> None:
    told, _ = outlined(LONG)
    assert LONG.model is not None
    each = LONG.model.layout.bytes_per_token("float32")
    assert told.nbytes(((0, len(told.pages)),)) == LONG.nbytes == 600 * each
    assert told.nbytes(((18, 19),)) == (600 - 18 * PAGE) * each
    assert told.nbytes(()) == 0
    assert len(kv_bytes(LONG)) == 12
    assert Limits().tokens > 600
