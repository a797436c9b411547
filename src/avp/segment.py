"""Segment: the KV of a run of positions, in pages whose ids follow from token ids alone."""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

from blake3 import blake3

from avp.buffers import Buffer
from avp.errors import UsageError
from avp.shared import SharedTensors

if TYPE_CHECKING:
    from avp.identity import ModelIdentity
    from avp.protocols import StoredSegment, Tensors

PAGE = 32  # positions whose KV has one id
SEGMENT = 8 * PAGE  # positions that travel as one set of tensors
LATENT = -1  # stands for the id of a position that has none
_LENGTH = struct.Struct("<Q").pack


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
        except (KeyError, AttributeError):
            raise UsageError(
                f"{label!r} is no class of exactness. Fix: use one of {', '.join(each.label for each in cls)}."
            ) from None


def worst(classes: Iterable[Exactness]) -> Exactness:
    """The class of something made of parts of these classes."""
    return max(classes, default=Exactness.EXACT)


@dataclass(frozen=True, slots=True)
class Want:
    """Which KV of a page will do: computed by `engine`, held in `dtype`, of class `at_least` or better.

    Below `exact`, engine and dtype do not matter: KV of another engine or dtype is `bounded` to whoever takes it.
    """

    engine: str
    dtype: str
    at_least: Exactness = Exactness.EXACT

    def accepts(self, segment: Segment | StoredSegment) -> bool:
        """Whether `segment` will do."""
        return self.grade(segment) <= self.at_least

    def grade(self, segment: Segment | StoredSegment) -> Exactness:
        """The class that the segment has for this receiver."""
        own = segment.engine == self.engine and segment.dtype == self.dtype
        return segment.exactness if own else worst([segment.exactness, Exactness.BOUNDED])


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The KV of the positions [start, stop), all layers, in pages of 32. `parent` is the id of the page before."""

    start: int
    tokens: tuple[int, ...]
    parent: str
    pages: tuple[str, ...]
    dtype: str
    engine: str  # what computed it: "transformers", "llamacpp", …
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

    def cut(self, start: int, stop: int) -> Segment:
        """The positions [start, stop) of it; `start` is a multiple of 32. A page that lost positions has another id.

        Raises:
            UsageError: the positions are not in it, or a page of latent positions would be divided.
        """
        if start % PAGE or not self.start <= start < stop <= self.stop:
            raise UsageError(
                f"positions {start} to {stop} cannot be cut from a segment of {self.start} to {self.stop}. "
                f"Fix: stay within it, and start at a multiple of {PAGE}."
            )
        if (start, stop) == (self.start, self.stop):
            return self
        first, count = (start - self.start) // PAGE, stop - self.start
        parent = self.pages[first - 1] if first else self.parent
        pages, rest = self.pages[first : -(-count // PAGE)], count % PAGE
        if rest and stop < self.stop:
            run = self.tokens[count - rest : count]
            if LATENT in run:
                raise UsageError(
                    "a page of latent positions has one id and cannot be cut. Fix: cut at a multiple of 32."
                )
            pages = (*pages[:-1], page_id(pages[-2] if len(pages) > 1 else parent, run))
        tensors = _cut(self.tensors, start - self.start, count)
        return replace(
            self,
            start=start,
            tokens=self.tokens[start - self.start : count],
            parent=parent,
            pages=pages,
            tensors=tensors,
        )


def _cut(tensors: Tensors, start: int, stop: int) -> Tensors:
    if isinstance(tensors, SharedTensors):  # stays such: another process can map it
        return replace(tensors, start=tensors.start + start, stop=tensors.start + stop)
    return _Cut(tensors, start, stop)


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """The positions [start, stop) of a segment, counted from its first."""

    whole: Tensors
    start: int
    stop: int

    def read(self, layer: int, part: str) -> Buffer:
        buffer = self.whole.read(layer, part)
        return Buffer(buffer.dtype, buffer.array[:, self.start : self.stop])


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


def page_ids(parent: str, tokens: Sequence[int]) -> tuple[str, ...]:
    """Ids of all pages of `tokens` after `parent`; none of the positions is latent."""
    pages: list[str] = []
    for start in range(0, len(tokens), PAGE):
        parent = page_id(parent, tokens[start : start + PAGE])
        pages.append(parent)
    return tuple(pages)


def _field(data: bytes) -> bytes:
    return _LENGTH(len(data)) + data


def cut_segments(
    model: ModelIdentity,
    tokens: Sequence[int],
    *,
    dtype: str,
    engine: str,
    tensors: Callable[[int, int], Tensors],
    grade: Callable[[int], Exactness],
) -> tuple[Segment, ...]:
    """The segments of `tokens`; `tensors(start, stop)` is their KV, `grade(stop)` the exactness up to `stop`."""
    segments: list[Segment] = []
    parent = root_page(model)
    for start in range(0, len(tokens), SEGMENT):
        run = tuple(tokens[start : start + SEGMENT])
        stop = start + len(run)
        source = tensors(start, stop)
        pages = _pages(model, parent, run, source)
        segments.append(Segment(start, run, parent, pages, dtype, engine, grade(stop), source))
        parent = pages[-1]
    return tuple(segments)


def with_salt(model: ModelIdentity, segments: Iterable[Segment], salt: bytes) -> tuple[Segment, ...]:
    """The same segments, from position 0 on without a gap, with the page ids of the tenant of that salt."""
    parent = root_page(model, salt=salt)
    salted: list[Segment] = []
    for segment in segments:
        if segment.parent == parent:
            salted.append(segment)
        else:
            pages = _pages(model, parent, segment.tokens, segment.tensors)
            salted.append(replace(segment, parent=parent, pages=pages))
        parent = salted[-1].pages[-1]
    return tuple(salted)


def _pages(model: ModelIdentity, parent: str, run: Sequence[int], source: Tensors) -> tuple[str, ...]:
    pages: list[str] = []
    for offset in range(0, len(run), PAGE):
        page = run[offset : offset + PAGE]
        latent = _latent_digest(source, model, page, offset) if LATENT in page else b""
        parent = page_id(parent, page, latent=latent)
        pages.append(parent)
    return tuple(pages)


def _latent_digest(source: Tensors, model: ModelIdentity, page: Sequence[int], offset: int) -> bytes:
    """BLAKE3 over the KV bytes of the page's latent positions, layer by layer, K then V."""
    hasher = blake3()
    rows = [offset + i for i, token in enumerate(page) if token == LATENT]
    for layer in range(len(model.layout.layers)):
        for part in ("k", "v"):
            hasher.update(source.read(layer, part).array[:, rows].tobytes())
    return hasher.digest()
