"""A transformers tokenizer, as the renderer sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TransformersText:
    """Encodes and renders by transformers."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text."""
        found = self.tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        return cast(list[int], found)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None,
        reply: bool,
        variables: Mapping[str, object],
    ) -> str:
        """The conversation by the chat template."""
        rendered = self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=reply, tokenize=False, **variables
        )
        return cast(str, rendered)
