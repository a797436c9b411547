"""Tiny models of each architecture: keys come out of llama.cpp as transformers has them of the same file."""

from __future__ import annotations

from pathlib import Path

import gguf as gguf_format
import numpy as np
import pytest

from avp import HuggingFaceConnector

from .test_gguf import CONTEXT, LAYERS, SPECIAL, WIDTH, byte_letters, write_weights

LlamaCppConnector = pytest.importorskip("avp.connectors.llamacpp").LlamaCppConnector


def write_model(path: Path, name: str) -> Path:
    """A model of two layers with random weights, and a tokenizer of bytes."""
    tokens = [*SPECIAL, *byte_letters(), "12"]
    writer = gguf_format.GGUFWriter(path, name)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if name == "qwen2" else "smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    rng = np.random.default_rng(0)
    write_weights(writer, rng, vocabulary=len(tokens))
    if name == "qwen2":
        for layer in range(LAYERS):
            for part, rows in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2)):
                writer.add_tensor(f"blk.{layer}.attn_{part}.bias", rng.normal(0, 0.5, rows).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_kv_is_that_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path))
    path = write_model(tmp_path / "tiny.gguf", name)
    ours = LlamaCppConnector.from_pretrained(path, threads=1, dtype="float32")
    theirs = HuggingFaceConnector.from_pretrained(path)
    assert ours.identity.same_weights(theirs.identity)
    assert ours.identity.same_tokenizer(theirs.identity)
    ids = [3 + 7 * i % 250 for i in range(100)]
    one, other = ours.prefill(ids).segments[0], theirs.prefill(ids).segments[0]
    for layer in range(LAYERS):
        for part in "kv":
            found, wanted = one.read(layer, part).array, other.read(layer, part).array
            assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.999, f"layer {layer}, {part}"
