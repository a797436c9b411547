"""Frames exchanged with the real peer: its contexts continue here as they do there, and ours there as here."""

from __future__ import annotations

import struct

import pytest

from avp.context import text_context
from avp.errors import DigestMismatch, IdentityMismatch
from avp.interop.avp04 import model_hash, read_frame, tokenizer_hash, write_frame
from avp.interop.avp04_context import context_from_frame, frame_from_context
from avp.interop.avp04_proto import Metadata
from avp.segment import LATENT, Exactness

from ..samples import kv_bytes
from .peer import Both
from .test_avp04 import VECTORS
from .wire import HASH, kv_context

PLAN = "The planner plans 12 apples and 7 pears."
ASK = "How many pears does the critic read in the plan?"
NEW = 40


def test_both_sides_hash_model_and_tokenizer_alike(both: Both) -> None:
    theirs = both.theirs.call("identity")
    assert model_hash(both.ours.model.config.to_dict()) == theirs["model_hash"]
    assert tokenizer_hash(both.ours.tokenizer.get_vocab()) == theirs["tokenizer_hash"]
    layer = both.ours.identity.layout.layers[0]
    assert (theirs["num_layers"], theirs["num_kv_heads"], theirs["head_dim"]) == (4, layer.kv_heads, layer.head_dim)


# --- the peer's contexts here


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("ask", ["?", ASK * 3])
def test_a_context_of_the_peer_continues_here_as_it_does_there(both: Both, steps: int, ask: str) -> None:
    data = both.theirs.think(PLAN, steps=steps)
    context = context_from_frame(read_frame(data), model=both.ours.identity, trust_model_hash=both.hash)
    text, tokens = both.theirs.generate(ask, data=data, tokens=NEW)
    found = both.ours.generate(ask, context=context, max_new_tokens=NEW)
    assert found.tokens == tokens
    assert found.strip() == text
    assert len(tokens) >= 8
    assert tokens != both.theirs.generate(ask, data=None, tokens=NEW)[1]
    assert found.receipt.tokens_reused == len(context)
    assert found.context.exactness is Exactness.APPROXIMATE


def test_with_its_ids_a_context_of_the_peer_is_one_of_ours(both: Both) -> None:
    ids = tuple(_with_reply(both, PLAN))
    data = both.theirs.think(PLAN, steps=3)
    whole = (*ids, *(LATENT,) * 3)
    context = context_from_frame(read_frame(data), model=both.ours.identity, trust_model_hash=both.hash, tokens=whole)
    assert context.tokens == whole
    exact = both.theirs.think(PLAN, steps=0)
    context = context_from_frame(read_frame(exact), model=both.ours.identity, trust_model_hash=both.hash, tokens=ids)
    own = both.ours.prefill(list(ids))
    assert context.exactness is Exactness.EXACT
    assert [each.pages for each in context.segments] == [each.pages for each in own.segments]
    assert kv_bytes(context) == kv_bytes(own)
    text, tokens = both.theirs.generate(ASK, data=exact, tokens=NEW)
    assert both.ours.generate(ASK, context=context, max_new_tokens=NEW).tokens == tokens
    assert both.ours.generate(ASK, context=own, max_new_tokens=NEW).strip() == text


