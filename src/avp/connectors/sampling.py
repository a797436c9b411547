"""One call of transformers' `generate` over a run's cache, and the stream of its pieces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import cast

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from avp.connectors.cache import RunCache
from avp.connectors.options import Sampling
from avp.errors import UsageError
from avp.receipt import Generation
from avp.segment import LATENT

_SEEDED = threading.Lock()  # torch has one generator; a seeded run has it alone


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when the first token came; ends the run when `cancelled` is set."""

    def __init__(self, cancelled: threading.Event | None) -> None:
        self.first = 0.0
        self.cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.first = self.first or perf_counter()
        done = self.cancelled is not None and self.cancelled.is_set()
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)


def eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end a turn."""
    found = model.generation_config.eos_token_id
    return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)


def run_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: RunCache,
    ids: Sequence[int],
    vector: torch.Tensor | None,
    sampling: Sampling,
    stream: Stream | None,
) -> tuple[tuple[int, ...], float]:
    """Run `generate` from `cache` to the end of the turn; the new ids, and the clock when the first came.

    `ids` is the whole sequence, of which the cache holds all but the last few; `vector` [1, hidden] stands for the last
    position if that is latent.
    """
    clock = _Clock(stream.cancelled if stream else None)
    given: dict[str, torch.Tensor] = {}
    if vector is None:
        given["input_ids"] = torch.tensor([[0 if i == LATENT else i for i in ids]], device=model.device)
    else:
        before = vector.new_zeros(1, 1, vector.shape[-1]).expand(1, len(ids) - 1, -1)
        given["inputs_embeds"] = torch.cat([before, vector[None]], dim=1)
    with _seeded(sampling.seed):
        output = model.generate(
            **given,
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            past_key_values=cache,
            generation_config=_config(model, sampling),
            stopping_criteria=StoppingCriteriaList([clock]),
            streamer=stream.streamer if stream else None,
            **({"tokenizer": tokenizer} if sampling.stop else {}),
        )
    new = output[0].tolist()
    return tuple(new[len(ids) :] if vector is None else new), clock.first


def _config(model: PreTrainedModel, sampling: Sampling) -> GenerationConfig:
    """All that the model's own generation config would otherwise fill in is set: no penalties, no top-k."""
    eos = list(eos_ids(model)) or None
    pad = model.generation_config.pad_token_id
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=min(sampling.min_new_tokens, sampling.max_new_tokens) or None,
        do_sample=sampling.temperature > 0,
        temperature=drawn.get("temperature", 1.0),
        top_p=drawn.get("top_p", 1.0),
        top_k=0 if sampling.temperature else 50,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=eos,
        pad_token_id=pad if pad is not None else (eos[0] if eos else 0),
        stop_strings=list(sampling.stop) or None,
        use_cache=True,
    )


class _seeded:
    """Seed torch's generator for one run, alone, and put it back as it was; without a seed, nothing."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self.fork = torch.random.fork_rng() if seed is not None else None

    def __enter__(self) -> None:
        if self.seed is not None and self.fork is not None:
            _SEEDED.acquire()
            self.fork.__enter__()
            torch.manual_seed(self.seed)

    def __exit__(self, *problem: object) -> None:
        if self.fork is not None:
            self.fork.__exit__(None, None, None)
            _SEEDED.release()


class Stream:
    """The pieces of a generation as they come; `result` is the whole, after the last. Close it to end the run early."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, run: Callable[[Stream], Generation]) -> None:
        self.cancelled = threading.Event()
        self.streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._run = run
        self._result: Generation | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="avp-stream", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._result = self._run(self)
        except BaseException as error:  # noqa: BLE001 - handed to the reader of the stream, in its own thread
            self._error = error
            self.streamer.end()

    def __iter__(self) -> Iterator[str]:
        for piece in self.streamer:
            if piece:
                yield cast(str, piece)
        self._settle()

    @property
    def result(self) -> Generation:
        """The whole generation; waits for its end.

        Raises:
            what `generate` raises.
        """
        self._settle()
        if self._result is None:
            raise UsageError("the stream ended without a result. Fix: read it before closing it.")
        return self._result

    def close(self) -> None:
        """End the run at its next token and wait for it."""
        self.cancelled.set()
        self._thread.join()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def _settle(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
