"""Delta: what of a context the other end lacks, cut into segments to send; and a context again out of segments.

The sender names a context by its tokens (an `Outline`); both ends know its page ids from that, so that asking what is
there costs no KV. Only pages of latent positions, which have no ids to tell them by, are named by the sender.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import xxhash

from avp import registry
from avp.blob import Blob, is_sealed_quickly, seal
from avp.buffers import STORAGE
from avp.context import Context, Turn
from avp.errors import BundleError, UsageError
from avp.handshake import Agreement, Hello
from avp.identity import ModelIdentity, canonical_json
from avp.protocols import Event, Store
from avp.security import Tenant
from avp.segment import LATENT, PAGE, Exactness, Segment, Want, page_ids, root_page, with_salt, worst
from avp.telemetry import span

Ranges = tuple[tuple[int, int], ...]  # of pages: [start, stop)
_ASK = "Fix: ask the sender for a valid hand-over."


@dataclass(frozen=True, slots=True)
class Grade:
    """What the KV from page `page` on is: its class, what computed it, and what it is held in."""

    page: int
    exactness: Exactness
    engine: str
    dtype: str


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """A context without its KV: `skeleton` has all but segments, `pages` their ids, `grades` what they are, `count` how
    many token ids the context has, even where only its text is told.
    """

    skeleton: Context
    pages: tuple[str, ...]
    grades: tuple[Grade, ...]
    count: int = 0

    def grade(self, page: int) -> Grade:
        """What the page of that number is."""
        return [grade for grade in self.grades if grade.page <= page][-1]

    def wants(self, least: Exactness) -> list[tuple[int, int, Want]]:
        """For each run of pages, [start, stop), which KV is as good as the sender's own, sent at class `least`."""
        stops = [grade.page for grade in self.grades[1:]] + [len(self.pages)]
        return [
            (grade.page, stop, Want(grade.engine, grade.dtype, worst([least, grade.exactness])))
            for grade, stop in zip(self.grades, stops, strict=False)
        ]

    def nbytes(self, ranges: Ranges) -> int:
        """Bytes of KV that these pages are."""
        model = self.skeleton.model
        if model is None:
            return 0
        width = {grade.dtype: model.layout.bytes_per_token(grade.dtype) for grade in self.grades}
        return sum(
            (min(stop * PAGE, len(self.skeleton)) - start * PAGE) * width[grade.dtype]
            for grade, start, stop in self._runs(ranges)
        )

    def _runs(self, ranges: Ranges) -> list[tuple[Grade, int, int]]:
        """The ranges, divided where the grade changes."""
        stops = [grade.page for grade in self.grades[1:]] + [len(self.pages)]
        return [
            (grade, max(start, grade.page), min(stop, end))
            for grade, end in zip(self.grades, stops, strict=False)
            for start, stop in ranges
            if max(start, grade.page) < min(stop, end)
        ]


def outline(context: Context, mode: str, *, salt: bytes) -> tuple[Outline, tuple[Segment, ...]]:
    """What is told of a context in a hand-over of that mode, and its segments with the tenant's page ids.

    Raises:
        UsageError: KV is missing, or the context has nothing to send in this mode.
    """
    if mode != "kv":
        return Outline(_without_kv(context, mode), (), (), len(context.tokens)), ()
    if context.model is None or sum(map(len, context.segments)) != len(context):
        raise UsageError("the context lacks some of its KV. Fix: fetch the missing segments first.")
    segments = with_salt(context.model, context.segments, salt)
    pages = tuple(page for segment in segments for page in segment.pages)
    return Outline(replace(context, segments=()), pages, _grades_of(segments), len(context.tokens)), segments


