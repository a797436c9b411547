"""Which model it is: what the fingerprint of a checkpoint sees, and what other weights may do with a context."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from avp.connectors.huggingface import HuggingFaceConnector
from avp.errors import IdentityMismatch, ModelNotFound, UsageError
from avp.segment import Exactness
from avp.testing.tiny import tiny_connector, tiny_model, tiny_tokenizer

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
