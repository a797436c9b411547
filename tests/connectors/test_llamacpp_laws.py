"""The laws of a connector on llama.cpp: SmolLM2, and Gemma-3 beyond its window; the reference is llama.cpp alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from avp.connectors import models
from avp.testing import ConnectorConformance

from .llamacpp_alone import LlamaAlone, changed

LlamaCppConnector = pytest.importorskip("avp.connectors.llamacpp").LlamaCppConnector


class LlamaLaws(ConnectorConformance):
    name = ""

    @classmethod
    @cache
    def _connector(cls) -> LlamaCppConnector:
        return LlamaCppConnector.from_pretrained(cls.name, threads=1)

    @classmethod
    @cache
    def _stranger(cls) -> LlamaCppConnector:
        with TemporaryDirectory() as folder:
            path = changed(models.fetch(cls.name), Path(folder) / "changed.gguf")
            return LlamaCppConnector.from_pretrained(path, threads=1, positions=1024)

    @classmethod
    def teardown_class(cls) -> None:
        cls._connector.cache_clear()
        cls._stranger.cache_clear()

    def connector(self) -> LlamaCppConnector:
        return self._connector()

    def stranger(self) -> LlamaCppConnector:
        return self._stranger()

    def engine(self) -> LlamaAlone:
        return LlamaAlone(models.fetch(self.name))


@pytest.mark.real
class TestSmolLM2(LlamaLaws):
    name = "smollm2"
    first = tuple(range(1000, 1200))
    then = tuple(range(2000, 2020))


@pytest.mark.real
class TestGemma3BeyondItsWindow(LlamaLaws):
    name = "gemma3"
    first = (2, *range(5000, 5560))
    then = tuple(range(7000, 7012))
    new_tokens = 6