def _with_reply(both: Both, prompt: str) -> list[int]:
    """Ids of the prompt as the peer renders it, the opening of the reply included."""
    text = both.ours.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(both.ours.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_frame_of_the_peer_is_written_again_byte_for_byte(both: Both) -> None:
    data = both.theirs.think(PLAN, steps=2)
    frame = read_frame(data)
    assert write_frame(frame.metadata, frame.payload) == data
    assert dict(frame.metadata.extra) == {"model_hash": both.hash, "model_family": "llama", "num_steps": "2"}


def test_a_context_of_the_peer_is_refused_without_trust_in_its_hash(both: Both) -> None:
    frame = read_frame(both.theirs.think(PLAN, steps=0))
    with pytest.raises(IdentityMismatch, match="trust_model_hash"):
        context_from_frame(frame, model=both.ours.identity, trust_model_hash=HASH)


# --- our contexts there


@pytest.mark.parametrize("compression", ["", "zstd"])
@pytest.mark.parametrize("ask", ["?", ASK * 3])
def test_a_context_of_ours_continues_there_as_it_does_here(both: Both, ask: str, compression: str) -> None:
    for context in (both.ours.prefill(list(both.ours.tokenize(PLAN))), both.ours.prefill(_with_reply(both, PLAN * 30))):
        data = frame_from_context(context, model_hash=both.hash, hidden_dim=64, compression=compression)
        text, tokens = both.theirs.generate(ask, data=data, tokens=NEW)
        found = both.ours.generate(ask, context=context, max_new_tokens=NEW)
        assert tokens == found.tokens
        assert text == found.strip()
        assert len(tokens) >= 8


def test_latent_steps_of_ours_continue_there_as_they_do_here(both: Both) -> None:
    context = both.ours.think(_with_reply(both, PLAN), steps=5)
    text, tokens = both.theirs.generate(ASK, data=frame_from_context(context, model_hash=both.hash), tokens=NEW)
    found = both.ours.generate(ASK, context=context, max_new_tokens=NEW)
    assert tokens == found.tokens
    assert text == found.strip()


def test_a_turn_of_ours_continues_there_once_its_last_token_is_computed(both: Both) -> None:
    first = both.ours.generate(_with_reply(both, PLAN), max_new_tokens=6)
    context = both.ours.prefill("", context=first.context)
    assert context.pending == ()
    _, tokens = both.theirs.generate(ASK, data=frame_from_context(context, model_hash=both.hash), tokens=NEW)
    assert tokens == both.ours.generate(ASK, context=context, max_new_tokens=NEW).tokens


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_kv_of_every_dtype_comes_back_from_the_peer_as_it_was(both: Both, dtype: str, tokens: int) -> None:
    context = kv_context(dtype=dtype, tokens=tokens)
    data = frame_from_context(context, model_hash=both.hash)
    back = read_frame(both.theirs.again(data))
    assert back.payload == read_frame(data).payload
    assert context.model is not None
    found = context_from_frame(back, model=context.model, trust_model_hash=both.hash, tokens=context.tokens)
    assert kv_bytes(found) == kv_bytes(context)


# --- frames as such


@pytest.mark.parametrize("level", ["NONE", "FAST", "BALANCED", "MAX"])
def test_frames_of_every_compression_of_the_peer_are_read(both: Both, level: str) -> None:
    payload = struct.pack("<2f", 1, 2) * 50
    frame = read_frame(both.theirs.encode(payload, level=level))
    assert frame.payload == payload
    assert frame.metadata.compression == (None if level == "NONE" else "zstd")
    assert (frame.metadata.tensor_shape, dict(frame.metadata.extra)) == ((2,), {"k": "v"})


def test_the_peer_reads_our_frames_and_the_published_vectors(both: Both) -> None:
    for text, metadata, _ in VECTORS:
        found = both.theirs.decode(bytes.fromhex(text))
        assert (found["hidden_dim"], found["tensor_shape"]) == (metadata.hidden_dim, list(metadata.tensor_shape))
    for compression in ("", "zstd"):
        found = both.theirs.decode(write_frame(Metadata(session_id="s", hidden_dim=2), b"12", compression=compression))
        assert (found["session_id"], found["payload"], found["compression"]) == ("s", "MTI=", compression or None)
    assert both.theirs.decode(frame_from_context(text_context("hi"), model_hash=""))["mode"] == 1


def test_both_sides_refuse_a_payload_that_was_changed(both: Both) -> None:
    data = bytearray(both.theirs.think(PLAN, steps=0))
    data[-1] ^= 1
    with pytest.raises(DigestMismatch):
        read_frame(data)
    assert both.theirs.decode(bytes(data)) == {"error": "DecodeError"}
