"""Names to GGUF files, Ollama's folder, and what a file says of its cache; needs no llama.cpp."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import MappingProxyType

import pytest
from blake3 import blake3

from avp.connectors import models
from avp.connectors.gguf_header import Header, Place, Scalar, read_header
from avp.connectors.llamacpp_model import cache_layout, ollama_blob, open_model
from avp.errors import ModelNotFound, UnsupportedCache, UsageError

from .test_gguf import write_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def pull(folder: Path, blob: bytes, *, name: str = "registry.ollama.ai/library/tiny", tag: str = "latest") -> Path:
    """Lay a model out as `ollama pull` does."""
    digest = hashlib.sha256(blob).hexdigest()
    manifest = folder / "manifests" / name / tag
    manifest.parent.mkdir(parents=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + 64 * "0", "size": 3},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": len(blob)},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    (folder / "blobs").mkdir(exist_ok=True)
    path = folder / "blobs" / f"sha256-{digest}"
    path.write_bytes(blob)
    return path


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    return tmp_path


def test_a_pulled_model_is_found_by_its_name(ollama: Path, tiny: Path) -> None:
    path = pull(ollama, tiny.read_bytes())
    found = open_model("ollama:tiny")
    assert (found.path, found.weights) == (path, blake3(tiny.read_bytes()).hexdigest())
    assert (found.title, found.family, found.positions) == ("ollama:tiny", "llama", 256)


@pytest.mark.parametrize(
    ("name", "place", "tag"),
    [
        ("tiny:q4", "registry.ollama.ai/library/tiny", "q4"),
        ("me/tiny", "registry.ollama.ai/me/tiny", "latest"),
        ("hf.co/me/tiny:Q8_0", "hf.co/me/tiny", "Q8_0"),
    ],
)
def test_a_name_may_say_tag_user_and_host(ollama: Path, name: str, place: str, tag: str) -> None:
    path = pull(ollama, b"GGUF", name=place, tag=tag)
    assert ollama_blob(name) == path


def test_a_model_that_was_not_pulled_is_missing_and_the_fix_says_how(ollama: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no model 'llama3'.*Fix: `ollama pull llama3`, or set OLLAMA_MODELS"):
        ollama_blob("llama3")


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "a/b/c/d", "a b", "x:..", "/tiny"])
def test_a_name_that_leaves_the_folder_is_refused(ollama: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match="is no name of an Ollama model"):
        ollama_blob(name)


def test_a_model_that_is_not_whole_is_refused(ollama: Path) -> None:
    path = pull(ollama, b"GGUF and more")
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match="is not whole"):
        ollama_blob("tiny")
    path.unlink()
    with pytest.raises(ModelNotFound, match="is not whole"):
        ollama_blob("tiny")


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"layers": []}', '{"layers": [{"mediaType": "x"}]}', '{"layers": [3]}', "\x00"]
)
def test_a_manifest_that_names_no_model_is_refused(ollama: Path, manifest: str) -> None:
    pull(ollama, b"GGUF")
    (ollama / "manifests/registry.ollama.ai/library/tiny/latest").write_text(manifest)
    with pytest.raises(ModelNotFound, match="names no model"):
        ollama_blob("tiny")


def test_a_digest_that_leaves_the_folder_is_refused(ollama: Path) -> None:
    pull(ollama, b"GGUF")
    manifest = ollama / "manifests/registry.ollama.ai/library/tiny/latest"
    said = json.loads(manifest.read_text())
    said["layers"][1]["digest"] = "sha256:../../secret"
    manifest.write_text(json.dumps(said))
    with pytest.raises(ModelNotFound, match="is not whole"):
        ollama_blob("tiny")


def test_a_name_that_is_nothing_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no built-in \(smollm2, gemma3\) and no file.*Fix:"):
        open_model(tmp_path / "missing.gguf")


@pytest.mark.parametrize("size", [0, 3, 23, 24, 60, 500])
def test_a_file_that_breaks_off_is_refused(tiny: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(tiny.read_bytes()[:size])
    with pytest.raises(UsageError, match=r"is not a GGUF file.*\nFix: get it again"):
        read_header(path)


def test_the_tokenizer_is_named_by_what_turns_text_into_ids(tiny: Path, tmp_path: Path) -> None:
    same = read_header(write_gguf(tmp_path / "other-weights.gguf", seed=5))
    other = read_header(write_gguf(tmp_path / "other-rules.gguf", pre="default"))
    assert read_header(tiny).tokenizer == same.tokenizer != other.tokenizer


def header(name: str = "llama", tensors: tuple[str, ...] = (), **changes: Scalar | tuple[Scalar, ...]) -> Header:
    values: dict[str, Scalar | tuple[Scalar, ...]] = {
        "block_count": 6,
        "embedding_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.freq_base": 10000.0,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    named = {f"{name}.{key}": value for key, value in values.items()}
    places = {each: Place((8,), 0, 0) for each in tensors}
    factors = "f" * 64 if tensors else ""
    return Header(
        MappingProxyType({"general.architecture": name, **named}), MappingProxyType(places), "t" * 64, factors
    )


def test_heads_and_dims_follow_from_the_file() -> None:
    layer = cache_layout(header()).layers[0]
    assert (layer.kv_heads, layer.head_dim, layer.window, layer.scale) == (2, 16, 0, 0.0)
    assert cache_layout(header(attention__key_length=32, attention__value_length=32)).layers[0].head_dim == 32


def test_gemma_slides_in_five_of_six_layers_with_a_rotation_of_their_own() -> None:
    layers = cache_layout(header("gemma3", attention__sliding_window=512, rope__freq_base=1e6)).layers
    assert [layer.window for layer in layers] == [512] * 5 + [0]
    assert '"rope_theta":10000.0' in layers[0].rope
    assert '"rope_theta":1000000.0' in layers[5].rope
    assert layers[0].scale == 0.25
    pattern = (True, False, True, False, False, False)
    listed = header("gemma3", attention__sliding_window=8, attention__sliding_window_pattern=pattern)
    assert [bool(layer.window) for layer in cache_layout(listed).layers] == list(pattern)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (header("mamba"), "keeps the cache of mamba"),
        (header("deepseek2"), "keeps the cache of deepseek2"),
        (header(attention__value_length=8), "unequal length"),
        (header(rope__dimension_count=8), "rotates a part of each key"),
        (header(rope__scaling__type="yarn"), "scales its rotary positions by 'yarn'"),
        (header("gemma3", block_count=62), "Gemma-3-27B"),
    ],
)
def test_what_the_layout_could_not_say_is_refused(said: Header, why: str) -> None:
    with pytest.raises(UnsupportedCache, match=why + r".*Fix:"):
        cache_layout(said)


def test_factors_on_the_rotation_change_the_layout() -> None:
    assert cache_layout(header(tensors=("rope_freqs.weight",))) != cache_layout(header())


def test_a_file_that_does_not_say_its_heads_is_refused() -> None:
    with pytest.raises(UsageError, match=r"does not say llama.attention.head_count, or not as one number"):
        cache_layout(header(attention__head_count=(4, 4)))


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_layout_and_tokenizer_are_those_that_transformers_has_of_the_same_file(name: str) -> None:
    from avp.connectors.huggingface import HuggingFaceConnector

    theirs = HuggingFaceConnector.from_pretrained(name).identity
    ours = open_model(models.fetch(name))
    assert ours.layout == theirs.layout
    assert (ours.weights, ours.header.tokenizer) == (theirs.weights, theirs.tokenizer)


def test_a_converted_file_has_one_identity_in_both_engines(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from avp.connectors.huggingface import HuggingFaceConnector

    monkeypatch.setenv("AVP_CACHE", str(tiny.parent / "cache"))
    theirs = HuggingFaceConnector.from_pretrained(tiny).identity
    ours = open_model(tiny)
    assert ours.layout == theirs.layout
    assert (ours.weights, ours.header.tokenizer) == (theirs.weights, theirs.tokenizer)
