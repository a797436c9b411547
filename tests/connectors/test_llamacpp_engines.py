"""SmolLM2 in llama.cpp and in transformers: one identity, KV that goes over, and what it is worth."""

from __future__ import annotations

import numpy as np
import pytest

from avp import Agent, Context, HuggingFaceConnector, NoAgreement
from avp.connectors import models
from avp.connectors.llamacpp_state import to_canonical
from avp.segment import Exactness

from .llamacpp_alone import LlamaAlone

LlamaCppConnector = pytest.importorskip("avp.connectors.llamacpp").LlamaCppConnector
pytestmark = pytest.mark.real

FIRST = "Anna keeps the red key in the kitchen drawer. Ben keeps the blue key under the mat by the door. " * 6
THEN = list(range(2000, 2030))


@pytest.fixture(scope="module")
def llama() -> LlamaCppConnector:
    return LlamaCppConnector.from_pretrained("smollm2", threads=1)


@pytest.fixture(scope="module")
def transformers() -> HuggingFaceConnector:
    return HuggingFaceConnector.from_pretrained("smollm2")


def test_both_are_one_model_with_one_tokenizer(llama: LlamaCppConnector, transformers: HuggingFaceConnector) -> None:
    assert llama.identity.same_weights(transformers.identity)
    assert llama.identity.same_tokenizer(transformers.identity)
    assert llama.tokenize(FIRST) == transformers.tokenize(FIRST)
    assert llama.max_positions == transformers.max_positions


def test_the_kv_of_one_is_nearly_that_of_the_other(
    llama: LlamaCppConnector, transformers: HuggingFaceConnector
) -> None:
    one, other = llama.prefill(FIRST), transformers.prefill(FIRST)
    assert [segment.pages for segment in one.segments] == [segment.pages for segment in other.segments]
    for layer in (0, 15, 29):
        for part in ("k", "v"):
            ours = np.concatenate([s.read(layer, part).array for s in one.segments], axis=1).astype(np.float32)
            theirs = np.concatenate([s.read(layer, part).array for s in other.segments], axis=1)
            assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99


def test_a_context_of_the_other_engine_goes_on_and_counts_as_bounded(
    llama: LlamaCppConnector, transformers: HuggingFaceConnector
) -> None:
    question = "Where is the red key?"
    for here, there in ((llama, transformers), (transformers, llama)):
        own = here.prefill(FIRST)
        foreign = Context.from_bytes(there.prefill(FIRST).to_bytes())
        found = here.generate(question, context=foreign, max_new_tokens=8)
        assert (found.receipt.mode, found.receipt.exactness) == ("kv", Exactness.BOUNDED)
        assert found.receipt.tokens_reused == len(own)
        mine = np.asarray(here.score(THEN, context=own))
        theirs = np.asarray(here.score(THEN, context=foreign))
        assert np.abs(mine - theirs).mean() < 0.2


def test_agents_hand_over_between_engines_and_name_it_bounded(
    llama: LlamaCppConnector, transformers: HuggingFaceConnector
) -> None:
    here, there = Agent(llama, name="here"), Agent(transformers, name="there", accept="bounded")
    context = llama.prefill(FIRST)
    with pytest.raises(NoAgreement, match="KV of llamacpp in float16 is bounded to transformers in float32"):
        here.hand_over(context, to=there)
    handle = here.hand_over(context, to=there, accept="bounded")
    assert (handle.receipt.mode, handle.receipt.exactness) == ("kv", Exactness.BOUNDED)
    assert handle.receipt.tokens_reused == len(context)


def test_the_state_of_llama_cpp_itself_is_that_of_our_context(llama: LlamaCppConnector) -> None:
    ids = list(range(1000, 1200))
    alone = LlamaAlone(models.fetch("smollm2"))
    alone.feed(ids)
    found = to_canonical(alone.state(), shape=llama.memory.shape, start=0, stop=len(ids))
    context = llama.prefill(ids)
    for layer, pair in enumerate(found):
        for part, array in zip("kv", pair, strict=True):
            assert np.array_equal(context.segments[0].read(layer, part).array, array)


def test_a_long_context_by_steps_is_the_same_bytes(llama: LlamaCppConnector) -> None:
    ids = list(range(1000, 1600))
    parts = list(llama.prefill_steps(ids))
    assert [len(part) for part in parts] == [0, 256, 512, 600]
    assert parts[-1].to_bytes() == llama.prefill(ids).to_bytes()


def test_a_quantised_cache_gives_bounded_contexts() -> None:
    model = LlamaCppConnector.from_pretrained("smollm2", threads=1, dtype="q8_0", positions=1024)
    full = LlamaCppConnector.from_pretrained("smollm2", threads=1, positions=1024)
    context = model.prefill(FIRST)
    assert (model.dtype, context.exactness) == ("float16", Exactness.BOUNDED)
    exact = full.prefill(FIRST)
    for layer in (0, 29):
        for part in ("k", "v"):
            ours = context.segments[0].read(layer, part).array.astype(np.float32)
            theirs = exact.segments[0].read(layer, part).array.astype(np.float32)
            assert np.abs(ours - theirs).max() < 0.2 * np.abs(theirs).max()
    received = Context.from_bytes(context.to_bytes())
    assert np.abs(model.score(THEN, context=received) - model.score(THEN, context=context)).mean() < 0.2
    assert full.generate(THEN, context=received, max_new_tokens=2).receipt.exactness is Exactness.BOUNDED


def test_generate_answers_a_chat_and_reuses_its_context(llama: LlamaCppConnector) -> None:
    context = llama.prefill([{"role": "system", "content": "You answer in one sentence."}])
    first = llama.generate("Name a colour.", context=context, max_new_tokens=12)
    second = llama.generate("Name another.", context=first.context, max_new_tokens=12)
    assert second.receipt.tokens_reused >= len(first.context) - 1
    pieces = list(llama.stream("Name a colour.", context=context, max_new_tokens=12))
    assert "".join(pieces) == first
