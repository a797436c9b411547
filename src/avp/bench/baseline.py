"""The baselines: text, and text with a prefix cache in one process. Nothing of AVP is imported here.

Each turn renders the whole conversation from its text by the chat template. With `reuse`, the engine's own cache keeps
what the new ids have in common with those it holds; without, every turn starts from an empty cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True, slots=True)
class Reply:
    """One turn: its text and ids, and what it cost. `positions` are counted by a hook on the forward pass."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    positions: int
    cached: int
    text_bytes: int
    ttft: float
    seconds: float


@dataclass(slots=True)
class Conversation:
    """A conversation held in one process; `reuse`: by transformers' own cache."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reuse: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    cache: DynamicCache = field(default_factory=DynamicCache)
    held: list[int] = field(default_factory=list)

    def say(self, prompt: str, *, max_new_tokens: int, min_new_tokens: int = 0) -> Reply:
        """Add a user turn and generate the reply, greedily."""
        started = perf_counter()
        self.messages.append({"role": "user", "content": prompt})
        text, ids = self._render()
        if not self.reuse:
            self.cache, self.held = DynamicCache(), []
        same = min(_common(ids, self.held), len(ids) - 1)
        if same < len(self.held):
            self.cache.crop(same - len(self.held))
        clock = _FirstToken()
        with counted(self.model) as counter:
            output = self.model.generate(
                torch.tensor([ids], device=self.model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
                past_key_values=self.cache,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens or None,
                do_sample=False,
                temperature=1.0,
                top_p=1.0,
                top_k=50,
                repetition_penalty=1.0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        new = output[0, len(ids) :].tolist()
        self.held = (ids + new)[: self.cache.get_seq_length()]
        reply = self.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.messages.append({"role": "assistant", "content": reply})
        ended = perf_counter()
        return Reply(
            reply, tuple(new), len(ids), counter.count, same, len(text.encode()), clock.first - started, ended - started
        )

    def _render(self) -> tuple[str, list[int]]:
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
            return text, self.tokenizer(text, add_special_tokens=False)["input_ids"]
        text = "".join(message["content"] for message in self.messages)
        return text, self.tokenizer(text)["input_ids"]


class _FirstToken(StoppingCriteria):  # type: ignore[misc]
    first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.first = self.first or perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[Positions]:
    """Counts the positions of every forward pass inside the block, by a hook."""
    counter = Positions()
    hook = model.base_model.register_forward_pre_hook(counter, with_kwargs=True)
    try:
        yield counter
    finally:
        hook.remove()


class Positions:
    """A forward pre-hook that adds up positions."""

    count = 0

    def __call__(self, module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Add the positions of one pass."""
        given = kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        if isinstance(given, torch.Tensor):
            self.count += given.shape[1]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
