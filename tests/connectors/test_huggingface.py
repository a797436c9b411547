"""What the transformers connector does beyond the laws: identity, thinking, sampling, endings, refusals, memory."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DynamicCache,
    GenerationConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3NextConfig,
    T5Config,
)

import avp
from avp import registry
from avp.connectors.huggingface import HuggingFaceConnector
from avp.connectors.layout import cache_layout
from avp.errors import ContextTooLong, IdentityMismatch, ModelNotFound, UnsupportedCache, UsageError
from avp.segment import LATENT, Exactness
from avp.testing.tiny import FAMILIES, tiny_connector, tiny_model, tiny_tokenizer

PLAN = "Plan the work: 12 apples and 7 pears."
CHECK = "Check the plan."


@pytest.fixture(scope="module")
def connector() -> HuggingFaceConnector:
    return tiny_connector()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "one"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# --- identity


def test_a_checkpoint_has_one_fingerprint_whatever_path_or_dtype_it_is_loaded_with(
    checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "two"
    shutil.copytree(checkpoint, other)
    first = HuggingFaceConnector.from_pretrained(checkpoint, dtype="bfloat16").identity
    for folder, dtype in ((checkpoint, "float32"), (other, "float32"), (other, "float16"), (checkpoint, "bfloat16")):
        again = HuggingFaceConnector.from_pretrained(folder, dtype=dtype).identity
        assert again.weights == first.weights
        assert again.same_weights(first)
        assert again.same_tokenizer(first)
    assert tiny_connector().identity.weights == first.weights


def test_the_fingerprint_is_noted_beside_the_checkpoint_and_taken_again_when_its_files_change(checkpoint: Path) -> None:
    first = HuggingFaceConnector.from_pretrained(checkpoint).identity.weights
    assert first in (checkpoint / ".avp-fingerprint.json").read_text()
    tiny_model("llama", seed=1).save_pretrained(checkpoint)
    assert HuggingFaceConnector.from_pretrained(checkpoint).identity.weights != first


def test_a_fine_tune_one_changed_matrix_or_random_weights_never_pass_as_the_base(
    connector: HuggingFaceConnector,
) -> None:
    base = connector.identity.weights
    one_matrix = copy.deepcopy(connector.model)
    one_value = copy.deepcopy(connector.model)
    fine_tune = copy.deepcopy(connector.model)
    with torch.no_grad():
        one_matrix.base_model.layers[2].mlp.up_proj.weight.mul_(1.01)
        one_value.base_model.layers[0].self_attn.q_proj.weight[3, 5] += 0.5
        for parameter in fine_tune.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    others = [one_matrix, one_value, fine_tune, tiny_model("llama", seed=7)]
    found = {HuggingFaceConnector(model, connector.tokenizer).identity.weights for model in others}
    assert len(found | {base}) == 5


def test_rope_and_window_change_the_layout_without_changing_the_weights() -> None:
    plain, wide = tiny_model("mistral"), tiny_model("mistral")
    wide.config.sliding_window = 48
    tokenizer = tiny_tokenizer()
    one, other = HuggingFaceConnector(plain, tokenizer), HuggingFaceConnector(wide, tokenizer)
    assert one.identity.weights == other.identity.weights
    assert not one.identity.same_weights(other.identity)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_active_adapter_changes_the_fingerprint(connector: HuggingFaceConnector) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    adapted = peft.get_peft_model(
        copy.deepcopy(connector.model), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    found = HuggingFaceConnector(adapted.base_model.model, connector.tokenizer).identity.weights
    with adapted.disable_adapter():
        disabled = HuggingFaceConnector(adapted.base_model.model, connector.tokenizer).identity.weights
    merged = HuggingFaceConnector(adapted.merge_and_unload(), connector.tokenizer).identity.weights
    assert len({found, disabled, merged, connector.identity.weights}) == 4


def test_a_larger_matrix_is_sampled_in_every_row_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    from avp.connectors import weights

    monkeypatch.setattr(weights, "WHOLE", 0)
    model = tiny_model("llama")
    base = weights.weights_fingerprint(model)
    matrix = model.base_model.layers[0].mlp.up_proj.weight
    for index in ((slice(17, 18), slice(None)), (slice(None), slice(5, 6))):
        with torch.no_grad():
            kept = matrix.clone()
            matrix[index] += 0.5
            assert weights.weights_fingerprint(model) != base
            matrix.copy_(kept)
    assert weights.weights_fingerprint(model) == base


def test_a_name_that_is_no_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model 'nobody/nothing'"):
        HuggingFaceConnector.from_pretrained("nobody/nothing")
    for path in ("/nonexistent/folder", "./typo/a/b", "~/typo", "a/b/c"):
        with pytest.raises(ModelNotFound, match="there is no folder"):
            HuggingFaceConnector.from_pretrained(path)
    with pytest.raises(ModelNotFound, match="there is no file"):
        HuggingFaceConnector.from_pretrained(tmp_path / "missing.gguf")
    with pytest.raises(UsageError, match="dtype 'int3'"):
        HuggingFaceConnector.from_pretrained(tmp_path, dtype="int3")


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


# --- other weights


def test_a_context_of_other_weights_falls_back_only_when_told_and_says_why(connector: HuggingFaceConnector) -> None:
    stranger = tiny_connector(seed=1)
    context = connector.prefill(PLAN)
    with pytest.raises(IdentityMismatch, match=r'A KV-cache is valid only for the weights.*Fix: .*accept="text"'):
        stranger.generate(CHECK, context=context)
    found = stranger.generate(CHECK, context=context, accept="text", max_new_tokens=4)
    assert (
        found.tokens
        == stranger.generate(
            [{"role": "user", "content": PLAN}, {"role": "user", "content": CHECK}], max_new_tokens=4
        ).tokens
    )
    assert (found.receipt.mode, found.receipt.exactness, found.receipt.tokens_reused) == ("tokens", Exactness.TEXT, 0)
    assert "no KV was used" in found.receipt.reasons[0]
    thought = connector.think(PLAN, steps=2)
    found = stranger.generate(CHECK, context=thought, accept="text", max_new_tokens=4)
    assert found.receipt.mode == "text"
    raw = connector.think([5, 6, 7], steps=2)
    with pytest.raises(IdentityMismatch, match="holds no text"):
        stranger.generate(CHECK, context=raw, accept="text")


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


# --- dtype, and what a projection may see


def test_a_context_of_another_dtype_is_cast_and_then_bounded(connector: HuggingFaceConnector) -> None:
    half = tiny_connector(dtype=torch.bfloat16)
    assert half.identity.same_weights(connector.identity)
    found = connector.generate(CHECK, context=avp.Context.from_bytes(half.prefill(PLAN).to_bytes()), max_new_tokens=4)
    assert (found.receipt.mode, found.receipt.exactness) == ("kv", Exactness.BOUNDED)
    assert found.context.exactness is Exactness.BOUNDED


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
