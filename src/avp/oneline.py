"""The one-line API: pack, unpack, think, generate. Connectors made by name are kept until `clear_cache()`."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from avp import registry
from avp.context import Context, Turn, text_context
from avp.errors import UsageError
from avp.protocols import Prompt
from avp.segment import Exactness

if TYPE_CHECKING:
    from avp.connectors.huggingface import HuggingFaceConnector
    from avp.receipt import Generation


class _Connectors:
    """Connectors by model name, made once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[str, HuggingFaceConnector] = {}

    def get(self, name: str) -> HuggingFaceConnector:
        with self._lock:
            if name not in self._made:
                kind = cast("type[HuggingFaceConnector]", registry.load("avp.connectors", "huggingface"))
                self._made[name] = kind.from_pretrained(name)
            return self._made[name]

    def clear(self) -> None:
        with self._lock:
            self._made.clear()


_CONNECTORS = _Connectors()


def connector(name: str) -> HuggingFaceConnector:
    """The connector of that model name, made at its first use.

    Raises:
        ModelNotFound, UnsupportedCache, MissingExtra: see `HuggingFaceConnector.from_pretrained`.
    """
    return _CONNECTORS.get(name)


def clear_cache() -> None:
    """Forget the connectors made by name; their memory is free when no context uses it any more."""
    _CONNECTORS.clear()


@dataclass(frozen=True, slots=True)
class Message:
    """What `pack` makes: `str` is the text, `bytes` the wire, `context` what both stand for."""

    context: Context

    def __str__(self) -> str:
        return self.context.text

    def __bytes__(self) -> bytes:
        return self.context.to_bytes()

    def __len__(self) -> int:
        return len(bytes(self))


def pack(content: str, *, model: str | None = None, think_steps: int = 0, context: Context | None = None) -> Message:
    """A message for another agent.

    Without a model it is text. With one it carries the model's identity and the token ids. With `think_steps` it
    carries the latent context *and* the text, so that a receiver of other weights can still read it. `context` is what
    came before.

    Raises:
        UsageError: `think_steps` or `context` without a model. Else as `HuggingFaceConnector.think`.
    """
    if model is None:
        if think_steps or context is not None:
            raise UsageError("think_steps and context need a model. Fix: pass model=…")
        return Message(text_context(content))
    engine = connector(model)
    if think_steps:
        return Message(engine.think(content, steps=think_steps, context=context))
    if context is not None:
        return Message(engine.prefill(content, context=context))
    tokens = engine.tokenize(content)
    turns = (Turn({"role": "user", "content": content}),)
    return Message(Context("tokens", engine.identity, tokens, turns=turns, exactness=Exactness.TEXT))


def unpack(
    data: Message | bytes | bytearray | memoryview | str,
    *,
    model: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> str:
    """The text of a message; with a model, what the model says to it, as a `Generation`.

    KV of equal weights goes in; of other weights it is not injected: the model reads the text (or, with an equal
    tokenizer, the ids), and the receipt's mode, class and reasons say so.

    Raises:
        BundleError: bytes that are no bundle. IdentityMismatch: other weights, and no text to fall back to.
    """
    context = _open(data)
    if model is None:
        return context.text
    return connector(model).generate(
        "", context=_open_turn(context), max_new_tokens=max_new_tokens, temperature=temperature, accept="text"
    )


def think(
    prompt: Prompt, *, model: str, steps: int = 20, context: Context | None = None, method: str = "norm"
) -> Context:
    """The context after `prompt` and `steps` latent positions; see `HuggingFaceConnector.think`."""
    return connector(model).think(prompt, steps=steps, context=context, method=method)


def generate(
    prompt: Prompt,
    *,
    model: str,
    context: Context | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    accept: str = "exact",
) -> Generation:
    """Text after `context` and `prompt`; see `HuggingFaceConnector.generate`."""
    return connector(model).generate(
        prompt,
        context=context,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        accept=accept,
    )


def _open(data: Message | bytes | bytearray | memoryview | str) -> Context:
    if isinstance(data, Message):
        return data.context
    return text_context(data) if isinstance(data, str) else Context.from_bytes(data)


def _open_turn(context: Context) -> Context:
    """A context that ends in an assistant's whole turn of text is read as a message: its text becomes the user's."""
    if context.kind == "kv" or not context.turns or context.turns[-1].role == "user":
        return context
    return text_context(context.text)
