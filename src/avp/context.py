"""Context: an immutable piece of model state, and the segments it is made of.

A context stands for the positions `tokens[:len(context)]`, whose KV exists, and the ids `pending` after them, which are
known but not computed: the last sampled token. A latent position has no id; `LATENT` stands in its place.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

from blake3 import blake3

from avp.buffers import Buffer
from avp.errors import UsageError

if TYPE_CHECKING:
    from avp.bundle import Limits
    from avp.identity import ModelIdentity
    from avp.protocols import Message, Tensors

PAGE = 32  # positions whose KV has one id
SEGMENT = 8 * PAGE  # positions that travel as one set of tensors
LATENT = -1  # stands in `tokens` where a position has no id
KINDS = ("kv", "hidden", "tokens", "text")
_LENGTH = struct.Struct("<Q").pack
_NOTHING: Mapping[str, object] = MappingProxyType({})


class Exactness(IntEnum):
    """What the receiver has of the sender's state; the smaller, the better. `max` of two is the class of both."""

    EXACT = 0  # the same KV bytes: continues token for token as the sender would
    BOUNDED = 1  # lossy, with a measured record
    APPROXIMATE = 2  # no bound: latent steps, projection, translation
    TEXT = 3  # text or token ids only

    @property
    def label(self) -> str:
        """Name on the wire and on the screen."""
        return self.name.lower()

    @classmethod
    def parse(cls, label: str) -> Exactness:
        """The class of that name.

        Raises:
            UsageError: there is none.
        """
        try:
            return cls[label.upper()]
        except KeyError:
            raise UsageError(
                f"{label!r} is no class of exactness. Fix: use one of {', '.join(each.label for each in cls)}."
            ) from None


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


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The KV of the positions [start, stop), all layers, in pages of 32."""

    start: int
    tokens: tuple[int, ...]
    pages: tuple[str, ...]
    dtype: str
    exactness: Exactness
    tensors: Tensors

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def stop(self) -> int:
        """Position after the last one."""
        return self.start + len(self.tokens)

    def read(self, layer: int, part: str) -> Buffer:
        """K (`part` "k") or V ("v") of a layer, [kv_heads, len(self), head_dim]; raises `DigestMismatch`."""
        return self.tensors.read(layer, part)


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


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """The first `stop` positions of a segment."""

    whole: Tensors
    stop: int

    def read(self, layer: int, part: str) -> Buffer:
        buffer = self.whole.read(layer, part)
        return Buffer(buffer.dtype, buffer.array[:, : self.stop])


def _cut(context: Context, stop: int) -> Context:
    kept = [segment for segment in context.segments if segment.start < stop]
    if kept and kept[-1].stop > stop:
        kept[-1] = _shorten(context, kept, stop)
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


def _shorten(context: Context, kept: Sequence[Segment], stop: int) -> Segment:
    """The last of `kept` up to position `stop`; a page that lost positions has another id."""
    *before, last = kept
    count = stop - last.start
    pages, rest = last.pages[: -(-count // PAGE)], count % PAGE
    if rest:
        run = last.tokens[count - rest : count]
        if LATENT in run:
            raise UsageError("a page of latent positions has one id and cannot be cut. Fix: cut at a multiple of 32.")
        pages = (*pages[:-1], page_id(_parent_page(context, (*before, replace(last, pages=pages))), run))
    return replace(last, tokens=last.tokens[:count], pages=pages, tensors=_Cut(last.tensors, count))


def _parent_page(context: Context, segments: Sequence[Segment]) -> str:
    """Id of the page before the last one of `segments`."""
    last = segments[-1]
    if len(last.pages) > 1:
        return last.pages[-2]
    if len(segments) > 1 and segments[-2].stop == last.start:
        return segments[-2].pages[-1]
    if last.start == 0 and context.model is not None:
        return root_page(context.model)
    raise UsageError(
        f"the segment before position {last.start} is missing, and with it the page id that the cut page's id is made "
        "of. Fix: cut at a multiple of 32, or fetch the segment."
    )


def root_page(model: ModelIdentity, *, salt: bytes = b"") -> str:
    """The parent of a context's first page: BLAKE3 of the tenant's salt, the weights and the cache layout."""
    return blake3(
        b"avp-page-1\0" + _field(salt) + _field(model.weights.encode()) + _field(model.layout.digest.encode())
    ).hexdigest()


def page_id(parent: str, tokens: Sequence[int], *, latent: bytes = b"") -> str:
    """Id of a page: BLAKE3 of its parent's id, its token ids and, for positions without id, the digest of their KV."""
    numbers = array("q", tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    ids = numbers.tobytes()
    return blake3(b"".join((bytes.fromhex(parent), _LENGTH(len(ids)), ids, _LENGTH(len(latent)), latent))).hexdigest()


def _field(data: bytes) -> bytes:
    return _LENGTH(len(data)) + data


def cut_segments(
    model: ModelIdentity,
    tokens: Sequence[int],
    *,
    dtype: str,
    tensors: Callable[[int, int], Tensors],
    grade: Callable[[int], Exactness],
) -> tuple[Segment, ...]:
    """The segments of `tokens`; `tensors(start, stop)` is their KV, `grade(stop)` the exactness up to `stop`."""
    segments: list[Segment] = []
    parent = root_page(model)
    for start in range(0, len(tokens), SEGMENT):
        run = tuple(tokens[start : start + SEGMENT])
        source = tensors(start, start + len(run))
        pages: list[str] = []
        for offset in range(0, len(run), PAGE):
            page = run[offset : offset + PAGE]
            latent = _latent_digest(source, model, page, offset) if LATENT in page else b""
            parent = page_id(parent, page, latent=latent)
            pages.append(parent)
        segments.append(Segment(start, run, tuple(pages), dtype, grade(start + len(run)), source))
    return tuple(segments)


def _latent_digest(source: Tensors, model: ModelIdentity, page: Sequence[int], offset: int) -> bytes:
    """BLAKE3 over the KV bytes of the page's latent positions, layer by layer, K then V."""
    hasher = blake3()
    rows = [offset + i for i, token in enumerate(page) if token == LATENT]
    for layer in range(len(model.layout.layers)):
        for part in ("k", "v"):
            hasher.update(source.read(layer, part).array[:, rows].tobytes())
    return hasher.digest()


def worst(classes: Iterable[Exactness]) -> Exactness:
    """The class of something made of parts of these classes."""
    return max(classes, default=Exactness.EXACT)


def text_context(content: str, *, role: str = "user") -> Context:
    """A context that is nothing but one message."""
    return Context("text", turns=(Turn({"role": role, "content": content}),), exactness=Exactness.TEXT)
