"""llama.cpp's own tokenizer, and the chat template of its GGUF file, as the renderer and users see them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from jinja2 import Template
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from avp.connectors.gguf_header import Header
from avp.connectors.llamacpp_engine import Engine

_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class LlamaText:
    """Encodes and decodes by llama.cpp; renders by jinja2, in a sandbox: whoever made the file made the template."""

    engine: Engine
    header: Header

    @property
    def chat_template(self) -> str | None:
        """The file's template, or None: a base model."""
        return self.header.text(_TEMPLATE) or None

    @property
    def has_template(self) -> bool:
        """Whether conversations are rendered by a template."""
        return bool(self.chat_template)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text in which special tokens may be spelled out; `special`: with the BOS that the model wants."""
        return self.engine.encode(text, special=special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens have none, and bytes that are no UTF-8 show as U+FFFD."""
        return b"".join(self.piece(token) for token in ids).decode(errors="replace")

    def piece(self, token: int) -> bytes:
        """The bytes of one token; none for a control token."""
        return self.engine.piece(token)

    def vocabulary(self) -> tuple[str, ...]:
        """The tokens as the vocabulary spells them, by id; a few of SentencePiece's llama.cpp shows with spaces."""
        found = (self.engine.spelling(token) for token in range(self.engine.vocabulary))
        if self.header.text("tokenizer.ggml.model") == "llama":
            return tuple(token.replace(" ", "\u2581") for token in found)
        return tuple(found)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a turn."""
        return tuple(token for token in range(self.engine.vocabulary) if self.engine.ends(token))

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None,
        reply: bool,
        variables: Mapping[str, object],
    ) -> str:
        """The conversation by the chat template.

        Raises:
            TemplateError, TypeError, ValueError: the template refuses it, or does what the sandbox forbids.
        """
        given = {**self._special, **variables}
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=reply, **given)
        except (OverflowError, RecursionError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    @cached_property
    def _special(self) -> dict[str, str]:
        """bos_token, eos_token, … as the templates of transformers know them."""
        found: dict[str, str] = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            token = self.header.values.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(token, int):
                found[f"{name}_token"] = self.engine.spelling(token)
        return found

    @cached_property
    def _template(self) -> Template:
        return sandbox().from_string(self.chat_template or "")


def sandbox() -> ImmutableSandboxedEnvironment:
    """The environment in which chat templates are written: blocks trimmed, three functions, nothing of Python's."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    environment.filters["tojson"] = _json
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a prompt wants it: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
