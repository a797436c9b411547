"""The laws of a connector on real transformers models: tiny random ones, SmolLM2 and Gemma-3-270M."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from avp.connectors.huggingface import HuggingFaceConnector
from avp.testing import ConnectorConformance
from avp.testing.tiny import FAMILIES, tiny_connector


class TransformersAlone:
    """One sequence in transformers' own cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.ids: list[int] = []

    def run(self, ids: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
        self.ids += list(ids)
        given = torch.tensor([self.ids])
        if not max_new_tokens:
            with torch.no_grad():
                self.model(given, past_key_values=self.cache)
            return ()
        output = self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            past_key_values=self.cache,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=False,
        )
        new = output[0, len(self.ids) :].tolist()
        self.ids += new
        return tuple(new)


@cache
def tiny(family: str, seed: int, dtype: torch.dtype, attention: str) -> HuggingFaceConnector:
    return tiny_connector(family, seed=seed, dtype=dtype, attention=attention)


@pytest.fixture(
    params=[
        *((family, torch.float32, "sdpa") for family in FAMILIES),
        *((family, torch.bfloat16, "sdpa") for family in FAMILIES),
        ("llama", torch.float32, "eager"),
        ("gemma3", torch.float32, "eager"),
    ],
    ids=lambda param: f"{param[0]}-{str(param[1]).removeprefix('torch.')}-{param[2]}",
    scope="class",
)
def kind(request: pytest.FixtureRequest) -> None:
    request.cls.kind = request.param


@pytest.mark.usefixtures("kind")
class TestTinyModels(ConnectorConformance):
    kind: tuple[str, torch.dtype, str]

    def connector(self) -> HuggingFaceConnector:
        family, dtype, attention = self.kind
        return tiny(family, 0, dtype, attention)

    def stranger(self) -> HuggingFaceConnector:
        family, dtype, attention = self.kind
        return tiny(family, 1, dtype, attention)

    def engine(self) -> TransformersAlone:
        return TransformersAlone(self.connector().model)


class RealLaws(ConnectorConformance):
    """The laws on a model that people use."""

    name = ""

    @classmethod
    @cache
    def _connector(cls) -> HuggingFaceConnector:
        return HuggingFaceConnector.from_pretrained(cls.name)

    @classmethod
    @cache
    def _stranger(cls) -> HuggingFaceConnector:
        base = cls._connector()
        model = copy.deepcopy(base.model)
        with torch.no_grad():
            model.base_model.layers[1].mlp.down_proj.weight.mul_(1.01)
        return HuggingFaceConnector(model, base.tokenizer, name=f"{cls.name}, one matrix changed")

    @classmethod
    def teardown_class(cls) -> None:
        cls._connector.cache_clear()
        cls._stranger.cache_clear()

    def connector(self) -> HuggingFaceConnector:
        return self._connector()

    def stranger(self) -> HuggingFaceConnector:
        return self._stranger()

    def engine(self) -> TransformersAlone:
        return TransformersAlone(self.connector().model)


@pytest.mark.real
class TestSmolLM2(RealLaws):
    name = "smollm2"
    first = tuple(range(1000, 1200))
    then = tuple(range(2000, 2020))


@pytest.mark.real
class TestGemma3BeyondItsWindow(RealLaws):
    name = "gemma3"
    first = (2, *range(5000, 5740))
    then = tuple(range(7000, 7012))
    new_tokens = 6
