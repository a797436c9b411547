"""Context: an immutable piece of model state.

A context stands for the positions `tokens[:len(context)]`, whose KV exists, and the ids `pending` after them, which are
known but not computed: the last sampled token. A latent position has no id; `LATENT` stands in its place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

from avp.errors import UsageError
from avp.segment import Exactness, Segment, worst

if TYPE_CHECKING:
    from avp.buffers import Buffer
    from avp.bundle import Limits
    from avp.identity import ModelIdentity
    from avp.protocols import Message

KINDS = ("kv", "hidden", "tokens", "text")
_NOTHING: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of the conversation.

    `opaque` are the positions [start, stop) of the turn that no text stands for: raw ids (role "raw") or latent steps;
    they come before the message's content.
    """

    message: Message
    opaque: tuple[int, int] | None = None

    @property
    def role(self) -> str:
        """Role of the message; "raw" where ids were given outside any conversation."""
        return str(self.message.get("role", "user"))

    @property
    def content(self) -> str:
        """The message's text; parts that are not text are left out."""
        content = self.message.get("content") or ""
        if isinstance(content, str):
            return content
        parts = content if isinstance(content, Sequence) else ()
        return "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))


@dataclass(frozen=True, eq=False)
class Context:
    """An immutable piece of model state. Made by a connector, by `from_bytes`, or by `load`; never changed after."""

    kind: str
    model: ModelIdentity | None = None
    tokens: tuple[int, ...] = ()
    length: int = 0
    turns: tuple[Turn, ...] = ()
    template: Mapping[str, object] = field(default_factory=lambda: _NOTHING)
    segments: tuple[Segment, ...] = ()
    hidden: Buffer | None = None
    exactness: Exactness = Exactness.EXACT

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        """A context is never nothing, even where no position of it is computed."""
        return True

    def __repr__(self) -> str:
        model = self.model.id if self.model else "no model"
        counts = f"{self.length} positions, {len(self.pending)} pending"
        return f"<Context {self.kind}, {counts}, {model}, {self.exactness.label}>"

    @property
    def pending(self) -> tuple[int, ...]:
        """Ids that follow the last computed position and are not computed yet."""
        return self.tokens[self.length :]

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation; what has no text (raw ids, latent steps) shows as an empty content."""
        return tuple(turn.message for turn in self.turns)

    @cached_property
    def text(self) -> str:
        """What a reader without the model would get: the contents of the messages."""
        return "\n\n".join(turn.content for turn in self.turns if turn.content)

    @property
    def nbytes(self) -> int:
        """Bytes of state a receiver would hold: KV of the segments, or the hidden states; text counts as UTF-8."""
        if self.model is not None and self.segments:
            layout = self.model.layout
            return sum(len(segment) * layout.bytes_per_token(segment.dtype) for segment in self.segments)
        if self.hidden is not None:
            return self.hidden.nbytes
        return len(self.text.encode())

    def __getitem__(self, positions: slice) -> Context:
        """The first n positions, `context[:n]`, as raw ids outside any conversation; nothing is copied.

        Raises:
            UsageError: not a slice from the start, or beyond the end.
        """
        if not isinstance(positions, slice) or positions.start not in (None, 0) or positions.step not in (None, 1):
            raise UsageError("a context can only be cut at its end. Fix: use context[:n].")
        stop = self.length if positions.stop is None else positions.stop
        if not 0 <= stop <= self.length:
            raise UsageError(
                f"position {stop} is outside the context's {self.length}. Fix: use 0 <= n <= len(context)."
            )
        return self if stop == self.length else _cut(self, stop)

    def to_bytes(self, *, codec: str = "raw") -> bytes:
        """The context as one bundle (docs/spec/bundle.md), KV through `codec`.

        Raises:
            UsageError: no such codec, or it does not take this dtype.
        """
        from avp.bundle import pack

        return pack(self, codec=codec)

    def save(self, path: str | os.PathLike[str], *, codec: str = "raw") -> int:
        """Write the bundle to a file, readable by its owner only (it holds the prompt); bytes written. Atomic."""
        from avp.bundle import write

        return write(self, path, codec=codec)

    @classmethod
    def from_bytes(
        cls, data: bytes | bytearray | memoryview, *, limits: Limits | None = None, verify: str = "now"
    ) -> Context:
        """Read a bundle; tensors are views of `data`.

        verify: "now" checks every digest here; "use" checks each tensor before it is first used.

        Raises:
            BundleError: the bytes are not a valid bundle, or exceed the limits; see `avp.errors`.
        """
        from avp.bundle import unpack

        return unpack(data, limits=limits, verify=verify)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, limits: Limits | None = None, verify: str = "use") -> Context:
        """Map a bundle from a file; nothing is copied, or read before use. Raises as `from_bytes`, and OSError."""
        from avp.bundle import load

        return load(path, limits=limits, verify=verify)


def _cut(context: Context, stop: int) -> Context:
    kept = [segment for segment in context.segments if segment.start < stop]
    if kept and kept[-1].stop > stop:
        kept[-1] = kept[-1].cut(kept[-1].start, stop)
    turns = (Turn({"role": "raw", "content": ""}, (0, stop)),) if stop else ()
    return replace(
        context,
        tokens=context.tokens[:stop],
        length=stop,
        turns=turns,
        segments=tuple(kept),
        hidden=None,
        exactness=worst(segment.exactness for segment in kept),
    )


def text_context(content: str, *, role: str = "user") -> Context:
    """A context that is nothing but one message."""
    return Context("text", turns=(Turn({"role": role, "content": content}),), exactness=Exactness.TEXT)
