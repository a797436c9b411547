"""A segment is a run of positions, named page by page, whatever memory it lies in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3

from avp.errors import UsageError
from avp.identity import CacheLayout, LayerLayout, ModelIdentity
from avp.segment import (
    LATENT,
    PAGE,
    Exactness,
    Segment,
    Want,
    page_id,
    page_ids,
    root_page,
    with_salt,
    worst,
)
from avp.shared import SharedTensors
from avp.testing import synthetic_context

from .samples import Rows, kv_context, named, pages, segment_bytes, shared

MODEL = ModelIdentity("m", "f", "ab" * 32, "cd" * 32, CacheLayout((LayerLayout(1, 2),)))
ROOT = "93d20a95daa24c3b336870d441a1a1b023af8e3a7ee8f43f7117088b9d490934"
PAGE_OF_1_2_3 = "877ef23c511767dafa4c7abf46d5a27e37e30dcc42c6294031821a8769543b49"


# --- page ids


def test_the_root_page_has_a_golden_value() -> None:
    assert root_page(MODEL) == ROOT


def test_a_page_has_a_golden_value() -> None:
    assert page_id(ROOT, (1, 2, 3)) == PAGE_OF_1_2_3


def test_a_page_id_is_blake3_of_parent_ids_and_latent_digest_with_their_lengths() -> None:
    ids = b"".join(i.to_bytes(8, "little", signed=True) for i in (1, LATENT, 3))
    message = bytes.fromhex(ROOT) + (24).to_bytes(8, "little") + ids + (2).to_bytes(8, "little") + b"xy"
    assert page_id(ROOT, (1, LATENT, 3), latent=b"xy") == blake3(message).hexdigest()


def test_a_growing_context_changes_only_its_last_page() -> None:
    for tokens in (1, 31, 33, 255, 300):
        short, long = (pages(kv_context(range(n))) for n in (tokens, tokens + 1))
        whole = tokens // PAGE
        assert short[:whole] == long[:whole]
        assert tokens % PAGE == 0 or short[whole] != long[whole]
        assert len(long) == -(-(tokens + 1) // PAGE)


def test_a_changed_token_changes_its_page_and_every_later_one() -> None:
    ids = list(range(300))
    ids[100] += 1
    before, after = pages(kv_context(range(300))), pages(kv_context(ids))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True] * 3 + [False] * 7


def test_a_salt_other_weights_and_another_layout_change_every_page() -> None:
    windowed = replace(MODEL, layout=CacheLayout((LayerLayout(1, 2, window=8),)))
    roots = [
        root_page(MODEL),
        root_page(MODEL, salt=b"t"),
        root_page(replace(MODEL, weights="00")),
        root_page(windowed),
    ]
    assert len(set(roots)) == 4
    assert len({page_id(root, (1, 2)) for root in roots}) == 4


def test_names_and_tokenizer_change_no_page() -> None:
    assert root_page(replace(MODEL, id="x", family="y", tokenizer="z")) == root_page(MODEL)


def test_salt_and_weights_cannot_be_shifted_into_each_other() -> None:
    assert root_page(replace(MODEL, weights="bc"), salt=b"a") != root_page(replace(MODEL, weights="c"), salt=b"ab")


def test_latent_pages_hash_the_kv_of_their_latent_positions_alone() -> None:
    ids = [*range(40), LATENT, LATENT, 7]
    context = kv_context(ids)
    hasher = blake3()
    for layer in (0, 1):
        for part in "kv":
            hasher.update(context.segments[0].read(layer, part).array[:, [40, 41]].tobytes())
    first = page_id(root_page(context.model), ids[:32])
    assert pages(context) == (first, page_id(first, ids[32:], latent=hasher.digest()))


def test_the_kv_of_positions_with_ids_names_no_page() -> None:
    first, second = synthetic_context(dtype="float32"), synthetic_context(dtype="float16")
    assert pages(replace(first, tokens=second.tokens)) == pages(first)
    ids = [1, 2, 3]
    assert pages(kv_context(ids, dtype="float32")) == pages(kv_context(ids, dtype="float16"))


def test_page_ids_are_those_of_the_context_of_the_same_tokens() -> None:
    context = kv_context(range(300))
    assert context.model is not None
    assert page_ids(root_page(context.model), range(300)) == pages(context)
    assert page_ids(context.segments[1].parent, range(256, 300)) == context.segments[1].pages
    assert page_ids(ROOT, ()) == ()


def test_the_parent_of_a_segment_is_the_page_before_it() -> None:
    context = kv_context(range(600))
    assert context.model is not None
    first, second, third = context.segments
    assert first.parent == root_page(context.model)
    assert (second.parent, third.parent) == (first.pages[-1], second.pages[-1])


# --- cutting


def whole() -> Segment:
    """The positions 256 to 512 of a context of 600."""
    return kv_context(range(600)).segments[1]


@pytest.mark.parametrize(("start", "stop"), [(256, 288), (288, 512), (320, 448), (480, 512), (256, 480)])
def test_a_cut_at_page_bounds_keeps_the_ids_of_its_pages(start: int, stop: int) -> None:
    segment = whole()
    cut = segment.cut(start, stop)
    first, last = (start - 256) // PAGE, (stop - 256) // PAGE
    assert (cut.start, cut.stop, cut.tokens) == (start, stop, tuple(range(start, stop)))
    assert cut.pages == segment.pages[first:last]
    assert cut.parent == (segment.pages[first - 1] if first else segment.parent)
    assert (cut.dtype, cut.engine, cut.exactness) == (segment.dtype, segment.engine, segment.exactness)


@pytest.mark.parametrize(("start", "stop"), [(256, 257), (256, 300), (288, 319), (320, 511), (480, 481)])
def test_a_cut_within_a_page_has_the_last_id_of_a_shorter_context(start: int, stop: int) -> None:
    segment = whole()
    cut = segment.cut(start, stop)
    shorter = pages(kv_context(range(stop)))
    assert cut.pages == shorter[start // PAGE :]
    assert cut.pages[:-1] == segment.pages[(start - 256) // PAGE :][: len(cut.pages) - 1]
    assert cut.pages[-1] not in segment.pages
    assert cut.parent == shorter[start // PAGE - 1]


@pytest.mark.parametrize(("start", "stop"), [(256, 300), (288, 512), (320, 400)])
def test_a_cut_reads_its_own_positions_in_place(start: int, stop: int) -> None:
    segment = whole()
    cut = segment.cut(start, stop)
    for layer in (0, 1):
        for part in "kv":
            rows = segment.read(layer, part).array
            found = cut.read(layer, part).array
            assert found.tobytes() == rows[:, start - 256 : stop - 256].tobytes()
            assert np.shares_memory(found, rows)


def test_a_cut_of_shared_memory_can_still_be_mapped() -> None:
    plain = kv_context(range(300))
    cut = shared(plain).segments[1].cut(288, 299)
    assert isinstance(cut.tensors, SharedTensors)
    assert (cut.tensors.start, cut.tensors.stop) == (288, 299)
    assert segment_bytes(cut) == segment_bytes(plain.segments[1].cut(288, 299))


def test_a_cut_of_a_cut_is_the_smaller_cut() -> None:
    once, twice = whole().cut(320, 400), whole().cut(288, 450).cut(320, 400)
    assert (twice.start, twice.tokens, twice.parent, twice.pages) == (once.start, once.tokens, once.parent, once.pages)
    assert segment_bytes(twice) == segment_bytes(once)


def test_the_partial_page_at_a_segments_end_keeps_its_id() -> None:
    last = kv_context(range(300)).segments[1]
    assert last.cut(288, 300).pages == last.pages[1:]
    assert last.cut(288, 299).pages != last.pages[1:]


def test_all_of_a_segment_is_the_segment() -> None:
    segment = whole()
    assert segment.cut(256, 512) is segment


@pytest.mark.parametrize(("start", "stop"), [(257, 300), (224, 300), (256, 513), (288, 288), (320, 288), (512, 544)])
def test_what_a_segment_does_not_hold_cannot_be_cut_from_it(start: int, stop: int) -> None:
    with pytest.raises(UsageError, match=r"cut from a segment of 256 to 512\. Fix: stay within it"):
        whole().cut(start, stop)


def test_a_page_of_latent_positions_is_not_divided() -> None:
    segment = kv_context([*range(40), LATENT, LATENT, *range(60)]).segments[0]
    assert segment.cut(0, 64).pages == segment.pages[:2]
    assert segment.cut(64, 102).parent == segment.pages[1]
    assert segment.cut(0, 40).pages == pages(kv_context(range(40)))
    for stop in (41, 42, 50):
        with pytest.raises(UsageError, match="cut at a multiple of 32"):
            segment.cut(0, stop)
    assert segment.cut(64, 70).pages == (page_id(segment.pages[1], segment.tokens[64:70]),)


# --- salt


@pytest.mark.parametrize("ids", [range(600), [*range(250), *[LATENT] * 20, *range(40)]], ids=["ids", "latent"])
def test_a_salt_changes_every_id_and_nothing_else(ids: list[int]) -> None:
    context = kv_context(ids)
    assert context.model is not None
    salted = with_salt(context.model, context.segments, b"tenant")
    other = with_salt(context.model, context.segments, b"tenanu")
    ids_of_pages = [page for each in (*context.segments, *salted, *other) for page in each.pages]
    assert len(set(ids_of_pages)) == len(ids_of_pages) == 3 * -(-len(ids) // PAGE)
    assert salted[0].parent == root_page(context.model, salt=b"tenant")
    for plain, each in zip(context.segments, salted, strict=True):
        assert named(replace(each, parent=plain.parent, pages=plain.pages)) == named(plain)
        assert each.tensors is plain.tensors
    assert [each.parent for each in salted[1:]] == [each.pages[-1] for each in salted[:-1]]


def test_no_salt_and_the_same_salt_again_give_the_same_objects() -> None:
    context = kv_context([*range(250), LATENT, *range(40)])
    assert context.model is not None
    plain = with_salt(context.model, context.segments, b"")
    assert all(each is segment for each, segment in zip(plain, context.segments, strict=True))
    salted = with_salt(context.model, context.segments, b"t")
    again = with_salt(context.model, salted, b"t")
    assert all(each is segment for each, segment in zip(again, salted, strict=True))
    back = with_salt(context.model, salted, b"")
    assert [each.pages for each in back] == [each.pages for each in context.segments]


def test_other_latent_kv_is_another_page_and_all_after_it() -> None:
    ids = [*range(32), LATENT, *range(40)]
    context = kv_context(ids)
    assert context.model is not None
    tensors = context.segments[0].tensors
    assert isinstance(tensors, Rows)
    arrays = [{part: rows.copy() for part, rows in layer.items()} for layer in tensors.arrays]
    arrays[1]["v"].view(np.uint8)[0, 32, 0] ^= 1
    changed = replace(context.segments[0], tensors=replace(tensors, arrays=arrays))
    before, after = (with_salt(context.model, [each], b"t")[0].pages for each in (context.segments[0], changed))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]


# --- what a receiver wants

OWN = Want("transformers", "float32")


def _held(*, engine: str = "transformers", dtype: str = "float32", exactness: Exactness = Exactness.EXACT) -> Segment:
    return replace(kv_context(range(3)).segments[0], engine=engine, dtype=dtype, exactness=exactness)


@pytest.mark.parametrize("exactness", Exactness)
def test_kv_of_the_same_engine_and_dtype_is_of_its_own_class(exactness: Exactness) -> None:
    assert OWN.grade(_held(exactness=exactness)) is exactness
    assert OWN.accepts(_held(exactness=exactness)) == (exactness is Exactness.EXACT)


@pytest.mark.parametrize("other", [{"engine": "llamacpp"}, {"dtype": "bfloat16"}])
def test_kv_of_another_engine_or_dtype_is_bounded_at_best(other: dict[str, str]) -> None:
    assert OWN.grade(_held(**other)) is Exactness.BOUNDED
    assert OWN.grade(_held(**other, exactness=Exactness.APPROXIMATE)) is Exactness.APPROXIMATE
    assert not OWN.accepts(_held(**other))
    assert replace(OWN, at_least=Exactness.BOUNDED).accepts(_held(**other))


def test_what_is_wanted_at_least_takes_all_that_is_better() -> None:
    for wanted in Exactness:
        want = replace(OWN, at_least=wanted)
        taken = [each for each in Exactness if want.accepts(_held(exactness=each))]
        assert taken == [each for each in Exactness if each <= wanted]


# --- classes


def test_classes_have_names_and_an_order() -> None:
    assert [each.label for each in Exactness] == ["exact", "bounded", "approximate", "text"]
    assert [Exactness.parse(each.label) for each in Exactness] == list(Exactness)
    assert worst([]) is Exactness.EXACT
    assert worst([Exactness.BOUNDED, Exactness.TEXT, Exactness.EXACT]) is Exactness.TEXT
    with pytest.raises(UsageError, match="use one of exact, bounded, approximate, text"):
        Exactness.parse("good")


def test_a_segment_knows_where_it_lies() -> None:
    segments = kv_context(range(300)).segments
    assert [(each.start, each.stop, len(each), len(each.pages)) for each in segments] == [
        (0, 256, 256, 8),
        (256, 300, 44, 2),
    ]
