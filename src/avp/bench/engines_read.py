"""Engines as the benchmark of engines reads them: logits at every position, and greedy continuations.

transformers and llama.cpp are read through `score` of their connectors, with an ear at the logits that it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from avp.bench.engines_task import Floats, best
from avp.connectors.huggingface import HuggingFaceConnector
from avp.context import Context
from avp.protocols import Connector, Prompt
from avp.receipt import Generation

Judged = tuple[Context, tuple[int, ...]]  # a context, and ids that follow it


class Reader(Protocol):
    """An engine. `connector` is what hands over; contexts that are read may come from other engines."""

    @property
    def connector(self) -> Connector:
        """The engine's connector."""
        ...

    @property
    def drafted(self) -> bool:
        """Whether `greedy` uses drafts."""
        ...

    @property
    def loads(self) -> Sequence[int]:
        """Positions that the engine says it took from each of the last contexts; empty where it takes them whole."""
        ...

    def own(self, context: Context) -> Context:
        """A context that this engine made, as it is before any hand-over."""
        ...

    def logits(self, items: Sequence[Judged], folder: Path) -> Iterable[Floats]:
        """For each item the logits after each of its ids, [ids, vocabulary]; files may be put into `folder`."""
        ...

    def greedy(self, items: Sequence[Judged], *, count: int, drafts: Sequence[Sequence[int]]) -> list[list[int]]:
        """For each item the `count` likeliest tokens, one after the other; ends of a turn are passed over. A draft is a
        guess of them, and changes nothing but the time.
        """
        ...

    def plain(self, item: Judged, *, count: int) -> list[int]:
        """The same by `generate`, without a draft."""
        ...


class Scoring(Connector, Protocol):
    """A connector that scores, and can put off the end of a turn."""

    def score(self, ids: Sequence[int], *, context: Context | None = None) -> object:
        """Log-probabilities; what counts here is that the logits are computed."""
        ...

    def generate(
        self,
        prompt: Prompt = "",
        *,
        context: Context | None = None,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        accept: str = "exact",
    ) -> Generation:
        """As every connector's; no end of a turn before `min_new_tokens`."""
        ...


@dataclass(slots=True)
class Ear:
    """Rows of logits as an engine computes them."""

    rows: list[Floats] = field(default_factory=list)

    def hear(self, rows: Floats) -> None:
        """Keep [n, vocabulary]."""
        self.rows.append(rows)


@dataclass(frozen=True, slots=True)
class ScoreReader:
    """An engine whose connector scores; `ends` are the tokens that end a turn. drafted: whether it says the same of
    ids that are computed together and of ids that are computed one by one.
    """

    connector: Scoring
    ear: Ear
    ends: tuple[int, ...]
    drafted: bool = True
    loads: tuple[int, ...] = ()

    def own(self, context: Context) -> Context:
        """See `Reader`: it is in the engine."""
        return context

    def logits(self, items: Sequence[Judged], folder: Path) -> Iterable[Floats]:
        """See `Reader`; one item at a time."""
        for context, ids in items:
            yield self._after(context, [*ids, 0])

    def greedy(self, items: Sequence[Judged], *, count: int, drafts: Sequence[Sequence[int]]) -> list[list[int]]:
        """See `Reader`. A draft is computed in one pass; up to its first token that is not the likeliest, and with what
        is likeliest there, it is what a greedy run writes. The rest is generated.
        """
        found: list[list[int]] = []
        for number, (context, ids) in enumerate(items):
            draft = list(drafts[number]) if self.drafted and number < len(drafts) else []
            good = self._checked(context, ids, draft) if draft else []
            rest = self.plain((context, (*ids, *good)), count=count - len(good)) if len(good) < count else []
            found.append([*good, *rest])
        return found

    def plain(self, item: Judged, *, count: int) -> list[int]:
        """See `Reader`."""
        context, ids = item
        made = self.connector.generate(list(ids), context=context, max_new_tokens=count, min_new_tokens=count)
        return list(made.tokens)

    def _checked(self, context: Context, ids: Sequence[int], draft: Sequence[int]) -> list[int]:
        rows = self._after(context, [*ids, *draft])[len(ids) - 1 :].copy()
        rows[:, list(self.ends)] = -np.inf
        likely = best(rows)
        wrong = next((i for i, token in enumerate(draft) if token != likely[i]), len(draft))
        return likely[: wrong + 1]

    def _after(self, context: Context, ids: Sequence[int]) -> Floats:
        """Logits after each of `ids` but the last: `score` begins a position earlier and ends before the last id."""
        self.ear.rows.clear()
        self.connector.score(list(ids), context=context)
        return np.concatenate(self.ear.rows)[-(len(ids) - 1) :]


def transformers_reader(model: str) -> ScoreReader:
    """transformers in float32."""
    connector = HuggingFaceConnector.from_pretrained(model, dtype="float32")
    ear = Ear()

    def hear(module: PreTrainedModel, given: object, output: _Output) -> None:
        ear.hear(output.logits[0].float().numpy())

    connector.model.register_forward_hook(hear)
    settings = connector.model.generation_config
    ends = settings.eos_token_id if settings is not None else None
    return ScoreReader(connector, ear, tuple(ends) if isinstance(ends, list) else (ends,) if ends is not None else ())


class _Output(Protocol):
    logits: torch.Tensor


def llamacpp_reader(model: str) -> ScoreReader:
    """llama.cpp, its cache in float16."""
    from avp.connectors.llamacpp import POSITIONS, SEQUENCES, LlamaCppConnector
    from avp.connectors.llamacpp_engine import Engine
    from avp.connectors.llamacpp_model import open_model

    ear = Ear()

    class Heard(Engine):  # the library's logits are gone after the next batch, and the connector gives none away
        def logits(self, index: int = -1) -> Floats:
            """As the engine's, heard where `score` asks for one position after the other."""
            rows = super().logits(index)
            if index >= 0:
                ear.hear(rows[None].copy())
            return rows

    opened = open_model(model)
    engine = Heard(
        opened.path,
        positions=min(POSITIONS, opened.positions),
        sequences=SEQUENCES,
        cache="float16",
        threads=torch.get_num_threads(),
    )
    connector = LlamaCppConnector(opened, engine)
    floats = opened.header.values.get("general.file_type") == 0
    return ScoreReader(connector, ear, tuple(connector.tokenizer.ends), drafted=floats)
