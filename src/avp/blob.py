"""Blob: a segment in the form in which it travels and is stored, a bundle of kind "segment"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avp import registry
from avp.bundle import (
    encode_segment,
    frame_header,
    header_size,
    make_header,
    peek,
    read,
    read_head,
    to_context,
    to_segment,
    verify_segment,
)
from avp.context import Context
from avp.errors import BundleError, DigestMismatch
from avp.identity import ModelIdentity
from avp.manifest import Limits, Manifest, SegmentEntry, manifest_to_json
from avp.segment import Exactness, Segment
from avp.shared import SharedTensors
from avp.table import Head, header_text, implied_parts, part_bounds


@dataclass(frozen=True, slots=True, eq=False)
class Blob:
    """A segment, its entry in the manifest, and its bytes: `header` and the `tensors` after it, in runs.

    tensors None: they lie raw in shared memory, and nobody has asked for their bytes.
    """

    model: ModelIdentity
    entry: SegmentEntry
    segment: Segment
    header: memoryview
    tensors: tuple[memoryview, ...] | None

    @property
    def runs(self) -> tuple[memoryview, ...]:
        """The runs of bytes whose concatenation is the bundle; none is a copy."""
        if self.tensors is not None:
            return self.header, *self.tensors
        parts = ((layer, part) for layer in range(len(self.model.layout.layers)) for part in ("k", "v"))
        return self.header, *(run for layer, part in parts for run in self.segment.read(layer, part).runs())

    @property
    def nbytes(self) -> int:
        """Bytes of the bundle."""
        if self.tensors is None:
            return len(self.header) + self.entry.count * self.model.layout.bytes_per_token(self.entry.dtype)
        return len(self.header) + sum(map(len, self.tensors))

    def verify(self) -> Blob:
        """Itself, if every digest is right.

        Raises:
            DigestMismatch: the bytes are not those that were written.
        """
        if self.tensors is None and isinstance(self.segment.tensors, SharedTensors):
            _verify_shared(self.segment.tensors, self.entry)
        else:
            verify_segment(self.segment)
        return self


_ANY = Limits(header=2**62, tensors=2**62)


def seal(model: ModelIdentity, segment: Segment, *, codec: str = "raw") -> Blob:
    """The blob of a segment; with the raw codec its runs are views of the segment's own memory. What a lossy codec
    loses is lost to those who read the blob here, too.

    Raises:
        UsageError: no such codec, or it does not take this dtype.
    """
    how = registry.codec(codec)
    if how.name == "raw" and isinstance(segment.tensors, SharedTensors):
        entry = _entry(segment, how.name, segment.tensors.digests)
        return Blob(model, entry, segment, memoryview(_header(model, segment, entry)), None)
    entry, named = encode_segment(segment, len(model.layout.layers), how)
    header = memoryview(make_header(_manifest(model, segment, entry), [(f"0{name}", buffer) for name, buffer in named]))
    runs = tuple(run for _, buffer in named for run in buffer.runs())
    if how.exactness is Exactness.EXACT:
        return Blob(model, entry, segment, header, runs)
    return open_blob(b"".join((header, *runs)), limits=_ANY)


def is_sealed_quickly(segment: Segment, codec: str) -> bool:
    """Whether `seal` has no tensor to look at."""
    return codec == "raw" and isinstance(segment.tensors, SharedTensors) and segment.tensors.hashed


def _entry(segment: Segment, codec: str, digests: bytes) -> SegmentEntry:
    """What the manifest says of a segment whose codec loses nothing."""
    return SegmentEntry(
        segment.start,
        len(segment),
        segment.parent,
        segment.pages,
        codec,
        segment.dtype,
        segment.engine,
        segment.exactness,
        digests,
    )


def _header(model: ModelIdentity, segment: Segment, entry: SegmentEntry) -> bytes:
    """The header of a segment, without a look at its tensors."""
    manifest = _manifest(model, segment, entry)
    names, parts = implied_parts(manifest, _ANY)
    return frame_header(header_text(manifest_to_json(manifest), names, parts, part_bounds(parts)))


def _manifest(model: ModelIdentity, segment: Segment, entry: SegmentEntry) -> Manifest:
    return Manifest("segment", model, segment.tokens, len(segment), (), {}, entry.exactness, (entry,), None)


def open_bundle(data: bytes | bytearray | memoryview, *, limits: Limits, head: Head | None = None) -> Blob | Context:
    """What a whole bundle is: a blob, whose tensors are not checked yet, or a context, all of it checked. `head`: its
    header, if it was read before.

    Raises:
        BundleError: see `avp.bundle.unpack`.
    """
    manifest, segments, hidden = read(data, limits=limits, head=head)
    if manifest.kind != "segment":
        return to_context(manifest, segments, hidden, verify="now")
    if manifest.model is None:
        raise BundleError("a segment names no model. Fix: ask the sender for a valid bundle.")
    view = memoryview(data).toreadonly().cast("B")
    size = header_size(view, limits=limits)
    return Blob(manifest.model, manifest.segments[0], segments[0], view[:size], (view[size:],))


def open_blob(data: bytes | bytearray | memoryview, *, limits: Limits, head: Head | None = None) -> Blob:
    """As `open_bundle`, where only a blob will do."""
    found = open_bundle(data, limits=limits, head=head)
    if isinstance(found, Context):
        raise BundleError(f"a context of kind {found.kind} came where a segment was due. Fix: send segments.")
    return found


def open_shared(header: bytes | memoryview, tensors: SharedTensors, *, limits: Limits) -> Blob:
    """A blob whose header came as bytes and whose tensors lie in shared memory, raw.

    Raises:
        BundleError: the header does not describe those tensors.
    """
    manifest = peek(header, limits=limits)
    if len(header) != header_size(header, limits=limits):
        raise BundleError("bytes follow the header that came with shared memory. Fix: send the header alone.")
    if manifest.kind != "segment" or manifest.model is None:
        raise BundleError("the header that came with shared memory is none of a segment. Fix: send a segment.")
    entry = manifest.segments[0]
    shared = (entry.codec, entry.dtype, manifest.model.layout, entry.count)
    if shared != ("raw", tensors.dtype, tensors.layout, tensors.stop - tensors.start):
        raise BundleError("the header that came with shared memory describes other tensors. Fix: send a valid header.")
    if not tensors.fits:
        raise BundleError("the shared memory is smaller than what it is said to hold. Fix: send all of the arena.")
    segment = to_segment(entry, manifest.tokens, tensors)
    return Blob(manifest.model, entry, segment, memoryview(header).toreadonly(), None)


def _verify_shared(tensors: SharedTensors, entry: SegmentEntry) -> None:
    digests = tensors.hash()
    if digests != entry.digests:
        index = next(i for i in range(0, len(digests), 16) if digests[i : i + 16] != entry.digests[i : i + 16]) // 16
        raise DigestMismatch(
            f"{'V' if index % 2 else 'K'} of layer {index // 2} in shared memory is not what was written "
            "(xxh3-128 differs). Nothing of it was used. Fix: hand the context over again."
        )


class BundleReader:
    """Bundles out of a stream of bytes that comes in pieces of any size; nothing is allocated before it is checked."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._head = bytearray()
        self._memory: memoryview | None = None  # the whole bundle, once its size is known
        self.head: Head | None = None  # of the bundle that came last
        self._filled = 0

    @property
    def idle(self) -> bool:
        """Whether the stream stands between two bundles."""
        return not self._head and self._memory is None

    def feed(self, piece: memoryview) -> tuple[memoryview | None, memoryview]:
        """Take what belongs to the current bundle; the bundle if it is complete now, and the rest of the piece.

        Raises:
            BundleError: the header is not valid, or asks for more than the limits allow.
        """
        if self._memory is None:
            piece = self._read_head(piece)
        if self._memory is None:
            return None, piece
        count = min(len(piece), len(self._memory) - self._filled)
        self._memory[self._filled : self._filled + count] = piece[:count]
        self._filled += count
        if self._filled < len(self._memory):
            return None, piece[count:]
        done, self._memory, self._filled = self._memory, None, 0
        return done, piece[count:]

    def _read_head(self, piece: memoryview) -> memoryview:
        for _ in range(2):  # first the eight bytes of the header's length, then the header
            need = 8 if len(self._head) < 8 else header_size(self._head, limits=self._limits)
            taken = max(need - len(self._head), 0)
            self._head += piece[:taken]
            piece = piece[taken:]
            if len(self._head) < need:
                return piece
        self.head = read_head(self._head, limits=self._limits)
        self._memory = memoryview(np.empty(self.head.total, np.uint8)).cast("B")  # type: ignore[arg-type]
        self._memory[: len(self._head)] = self._head
        self._filled = len(self._head)
        self._head = bytearray()
        return piece
