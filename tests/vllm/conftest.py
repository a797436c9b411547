from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

import avp
from avp.connectors import loading

from .engines import ANSWER, POSITIONS, PROMPT, offline


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python of vLLM's environment; `make test-vllm` names it."""
    found = os.environ.get("AVP_VLLM_PYTHON", "")
    if not found:
        pytest.skip("vLLM's environment is not named: run `make test-vllm`")
    return found


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2's folder, float32 safetensors."""
    folder = loading.resolve("smollm2")
    assert isinstance(folder, Path)
    return folder


@pytest.fixture(scope="session")
def transformer(model: Path) -> avp.HuggingFaceConnector:
    return avp.HuggingFaceConnector.from_pretrained(model, dtype="float32")


@pytest.fixture(scope="session")
def prose(transformer: avp.HuggingFaceConnector) -> tuple[int, ...]:
    """The ids of a text that does not change: 2,000 of them."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = tuple(transformer.tokenizer(text)["input_ids"][:2000])
    assert len(ids) == 2000
    return ids


@dataclass(frozen=True)
class Plain:
    """What vLLM without the plug-in says: an answer to PROMPT, and its next token after each of POSITIONS."""

    answer: tuple[int, ...]
    following: tuple[int, ...]


@pytest.fixture(scope="session")
def plain(vllm_python: str, model: Path, prose: tuple[int, ...], tmp_path_factory: pytest.TempPathFactory) -> Plain:
    with offline(vllm_python, model, None, tmp_path_factory.mktemp("plain") / "log") as engine:
        answer = engine.generate(prose[PROMPT], count=ANSWER)[0].ids
        engine.generate(prose[: POSITIONS.stop])
        said = engine.generate(*(prose[:end] for end in POSITIONS))
    return Plain(answer, tuple(each.ids[0] for each in said))
