import json
from pathlib import Path

import gguf as gguf_format
import numpy as np
import pytest
import torch
from blake3 import blake3
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as hf_logging

from avp.connectors import gguf, models
from avp.errors import ModelNotFound, UsageError

WIDTH, LAYERS, CONTEXT = 32, 2, 256
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def byte_letters() -> list[str]:
    """The 256 letters in which byte-level BPE spells bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in shown] + [chr(256 + n) for n in range(256 - len(shown))]


def write_gguf(path: Path, *, seed: int = 0, pre: str = "smollm") -> Path:
    """A llama of two layers with random weights, and a tokenizer of bytes with three merges."""
    tokens = [*SPECIAL, *byte_letters(), "12", "Ġ1", "th"]
    writer = gguf_format.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["1 2", "Ġ 1", "t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    write_weights(writer, np.random.default_rng(seed), vocabulary=len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_weights(writer: gguf_format.GGUFWriter, rng: np.random.Generator, *, vocabulary: int) -> None:
    def norm(name: str) -> None:
        writer.add_tensor(name, rng.uniform(0.5, 1.5, WIDTH).astype(np.float32))

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.normal(0, 0.2, (rows, columns)).astype(np.float32)
        kind = gguf_format.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf_format.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", vocabulary, WIDTH)
    norm("output_norm.weight")
    for layer in range(LAYERS):
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
        matrix(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        matrix(f"blk.{layer}.attn_k.weight", WIDTH // 2, WIDTH)
        matrix(f"blk.{layer}.attn_v.weight", WIDTH // 2, WIDTH)
        matrix(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        matrix(f"blk.{layer}.ffn_gate.weight", 2 * WIDTH, WIDTH)
        matrix(f"blk.{layer}.ffn_up.weight", 2 * WIDTH, WIDTH)
        matrix(f"blk.{layer}.ffn_down.weight", WIDTH, 2 * WIDTH)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Path:
    return gguf.convert(tiny, tiny.parent / "hf")


def test_the_checkpoint_gives_the_very_logits_of_the_gguf_file(tiny: Path, checkpoint: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name, dtype=torch.float32)
    ids = torch.arange(3, 103)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.dtype == torch.float32


def test_loading_the_checkpoint_is_silent_and_finds_a_plain_model(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: object = AutoModelForCausalLM.from_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(checkpoint)
    hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    assert capfd.readouterr() == ("", "")
    assert type(model) is LlamaForCausalLM
    assert "quantization_config" not in json.loads((checkpoint / "config.json").read_text())


def test_special_tokens_length_and_template_are_those_of_the_file(checkpoint: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    )
    ends = model.generation_config
    assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id, ends.do_sample) == (1, 2, 2, None)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == CONTEXT
    assert tokenizer.chat_template == TEMPLATE


def test_a_smollm_tokenizer_splits_digits_before_it_merges(checkpoint: Path, tmp_path: Path) -> None:
    text = "the 12 112"
    split = AutoTokenizer.from_pretrained(checkpoint)
    assert split.convert_ids_to_tokens(split(text).input_ids) == ["th", "e", "Ġ", "1", "2", "Ġ", "1", "1", "2"]
    other = write_gguf(tmp_path / "other.gguf", pre="default")
    whole = AutoTokenizer.from_pretrained(gguf.convert(other, tmp_path / "hf"))
    assert whole.convert_ids_to_tokens(whole(text).input_ids) == ["th", "e", "Ġ", "12", "Ġ1", "12"]
    assert split.decode(split(text).input_ids) == whole.decode(whole(text).input_ids) == text


def test_avp_json_names_the_file_that_the_checkpoint_was_made_from(tiny: Path, checkpoint: Path) -> None:
    mark = json.loads((checkpoint / "avp.json").read_text())
    assert mark == {"gguf_blake3": blake3(tiny.read_bytes()).hexdigest(), "gguf_name": "tiny.gguf", "avp": 1}


def test_a_second_conversion_writes_nothing(tiny: Path, checkpoint: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert gguf.convert(tiny, checkpoint) == checkpoint
    assert {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == before


def test_all_files_have_the_rights_that_the_umask_gives(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in checkpoint.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_checkpoint_of_other_bytes_is_replaced_and_leaves_nothing_beside(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    path = write_gguf(tmp_path / "tiny.gguf")
    old = (gguf.convert(path, out) / "avp.json").read_text()
    write_gguf(path, seed=1)
    assert (gguf.convert(path, out) / "avp.json").read_text() != old
    assert {entry.name for entry in tmp_path.iterdir()} == {"tiny.gguf", "hf"}


def test_a_folder_that_is_not_ours_is_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(UsageError, match=r"not overwritten\.\nFix: "):
        gguf.convert(tiny, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_if_another_process_was_faster_its_folder_is_used(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    made: list[int] = []

    def overtake(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("save", total):
            made.append(gguf.convert(tiny, out).stat().st_ino)

    assert gguf.convert(tiny, out, progress=overtake).stat().st_ino == made[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_a_conversion_that_breaks_off_leaves_no_folder(tiny: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("save", total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf.convert(tiny, tmp_path / "hf", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_through_three_stages_without_bars_of_others(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[tuple[str, int]] = []
    size = tiny.stat().st_size
    gguf.convert(tiny, tmp_path / "hf", progress=lambda stage, done, total: heard.append((stage, done)))
    assert heard == [(stage, done) for stage in ("tokenizer", "weights", "save") for done in (0, size)]
    assert capfd.readouterr() == ("", "")
    assert hf_logging.is_progress_bar_enabled()


@pytest.mark.parametrize("keep", [0, 0.0001, 0.0005, 0.02, 0.2, 0.5, 0.99])
def test_a_file_that_is_not_a_whole_gguf_is_refused(tiny: Path, tmp_path: Path, keep: float) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[: int(keep * tiny.stat().st_size)])
    with pytest.raises((UsageError, ModelNotFound), match=r"\nFix: "):
        gguf.convert(broken, tmp_path / "hf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken.gguf"]


def test_a_file_that_is_missing_or_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nothing\.gguf"):
        gguf.convert(tmp_path / "nothing.gguf", tmp_path / "hf")
    (tmp_path / "text.gguf").write_text("a text, not a model")
    with pytest.raises(UsageError, match="does not begin with the bytes GGUF"):
        gguf.convert(tmp_path / "text.gguf", tmp_path / "hf")


REAL = {
    "smollm2": ([504, 3575, 282, 4649, 314, 216, 33, 34], "<|im_end|>", 2, 8192),
    "gemma3": ([2, 818, 5279, 529, 7001, 563, 236743, 236770, 236778], "<eos>", 1, 32768),
}


@pytest.mark.real
@pytest.mark.parametrize("name", sorted(REAL))
def test_the_real_checkpoint_has_the_tokens_ends_and_length_of_its_model(name: str) -> None:
    ids, eos, eos_id, context = REAL[name]
    checkpoint = gguf.convert(models.fetch(name), models.converted(name))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer("The capital of France is 12").input_ids == ids
    assert (tokenizer.eos_token, tokenizer.eos_token_id, model.generation_config.eos_token_id) == (eos, eos_id, eos_id)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == context
    assert (tokenizer.chat_template is not None) == models.BUILTIN[name].chat


@pytest.mark.real
def test_the_real_smollm2_knows_the_capital_of_france() -> None:
    checkpoint = gguf.convert(models.fetch("smollm2"), models.converted("smollm2"))
    model, tokenizer = LlamaForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    continued = model.generate(ids, max_new_tokens=20, do_sample=False)  # type: ignore[misc]
    answer = continued[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
