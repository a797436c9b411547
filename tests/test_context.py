"""A context is an immutable run of positions, named page by page."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from avp.buffers import Buffer
from avp.context import Context, Turn, text_context
from avp.errors import AVPError, UsageError
from avp.segment import LATENT, Exactness
from avp.testing import synthetic_context

from .samples import described, hidden_context, kv_bytes, kv_context, pages, subset, tokens_context

# --- cutting


@pytest.mark.parametrize("stop", [0, 1, 31, 32, 33, 255, 256, 257, 288, 299, 300])
def test_a_cut_has_the_pages_and_the_kv_of_a_context_of_the_same_ids(stop: int) -> None:
    whole = kv_context(range(300))
    cut = whole[:stop]
    fresh = kv_context(range(stop))
    assert (len(cut), cut.tokens) == (stop, fresh.tokens)
    assert pages(cut) == pages(fresh)
    for found, segment in zip(cut.segments, whole.segments, strict=False):
        for layer in (0, 1):
            rows = segment.read(layer, "v").array[:, : len(found)]
            assert found.read(layer, "v").array.tobytes() == rows.tobytes()
    assert described(Context.from_bytes(cut.to_bytes())) == described(cut)
    assert kv_bytes(Context.from_bytes(cut.to_bytes())) == kv_bytes(cut)


def test_a_cut_copies_nothing_and_leaves_the_whole_as_it_was() -> None:
    whole = synthetic_context(tokens=100, dtype="float32")
    before = described(whole)
    cut = whole[:50]
    assert np.shares_memory(cut.segments[0].read(0, "k").array, whole.segments[0].read(0, "k").array)
    assert described(whole) == before


def test_a_cut_of_a_cut_is_the_shorter_cut() -> None:
    whole = kv_context(range(300))
    assert pages(whole[:290][:270]) == pages(whole[:270])
    assert kv_bytes(whole[:290][:270]) == kv_bytes(whole[:270])


def test_a_cut_drops_what_no_longer_holds() -> None:
    whole = kv_context(range(40), pending=(9,), turns=(Turn({"role": "user", "content": "x"}),))
    whole = replace(whole, hidden=Buffer("float32", np.zeros((1, 2), np.float32)))
    assert whole[:40] is whole
    assert whole[:] is whole
    cut = whole[:39]
    assert (cut.pending, cut.hidden) == ((), None)
    assert [(turn.role, turn.opaque) for turn in cut.turns] == [("raw", (0, 39))]
    assert whole[:0].turns == ()


def test_a_cut_before_latent_positions_is_exact_again() -> None:
    whole = kv_context([*range(256), LATENT])
    assert whole.exactness is Exactness.APPROXIMATE
    assert whole[:256].exactness is Exactness.EXACT


def test_a_cut_between_a_pages_ids_and_its_latent_positions_is_named_by_the_ids() -> None:
    whole = kv_context([*range(40), LATENT])
    assert pages(whole[:40]) == pages(kv_context(range(40)))
    with pytest.raises(UsageError, match="cut at a multiple of 32"):
        kv_context([*range(40), LATENT, 5])[:41]


def test_a_subset_is_cut_as_the_whole_is() -> None:
    whole = kv_context(range(900))
    tail = subset(whole, 1, 2)
    assert pages(tail[:600]) == pages(whole[:600])[8:]
    assert pages(tail[:520]) == pages(whole[:520])[8:]
    assert pages(tail[:290]) == pages(whole[:290])[8:]
    assert pages(tail[:288]) == pages(whole[:288])[8:]
    assert pages(tail[:270]) == pages(whole[:270])[8:]
    assert tail[:100].segments == ()


@pytest.mark.parametrize("where", [slice(1, 2), slice(None, None, 2), slice(None, -1), slice(None, 41), 3])
def test_only_the_end_can_be_cut(where: slice) -> None:
    with pytest.raises(UsageError, match="Fix: use"):
        kv_context(range(40))[where]


# --- values


def test_a_context_does_not_change() -> None:
    context = synthetic_context()
    for thing, field in (
        (context, "tokens"),
        (context.segments[0], "pages"),
        (context.turns[0], "opaque"),
        (context.model, "id"),
    ):
        with pytest.raises((FrozenInstanceError, TypeError)):
            setattr(thing, field, ())


def test_a_context_says_what_it_is() -> None:
    context = kv_context(range(3), pending=(5, 6))
    assert repr(context) == "<Context kv, 3 positions, 2 pending, a/model, exact>"
    assert repr(text_context("x")) == "<Context text, 0 positions, 0 pending, no model, text>"


def test_a_context_without_positions_is_not_nothing() -> None:
    assert len(text_context("x")) == 0
    assert text_context("x")
    assert kv_context([])


def test_bytes_are_those_that_a_receiver_would_hold() -> None:
    assert (
        synthetic_context(layers=3, kv_heads=2, head_dim=8, tokens=10, dtype="float16").nbytes == 3 * 2 * 2 * 8 * 10 * 2
    )
    assert hidden_context(5, "float32").nbytes == 5 * 6 * 4
    assert text_context("é").nbytes == 2
    assert tokens_context(4).nbytes == 0
    assert subset(kv_context(range(300)), 1).nbytes == 44 * kv_context([]).model.layout.bytes_per_token("float32")


def test_text_is_what_a_reader_without_the_model_gets() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "image", "url": "x"}, "not a part"]
    contents = ("a", parts, "", None, 7, "c")
    context = Context("text", turns=tuple(Turn({"role": "user", "content": content}) for content in contents))
    assert context.text == "a\n\nb\n\nc"
    assert [message["content"] for message in context.messages] == list(contents)


def test_a_message_without_role_is_the_users() -> None:
    assert Turn({}).role == "user"
    assert text_context("x", role="system").turns[0].role == "system"


def test_every_error_of_the_library_has_one_root() -> None:
    with pytest.raises(AVPError):
        kv_context(range(3))[1:]