def _grades_of(segments: Sequence[Segment]) -> tuple[Grade, ...]:
    grades: list[Grade] = []
    for each in segments:
        grade = Grade(each.start // PAGE, each.exactness, each.engine, each.dtype)
        if not grades or replace(grade, page=grades[-1].page) != grades[-1]:
            grades.append(grade)
    return tuple(grades)


def origin(context: Context) -> tuple[str, str]:
    """Engine and dtype of a context's KV; "mixed" where its segments differ."""
    engines = {segment.engine for segment in context.segments}
    dtypes = {segment.dtype for segment in context.segments}
    engine = engines.pop() if len(engines) == 1 else "mixed" if engines else ""
    return engine, dtypes.pop() if len(dtypes) == 1 else ""


def sender_of(hello: Hello, context: Context) -> Hello:
    """What an agent says of itself when it hands over that context: it may be of another model or engine."""
    engine, dtype = origin(context)
    return replace(hello, model=context.model, engine=engine, dtype=dtype, modes=sendable(context))


def sendable(context: Context) -> tuple[str, ...]:
    """The modes in which a context can be sent at all."""
    modes: tuple[str, ...] = ("kv", "translated", "projected") if context.kind == "kv" else ()
    if context.model is not None and context.tokens and LATENT not in context.tokens:
        modes = (*modes, "tokens")
    return (*modes, "text") if context.text else modes


def _without_kv(context: Context, mode: str) -> Context:
    if mode == "tokens" and LATENT not in context.tokens:
        return replace(context, kind="tokens", length=0, segments=(), hidden=None, exactness=Exactness.TEXT)
    turns = tuple(Turn(turn.message) for turn in context.turns if turn.content)
    if not turns:
        raise UsageError("the context holds no text to hand over. Fix: give it to an agent of equal weights.")
    return Context("text", turns=turns, template=context.template, exactness=Exactness.TEXT)


# --- an outline as it travels


def outline_to_items(given: Outline) -> tuple[Event, Context]:
    """The event and the context that tell an outline; page ids only where tokens do not tell them."""
    latent = LATENT in given.skeleton.tokens[: len(given.skeleton)]
    event: Mapping[str, object] = {
        "pages": list(given.pages) if latent else None,
        "grades": [[each.page, each.exactness.label, each.engine, each.dtype] for each in given.grades],
        "tokens": given.count,
        "digest": _digest(given.skeleton),
    }
    return event, given.skeleton


def _digest(skeleton: Context) -> str:
    """xxh3-128 of all that is told of a context and that neither page ids nor digests of tensors cover."""
    named = 0 if LATENT in skeleton.tokens else len(skeleton)  # positions whose ids the page ids cover
    turns = [[dict(turn.message), turn.opaque and list(turn.opaque)] for turn in skeleton.turns]
    told = [turns, dict(skeleton.template), list(skeleton.tokens[named:]), len(skeleton)]
    return xxhash.xxh3_128_hexdigest(canonical_json(told).encode())


def outline_from_items(event: Event, skeleton: object, *, salt: bytes) -> Outline:
    """The outline that came.

    Raises:
        BundleError: it contradicts itself.
    """
    if not isinstance(skeleton, Context) or skeleton.segments:
        raise BundleError(f"an outline came without its context, or with KV in it. {_ASK}")
    known = event.get("tokens")
    if type(known) is not int or known < 0 or (skeleton.kind != "text" and known != len(skeleton.tokens)):
        raise BundleError(f"an outline does not say of how many tokens it is, or of other ones. {_ASK}")
    if event.get("digest") != _digest(skeleton):
        raise BundleError(f"an outline came whose messages or ids are not those that were sent. {_ASK}")
    if skeleton.kind != "kv" or skeleton.model is None:
        return Outline(skeleton, (), (), known)
    tokens = skeleton.tokens[: len(skeleton)]
    count = -(-len(tokens) // PAGE)
    if LATENT in tokens:
        pages = _given_pages(event.get("pages"), count)
    else:
        pages = page_ids(root_page(skeleton.model, salt=salt), tokens)
    return Outline(skeleton, pages, _grades(event.get("grades"), count), known)


def check_outline(given: Outline, sender: Hello, agreement: Agreement) -> None:
    """Whether what was announced is what the sender's hello and the agreement let expect.

    Raises:
        BundleError: another kind, or other weights.
    """
    skeleton = given.skeleton
    if skeleton.kind != agreement.mode:
        raise BundleError(
            f"a context of kind {skeleton.kind} came where {agreement.mode} was agreed. Fix: shake hands again."
        )
    if skeleton.model is not None and (sender.model is None or not skeleton.model.same_weights(sender.model)):
        raise BundleError("a context of other weights came than the handshake named. Fix: shake hands again.")


def _given_pages(value: object, count: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) != count or not all(map(_is_page, value)):
        raise BundleError(f"an outline with latent positions has not {count} page ids. {_ASK}")
    return tuple(value)


def _is_page(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _grades(value: object, count: int) -> tuple[Grade, ...]:
    grades = [_grade(item) for item in value] if isinstance(value, list) else []
    starts = [grade.page for grade in grades]
    if count and (starts != sorted(set(starts)) or starts[:1] != [0] or starts[-1] >= count):
        raise BundleError(f"an outline's grades do not begin at page 0, or go back, or go too far. {_ASK}")
    return tuple(grades) if count else ()


def _grade(item: object) -> Grade:
    if not isinstance(item, list) or [type(each) for each in item] != [int, str, str, str] or item[3] not in STORAGE:
        raise BundleError(f"an outline's grades are not each a page, a class, an engine and a dtype. {_ASK}")
    return Grade(item[0], Exactness.parse(item[1]), item[2], item[3])


# --- what is missing, and what to send


def missing(given: Outline, store: Store, *, tenant: str, least: Exactness) -> Ranges:
    """The pages that the store lacks, of class `least` or as good as the sender's own."""
    here: list[bool] = []
    for start, stop, want in given.wants(least):
        here += store.have(given.pages[start:stop], tenant=tenant, want=want)
    return to_ranges(index for index, found in enumerate(here) if not found)


def to_ranges(indices: Iterable[int]) -> Ranges:
    """Ascending numbers as ranges [start, stop)."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)


def pages_of(ranges: Ranges) -> list[int]:
    """The numbers in the ranges."""
    return [index for start, stop in ranges for index in range(start, stop)]


def ranges_from_json(value: object, count: int) -> Ranges:
    """Ranges that came over a wire, within [0, count).

    Raises:
        BundleError: they are none.
    """
    ranges: list[tuple[int, int]] = []
    stop = 0
    for item in value if isinstance(value, list) else [None]:
        if not isinstance(item, list) or len(item) != 2 or {type(each) for each in item} != {int}:
            raise BundleError(f"ranges of pages came that are no pairs of numbers. {_ASK}")
        if not stop <= item[0] < item[1] <= count:
            raise BundleError(f"pages {item[0]} to {item[1]} were asked for, of {count}, after {stop}. {_ASK}")
        ranges.append((item[0], item[1]))
        stop = item[1]
    return tuple(ranges)


def pieces(segments: Sequence[Segment], ranges: Ranges) -> list[Segment]:
    """The pages of these ranges, cut out of the segments, in order; nothing is copied."""
    found: list[Segment] = []
    for segment in segments:
        for start, stop in ranges:
            first = max(start * PAGE, segment.start)
            last = min(stop * PAGE, segment.stop)
            if first < last:
                found.append(segment.cut(first, last))
    return found


# --- and back


def check_piece(blob: Blob, given: Outline, *, least: Exactness) -> None:
    """Whether a blob that came is one of the outline's.

    Raises:
        BundleError: other weights, pages or dtype, or of a worse class than agreed.
    """
    model, segment = given.skeleton.model, blob.segment
    first = segment.start // PAGE
    if model is None or not blob.model.same_weights(model):
        raise BundleError(f"a segment of other weights came. {_ASK}")
    if segment.pages != given.pages[first : first + len(segment.pages)]:
        raise BundleError(f"the segment at position {segment.start} is none of this context. {_ASK}")
    if first and segment.parent != given.pages[first - 1]:
        raise BundleError(f"the segment at position {segment.start} follows another page. {_ASK}")
    last = min((first + len(segment.pages)) * PAGE, len(given.skeleton))
    if segment.tokens != given.skeleton.tokens[segment.start : last]:
        raise BundleError(f"the segment at position {segment.start} is of other tokens. {_ASK}")
    grade = given.grade(first)
    exactness = worst([segment.exactness, registry.codec(blob.entry.codec).exactness])  # whatever it claims
    own = (segment.engine, segment.dtype) == (grade.engine, grade.dtype)
    if not own or exactness > worst([least, grade.exactness]):
        raise BundleError(f"the segment at position {segment.start} is of another engine, dtype or class. {_ASK}")


def assemble(given: Outline, find: Callable[[str, Want], Blob], *, least: Exactness) -> Context:
    """The whole context, out of the blobs that `find` gives by page id.

    Raises:
        SegmentMissing: what `find` raises.
    """
    skeleton = given.skeleton
    segments: list[Segment] = []
    for start, stop, want in given.wants(least):
        index = start
        while index < stop:
            segment = find(given.pages[index], want).segment
            offset = segment.pages.index(given.pages[index])
            count = _equal(segment.pages[offset:], given.pages[index:stop])
            first = segment.start + offset * PAGE
            last = min(segment.start + (offset + count) * PAGE, segment.stop)
            segments.append(segment.cut(first, last))
            index += count
    exactness = worst([skeleton.exactness, *(segment.exactness for segment in segments)])
    return replace(skeleton, segments=tuple(segments), exactness=exactness)


def _equal(one: Sequence[str], other: Sequence[str]) -> int:
    """How many ids two runs of pages begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def store_new(store: Store, context: Context, tenant: Tenant) -> None:
    """Keep what a store lacks of a context, under a tenant's page ids.

    Raises:
        StoreFailed: it could not be kept.
    """
    if context.kind != "kv" or not context.segments or context.model is None:
        return
    given, segments = outline(context, "kv", salt=tenant.salt)
    lacking = missing(given, store, tenant=tenant.name, least=Exactness.EXACT)
    for segment in pieces(segments, lacking):
        store.put(seal(context.model, segment), tenant=tenant.name)


async def sealed(model: ModelIdentity, segments: list[Segment], codec: str) -> AsyncGenerator[Blob]:
    """The blobs of segments, in order; the next one is made while this one is used."""
    ahead: asyncio.Task[Blob] | None = None
    try:
        for segment in [*segments, None]:
            done, ahead = ahead, None
            if segment is not None:
                ahead = asyncio.create_task(_sealing(model, segment, codec))
            if done is not None:
                yield await done
    finally:
        if ahead is not None:
            await asyncio.gather(ahead, return_exceptions=True)


async def _sealing(model: ModelIdentity, segment: Segment, codec: str) -> Blob:
    if is_sealed_quickly(segment, codec):  # sooner than a thread takes it up
        return _seal(model, segment, codec)
    return await asyncio.to_thread(_seal, model, segment, codec)


def _seal(model: ModelIdentity, segment: Segment, codec: str) -> Blob:
    with span("seal", start=segment.start):
        return seal(model, segment, codec=codec)
