"""A checkpoint's identity without a model in memory is the one that transformers' connector gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import avp
from avp.connectors.vllm_identity import checkpoint_identity
from avp.testing.tiny import tiny_model, tiny_tokenizer


def save(folder: Path, kind: str, dtype: torch.dtype) -> Path:
    model = tiny_model(kind).to(dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_that_of_a_loaded_model(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = save(tmp_path / "one", kind, dtype)
    ours = checkpoint_identity(folder, name="x")
    other = shutil.copytree(folder, tmp_path / "two", ignore=shutil.ignore_patterns(".avp*"))
    theirs = avp.HuggingFaceConnector.from_pretrained(other).identity
    assert ours.same_weights(theirs)
    assert ours.same_tokenizer(theirs)
    assert ours.family == theirs.family


def test_float32_weights_of_a_float16_config_are_rounded_as_transformers_does(tmp_path: Path) -> None:
    folder = save(tmp_path / "one", "llama", torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    other = shutil.copytree(folder, tmp_path / "two")
    theirs = avp.HuggingFaceConnector.from_pretrained(other).identity
    assert checkpoint_identity(folder, name="x").same_weights(theirs)


def test_it_is_noted_beside_the_checkpoint_and_follows_its_values(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama", torch.float32)
    first = checkpoint_identity(folder, name="x")
    assert (folder / ".avp-fingerprint.json").is_file()
    assert checkpoint_identity(folder, name="y").weights == first.weights
    tiny_model("llama", seed=5).save_pretrained(folder)
    assert checkpoint_identity(folder, name="x").weights != first.weights


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(avp.ModelNotFound, match="holds no checkpoint"):
        checkpoint_identity(tmp_path, name="x")


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama", torch.float32)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(avp.UnsupportedCache, match="an adapter lies in"):
        checkpoint_identity(folder, name="x")


def test_weights_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama", torch.float32)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(avp.ModelNotFound, match="cannot be read"):
        checkpoint_identity(folder, name="x")
