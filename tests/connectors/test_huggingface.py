"""What the transformers connector does beyond the laws: refusals, sampling, endings, scores, dtype, usage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    GenerationConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3NextConfig,
    T5Config,
)

import avp
from avp.connectors.huggingface import HuggingFaceConnector
from avp.connectors.layout import cache_layout
from avp.errors import ContextTooLong, UnsupportedCache, UsageError
from avp.segment import Exactness
from avp.testing.tiny import tiny_connector, tiny_model, tiny_tokenizer

PLAN = "Plan the work: 12 apples and 7 pears."
CHECK = "Check the plan."


@pytest.fixture(scope="module")
def connector() -> HuggingFaceConnector:
    return tiny_connector()


# --- what is refused


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (DeepseekV3Config(), "MLA"),
        (MambaConfig(), "LinearAttention"),
        (JambaConfig(), "LinearAttention"),
        (Qwen3NextConfig(), "linear_attention"),
        (Llama4TextConfig(), "chunked_attention"),
        (T5Config(), "encoder-decoder"),
        (LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, num_hidden_layers=1), ""),
    ],
    ids=["mla", "mamba", "jamba", "qwen3-next", "llama4", "t5", "llama"],
)
def test_a_cache_that_avp_does_not_carry_is_refused_by_name(config: object, named: str) -> None:
    if not named:
        assert len(cache_layout(config).layers) == 1  # type: ignore[arg-type]
        return
    with pytest.raises(UnsupportedCache, match=named):
        cache_layout(config)  # type: ignore[arg-type]


def test_a_quantized_cache_and_an_unknown_rope_scaling_are_refused() -> None:
    quantized = GenerationConfig(cache_implementation="quantized")
    with pytest.raises(UnsupportedCache, match="quantized cache"):
        cache_layout(LlamaConfig(), quantized)
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(UnsupportedCache, match="'spiral'"):
        cache_layout(config)


def test_a_batch_is_refused_by_the_cache(connector: HuggingFaceConnector) -> None:
    from avp.connectors.arena import Arena
    from avp.connectors.cache import RunCache

    arena = Arena.empty(connector._shape, 64)
    with pytest.raises(UnsupportedCache, match="use batch 1"), torch.no_grad():
        connector.model(torch.zeros(2, 4, dtype=torch.long), past_key_values=RunCache(arena, 0))


def test_a_generation_longer_than_the_model_is_cut_and_says_so(connector: HuggingFaceConnector) -> None:
    prompt = [5] * (connector.max_positions - 3)
    found = connector.generate(prompt, max_new_tokens=50, min_new_tokens=50)
    assert len(found.tokens) == 3
    assert "max_new_tokens cut to 3" in found.receipt.reasons[0]
    with pytest.raises(ContextTooLong):
        connector.generate([5] * connector.max_positions)
    with pytest.raises(ContextTooLong):
        connector.think([5] * (connector.max_positions - 3), steps=4)


# --- sampling and endings


def test_a_seed_draws_the_same_tokens_and_leaves_the_global_generator_alone(connector: HuggingFaceConnector) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    draws = [connector.generate(PLAN, temperature=1.0, seed=seed, max_new_tokens=12).tokens for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_top_p_near_zero_is_greedy(connector: HuggingFaceConnector) -> None:
    greedy = connector.generate(PLAN, max_new_tokens=8)
    assert connector.generate(PLAN, temperature=1.0, top_p=1e-6, seed=0, max_new_tokens=8).tokens == greedy.tokens


def test_the_models_own_generation_defaults_do_not_change_greedy_decoding() -> None:
    connector = tiny_connector()
    plain = connector.generate(PLAN, max_new_tokens=12, min_new_tokens=12)
    connector.model.generation_config = GenerationConfig(
        repetition_penalty=9.0, top_k=1, no_repeat_ngram_size=1, eos_token_id=2, pad_token_id=2
    )
    assert connector.generate(PLAN, max_new_tokens=12, min_new_tokens=12).tokens == plain.tokens


def test_a_stop_string_ends_the_turn_and_the_conversation_goes_on(connector: HuggingFaceConnector) -> None:
    long = connector.generate(PLAN, max_new_tokens=24, min_new_tokens=24)
    stop = next(each for each in str(long)[3:] if each.isascii())
    found = connector.generate(PLAN, max_new_tokens=24, stop=stop)
    assert found.finish_reason == "stop"
    assert stop in found
    assert len(found.tokens) < 24
    assert str(long).startswith(str(found))
    after = connector.generate(CHECK, context=found.context, max_new_tokens=4)
    whole = [
        {"role": "user", "content": PLAN},
        {"role": "assistant", "content": str(found)},
        {"role": "user", "content": CHECK},
    ]
    assert after.tokens == connector.generate(whole, max_new_tokens=4).tokens


def test_a_turn_ended_by_eos_goes_on_as_the_template_closes_it() -> None:
    connector = tiny_connector()
    free = connector.generate(PLAN, max_new_tokens=8, min_new_tokens=8)
    connector.model.generation_config.eos_token_id = [2, free.tokens[3]]
    found = connector.generate(PLAN, max_new_tokens=8)
    assert (found.finish_reason, found.tokens) == ("eos", free.tokens[:4])
    after = connector.generate(CHECK, context=found.context, max_new_tokens=4)
    whole = [
        {"role": "user", "content": PLAN},
        {"role": "assistant", "content": str(found)},
        {"role": "user", "content": CHECK},
    ]
    assert after.tokens == connector.generate(whole, max_new_tokens=4).tokens


def test_a_stream_that_is_closed_ends_its_run_and_leaves_the_context_usable(connector: HuggingFaceConnector) -> None:
    context = connector.prefill(PLAN)
    with connector.stream(CHECK, context=context, max_new_tokens=400, min_new_tokens=400) as stream:
        next(iter(stream))
    seen = stream.result.tokens
    assert 0 < len(seen) < 400
    assert connector.generate(CHECK, context=context, max_new_tokens=len(seen), min_new_tokens=len(seen)).tokens == seen


def test_an_error_in_a_stream_reaches_its_reader(connector: HuggingFaceConnector) -> None:
    stream = connector.stream([5] * connector.max_positions)
    with pytest.raises(ContextTooLong):
        list(stream)
    with pytest.raises(ContextTooLong):
        _ = stream.result


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"min_new_tokens": -1},
        {"accept": "maybe"},
        {"stop": ""},
        {"seed": 2**70},
        {"context": b"bytes"},
    ],
)
def test_impossible_sampling_is_refused(connector: HuggingFaceConnector, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        connector.generate(PLAN, **options)  # type: ignore[arg-type]


# --- scores


def test_scores_are_the_models_own_log_probabilities(connector: HuggingFaceConnector) -> None:
    ids = list(range(40, 70))
    with torch.no_grad():
        expected = torch.log_softmax(connector.model(torch.tensor([ids])).logits[0], -1)
    expected = expected[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    alone = connector.score(ids)
    assert bool(alone[0].isnan())
    torch.testing.assert_close(alone[1:], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        connector.score(ids[10:], context=connector.prefill(ids[:10])), expected[9:], rtol=0, atol=1e-4
    )
    generated = connector.generate(ids[:5], max_new_tokens=3)
    assert connector.score([7, 8], context=generated.context).shape == (2,)
    assert connector.score([7, 8], context=connector.think(ids[:5], steps=2)).isfinite().all()


def test_long_scores_are_computed_in_pieces(connector: HuggingFaceConnector) -> None:
    ids = [3 + i % 300 for i in range(700)]
    with torch.no_grad():
        expected = torch.log_softmax(connector.model(torch.tensor([ids])).logits[0], -1)
    torch.testing.assert_close(
        connector.score(ids)[1:], expected[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0], rtol=0, atol=2e-4
    )


# --- what a context brings


def test_a_context_of_another_dtype_is_cast_and_then_bounded(connector: HuggingFaceConnector) -> None:
    half = tiny_connector(dtype=torch.bfloat16)
    assert half.identity.same_weights(connector.identity)
    found = connector.generate(CHECK, context=avp.Context.from_bytes(half.prefill(PLAN).to_bytes()), max_new_tokens=4)
    assert (found.receipt.mode, found.receipt.exactness) == ("kv", Exactness.BOUNDED)
    assert found.context.exactness is Exactness.BOUNDED


def test_missing_segments_are_named(connector: HuggingFaceConnector) -> None:
    context = connector.prefill(list(range(3, 300)))
    partial = avp.Context.from_bytes(replace(context, segments=context.segments[1:]).to_bytes())
    with pytest.raises(UsageError, match="lacks the KV from position 0"):
        connector.generate([5], context=partial)


def test_two_connectors_over_one_model_count_their_own_positions() -> None:
    model = tiny_model()
    one, other = (HuggingFaceConnector(model, tiny_tokenizer()) for _ in range(2))
    for each in (one, other):
        assert each.generate([5, 6, 7], max_new_tokens=4, min_new_tokens=4).receipt.positions_computed == 6


def test_usage_counts_the_whole_prompt_and_what_came_with_the_context(connector: HuggingFaceConnector) -> None:
    context = connector.prefill([5] * 40)
    usage = connector.generate([6, 7], context=context, max_new_tokens=3, min_new_tokens=3).usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (42, 40, 3)


def test_what_cannot_be_gone_on_from_says_so(connector: HuggingFaceConnector) -> None:
    thought = connector.think(PLAN, steps=1)
    hidden = replace(thought, kind="hidden", length=0, segments=())
    with pytest.raises(UsageError, match="holds no KV to go on from"):
        connector.generate(CHECK, context=hidden)
    found = connector.generate(CHECK, context=hidden, accept="text", max_new_tokens=2)
    assert found.receipt.mode == "text"
    with pytest.raises(UsageError, match="cannot be projected"):
        connector.generate(CHECK, source=connector)
    lost = replace(thought, hidden=None)
    with pytest.raises(UsageError, match="whose input vector it does not hold"):
        connector.generate("", context=lost)


def test_a_context_of_which_nothing_is_reused_is_no_hand_over() -> None:
    connector = tiny_connector(chat_template="{% if shout %}{{ 'LOUD ' }}{% endif %}{{ messages[-1]['content'] }}")
    context = connector.generate(PLAN, max_new_tokens=2).context
    found = connector.generate(CHECK, context=context, chat_template_kwargs={"shout": True}, max_new_tokens=2)
    assert (found.receipt.mode, found.receipt.exactness, found.receipt.tokens_reused) == ("text", Exactness.TEXT, 0)
