"""Tiny random transformers models and a tokenizer, built in memory: real engines for tests, in milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

if TYPE_CHECKING:
    from avp.connectors.huggingface import HuggingFaceConnector

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Demands that user and assistant alternate, and trims, as the templates of Mistral and Gemma do.
ALTERNATING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
# Drops the reasoning of earlier turns, as the templates of reasoning models do.
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = ("The planner plans, the critic reads the plan and the solver answers: 12 apples and 7 pears. " * 4,)
FAMILIES = ("llama", "qwen2", "mistral", "gemma3")


def tiny_tokenizer(*, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 ids with <|im_start|>, <|im_end|> and <s>."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


def tiny_model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """A random model of 4 layers, hidden size 64, 2 kv heads of 16; "mistral" and "gemma3" slide a window of 24."""
    common: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "attn_implementation": attention,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=False))
        elif family == "qwen2":
            model = Qwen2ForCausalLM(
                Qwen2Config(**{k: v for k, v in common.items() if k != "head_dim"}, tie_word_embeddings=True)
            )
        elif family == "mistral":
            model = MistralForCausalLM(MistralConfig(**common, sliding_window=24))
        else:
            kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
            model = Gemma3ForCausalLM(
                Gemma3TextConfig(**common, sliding_window=24, layer_types=kinds, query_pre_attn_scalar=16)
            )
    return model.to(dtype).eval()


def tiny_connector(
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    chat_template: str | None = CHATML,
) -> HuggingFaceConnector:
    """A connector over `tiny_model` and `tiny_tokenizer`."""
    from avp.connectors.huggingface import HuggingFaceConnector

    model = tiny_model(family, seed=seed, dtype=dtype, attention=attention)
    return HuggingFaceConnector(model, tiny_tokenizer(chat_template=chat_template), name=f"tiny-{family}-{seed}")
