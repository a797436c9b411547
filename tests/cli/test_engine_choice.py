"""`--engine`: a model of Ollama's in llama.cpp behind `avp serve`, and contexts that come to it from both engines."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from .serving import avp, serving

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
from ..connectors.test_llamacpp_architectures import write_model

PROMPT = "12 and 7. " * 4


@pytest.fixture(scope="module")
def ollama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ollama's folder of models with one that it calls tiny."""
    folder = tmp_path_factory.mktemp("ollama")
    (folder / "blobs").mkdir()
    data = write_model(folder / "tiny.gguf", "llama").read_bytes()
    digest = sha256(data).hexdigest()
    (folder / "blobs" / f"sha256-{digest}").write_bytes(data)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": len(data)}
    manifest = folder / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [layer]}))
    return folder


@pytest.fixture(scope="module")
def url(ollama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    where = f"unix:{tmp_path_factory.mktemp('s')}/a.sock"
    given = ("--engine", "llamacpp", "--model", "ollama:tiny", "--accept", "bounded", "--store", "memory:")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLLAMA_MODELS", str(ollama))
        with serving(*given, "--listen", where):
            yield where


def test_a_model_of_ollama_runs_in_llama_cpp(url: str) -> None:
    told = json.loads(avp("hello", url, "--json").stdout)
    assert (told["engine"], told["dtype"]) == ("llamacpp", "float16")


@pytest.mark.parametrize(("engine", "says"), [("llamacpp", "exact"), ("huggingface", "bounded")])
def test_a_prompt_is_computed_in_the_engine_that_was_asked_for(
    engine: str, says: str, url: str, ollama: Path, tmp_path: Path
) -> None:
    given = ("--engine", engine, "--model", ollama / "tiny.gguf", "--accept", "bounded", "--to", url)
    env = {"AVP_CACHE": str(tmp_path)}
    sent = json.loads(avp("send", *given, "--prompt", f"{engine} {PROMPT}", "--json", env=env).stdout)
    assert sent["receipt"]["mode"] == "kv"
    assert sent["receipt"]["exactness"] == says
    asked = avp("ask", url, "And 3?", "--context", sent["handle"], "--max-new-tokens", "4", "--json")
    assert json.loads(asked.stdout)["receipt"]["mode"] == "kv"


def test_an_engine_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    done = avp("send", "--engine", "abacus", "--model", "x", "--prompt", "1", "--to", f"unix:{tmp_path}/a.sock", ends=2)
    assert "'abacus' is not one of 'huggingface', 'llamacpp'" in done.stderr
