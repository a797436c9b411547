"""Latent steps: their length, what they feed back, what follows them, and what a projection sees of the model."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import avp
from avp import registry
from avp.connectors.huggingface import HuggingFaceConnector
from avp.errors import UsageError
from avp.segment import LATENT, Exactness
from avp.testing.tiny import FAMILIES, tiny_connector, tiny_model

PLAN = "Plan the work: 12 apples and 7 pears."


@pytest.fixture(scope="module")
def connector() -> HuggingFaceConnector:
    return tiny_connector()


# --- thinking


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["norm", "soft", "ridge", "noise"])
def test_latent_steps_have_the_length_of_an_input_embedding(family: str, method: str) -> None:
    connector = tiny_connector(family)
    before, after = connector.prefill(PLAN), connector.think(PLAN, steps=5, method=method)
    assert after.tokens[-5:] == (LATENT,) * 5
    assert len(after) >= len(before) + 5
    assert after.exactness is Exactness.APPROXIMATE
    embedding = connector.model.get_input_embeddings()
    with torch.no_grad():
        mean = embedding(torch.arange(embedding.weight.shape[0])).norm(dim=-1).mean()
    assert after.hidden is not None
    length = torch.tensor(after.hidden.array).norm()
    assert float(length) == pytest.approx(float(mean), rel=1e-4)


def test_the_norm_step_feeds_the_last_hidden_state_back(connector: HuggingFaceConnector) -> None:
    thought = connector.think([5, 6, 7, 8], steps=2)
    embed, base = connector.model.get_input_embeddings(), connector.model.base_model
    with torch.no_grad():
        length = embed.weight.norm(dim=-1).mean()
        vectors = embed(torch.tensor([[5, 6, 7, 8]]))
        for _ in range(2):
            hidden = base(inputs_embeds=vectors).last_hidden_state[:, -1:]
            vectors = torch.cat([vectors, hidden * length / hidden.norm()], dim=1)
        cache = DynamicCache(config=connector.model.config)
        base(inputs_embeds=vectors, past_key_values=cache)
    ours = torch.tensor(thought.segments[0].read(1, "k").array)
    torch.testing.assert_close(ours, cache.layers[1].keys[0], rtol=1e-4, atol=1e-4)


def test_thinking_zero_steps_is_prefill_and_fewer_is_refused(connector: HuggingFaceConnector) -> None:
    assert connector.think(PLAN, steps=0).to_bytes() == connector.prefill(PLAN).to_bytes()
    with pytest.raises(UsageError, match="steps is -1"):
        connector.think(PLAN, steps=-1)
    with pytest.raises(UsageError, match="no projection is named 'telepathy'"):
        connector.think(PLAN, method="telepathy")


def test_what_follows_latent_steps_is_approximate_and_what_came_before_is_not(connector: HuggingFaceConnector) -> None:
    long = connector.prefill(list(range(3, 303)))
    thought = connector.think([5, 6], context=long, steps=3)
    assert [segment.exactness for segment in thought.segments] == [Exactness.EXACT, Exactness.APPROXIMATE]
    found = connector.generate([9, 10], context=thought, max_new_tokens=3)
    assert found.context.exactness is found.receipt.exactness is Exactness.APPROXIMATE
    assert thought[:256].exactness is Exactness.EXACT


def test_a_reply_goes_on_right_after_latent_steps_here_and_after_the_wire(connector: HuggingFaceConnector) -> None:
    thought = connector.think(PLAN, steps=4)
    here = connector.generate("", context=thought, max_new_tokens=8, min_new_tokens=8)
    there = connector.generate(
        "", context=avp.Context.from_bytes(thought.to_bytes()), max_new_tokens=8, min_new_tokens=8
    )
    assert here.tokens == there.tokens
    assert here.receipt.positions_computed == 8
    more = connector.think("", context=thought, steps=2)
    assert more.tokens[-6:] == (LATENT,) * 6
    assert len(more) == len(thought) + 2


def test_gemmas_embedding_factor_is_seen() -> None:
    from avp.connectors.embeddings import Tables

    assert Tables(tiny_model("gemma3")).scale == pytest.approx(8.0, rel=1e-3)
    assert Tables(tiny_model("llama")).scale == pytest.approx(1.0, rel=1e-3)


def test_with_tied_embeddings_ridge_is_norm() -> None:
    connector = tiny_connector("qwen2")
    norm, ridge = connector.think(PLAN, steps=1), connector.think(PLAN, steps=1, method="ridge")
    assert norm.hidden is not None
    assert ridge.hidden is not None
    cosine = torch.cosine_similarity(torch.tensor(norm.hidden.array), torch.tensor(ridge.hidden.array))
    assert float(cosine) > 0.99
    assert registry.names("avp.projections") == ("noise", "norm", "ridge", "soft")
