"""Bundle: the wire and file form of a context. It is a safetensors blob; the manifest lies in its `__metadata__`.

The format is on one page: docs/spec/bundle.md, the twin of this file.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import tempfile
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from types import MappingProxyType

import xxhash

from avp import registry
from avp.buffers import Buffer, from_memory, write_runs
from avp.context import Context
from avp.errors import BundleError, DigestMismatch, LimitExceeded, TruncatedBundle, UsageError
from avp.manifest import HiddenEntry, Limits, Manifest, SegmentEntry, manifest_to_json, parse_json, parse_manifest
from avp.protocols import Codec, Tensors
from avp.segment import Segment, worst
from avp.table import (
    OPENING,
    Head,
    check_table,
    find_codec,
    header_text,
    implied_parts,
    layer_shape,
    part_bounds,
    written_parts,
)

__all__ = ["Limits", "Manifest", "load", "pack", "peek", "unpack", "write"]

_RAISE = "Fix: raise Limits.bytes, or send smaller segments."
_JSON = json.JSONDecoder()
_ALIGN = 64  # the header is padded so that tensors start on a cache line


# --- writing


def pack(context: Context, *, codec: str = "raw") -> bytes:
    """The context as one blob; the KV is copied once, into the result. Raises as `Context.to_bytes`."""
    return b"".join(pack_runs(context, codec=codec))


def pack_runs(context: Context, *, codec: str = "raw") -> tuple[bytes | memoryview, ...]:
    """The same bytes in runs; with the raw codec none of the KV is copied."""
    header, tensors = _lay_out(context, codec)
    return (header, *(run for tensor in tensors for run in tensor.runs()))


def write(context: Context, path: str | os.PathLike[str], *, codec: str = "raw") -> int:
    """The context as a file, mode 0600, by way of a temporary file beside it; returns the bytes written."""
    header, tensors = _lay_out(context, codec)
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(target.parent))
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            size = write_runs(file.fileno(), chain([header], *(tensor.runs() for tensor in tensors)))
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return size


def _lay_out(context: Context, codec_name: str) -> tuple[bytes, list[Buffer]]:
    """The header (length, JSON, padding) and the tensors that follow it."""
    codec = registry.codec(codec_name)
    entries: list[SegmentEntry] = []
    named: list[tuple[str, Buffer]] = []
    layers = len(context.model.layout.layers) if context.model else 0
    for number, segment in enumerate(context.segments):
        entry, tensors = encode_segment(segment, layers, codec)
        entries.append(entry)
        named.extend((f"{number}{name}", buffer) for name, buffer in tensors)
    hidden = None
    if context.hidden is not None:
        hidden = HiddenEntry(context.hidden.dtype, context.hidden.shape, digest_of(context.hidden))
        named.append(("hidden", context.hidden))
    manifest = Manifest(
        context.kind,
        context.model,
        context.tokens,
        context.length,
        context.turns,
        context.template,
        context.exactness,
        tuple(entries),
        hidden,
    )
    return make_header(manifest, named), [buffer for _, buffer in named]


def encode_segment(segment: Segment, layers: int, codec: Codec) -> tuple[SegmentEntry, list[tuple[str, Buffer]]]:
    """A segment through a codec: its entry in the manifest, and its tensors by name, without the segment's number."""
    named: list[tuple[str, Buffer]] = []
    for layer in range(layers):
        for part in ("k", "v"):
            encoded = codec.encode(segment.read(layer, part))
            named.extend((f"/{layer}/{part}{suffix}", buffer) for suffix, buffer in encoded.items())
    entry = SegmentEntry(
        segment.start,
        len(segment),
        segment.parent,
        segment.pages,
        codec.name,
        segment.dtype,
        segment.engine,
        worst([segment.exactness, codec.exactness]),
        b"".join(digest_of(buffer) for _, buffer in named),
    )
    return entry, named


def make_header(manifest: Manifest, named: list[tuple[str, Buffer]]) -> bytes:
    """The first bytes of a bundle: length, JSON, padding."""
    parts = written_parts([buffer for _, buffer in named])
    return frame_header(header_text(manifest_to_json(manifest), [name for name, _ in named], parts, part_bounds(parts)))


def frame_header(header: str) -> bytes:
    """The JSON of a header between its length and its padding."""
    text = header.encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return struct.pack("<Q", len(text)) + text


def digest_of(buffer: Buffer) -> bytes:
    """xxh3-128 of a tensor's bytes."""
    hasher = xxhash.xxh3_128()
    for run in buffer.runs():
        hasher.update(run)
    return hasher.digest()


# --- reading


def peek(head: bytes | memoryview, *, limits: Limits | None = None) -> Manifest:
    """What a bundle says of itself, from its first bytes; the tensors need not be there. Raises as `unpack`."""
    limits = limits or Limits()
    view = memoryview(head).cast("B")
    size = header_size(view, limits=limits)
    return _read_header(view, size, limits)[0]


def tensor_sizes(head: bytes | memoryview, *, limits: Limits | None = None) -> dict[str, int]:
    """Stored bytes of each tensor, by name in file order, from a bundle's first bytes. Raises as `unpack`."""
    limits = limits or Limits()
    view = memoryview(head).cast("B")
    manifest, bounds = _read_header(view, header_size(view, limits=limits), limits)
    names, _ = implied_parts(manifest, limits)
    return {name: end - begin for name, (begin, end) in zip(names, pairwise(bounds), strict=True)}


def header_size(head: bytes | bytearray | memoryview, *, limits: Limits | None = None) -> int:
    """Bytes from the start to the first tensor, told by the first eight.

    Raises:
        TruncatedBundle: fewer than eight bytes. LimitExceeded: a longer header than `limits.header`.
    """
    limits = limits or Limits()
    if len(head) < 8:
        raise TruncatedBundle(
            f"the bundle has {len(head)} bytes; its header's length alone takes 8. Fix: send the whole bundle."
        )
    size = int(struct.unpack("<Q", bytes(head[:8]))[0])
    if size > limits.header:
        raise LimitExceeded(
            f"the header claims {size} bytes; at most {limits.header} are allowed. "
            "Fix: raise Limits.header, or this is no bundle."
        )
    return 8 + size


def unpack(data: bytes | bytearray | memoryview, *, limits: Limits | None = None, verify: str = "now") -> Context:
    """The context in `data`, as views of it.

    verify: "now" checks every digest before returning; "use" checks each tensor before it is first used.

    Raises:
        TruncatedBundle, LimitExceeded, DigestMismatch, UnsupportedBundle, BundleError: see `avp.errors`.
    """
    if verify not in ("now", "use"):
        raise UsageError(f'verify is {verify!r}. Fix: pass "now" or "use".')
    return to_context(*read(data, limits=limits or Limits()), verify=verify)


def to_context(manifest: Manifest, segments: tuple[Segment, ...], hidden: Buffer | None, *, verify: str) -> Context:
    """The context that was read; raises as `unpack`."""
    if manifest.kind == "segment":
        raise BundleError("this is one segment, not a context. Fix: pass what Context.to_bytes or save wrote.")
    if verify == "now":
        for segment in segments:
            verify_segment(segment)
    return Context(
        manifest.kind,
        manifest.model,
        manifest.tokens,
        manifest.length,
        manifest.turns,
        MappingProxyType(dict(manifest.template)),
        segments,
        hidden,
        manifest.exactness,
    )


def read(
    data: bytes | bytearray | memoryview, *, limits: Limits, head: Head | None = None
) -> tuple[Manifest, tuple[Segment, ...], Buffer | None]:
    """What a whole bundle of any kind holds, as views of `data`; tensors are checked at their first use, hidden states
    here. `head`: its header, if it was read before. Raises as `unpack`.
    """
    view = memoryview(data).toreadonly().cast("B")
    if len(view) > limits.bytes:
        raise LimitExceeded(
            f"the bundle has {len(view)} bytes; at most {limits.bytes} are allowed. Fix: raise Limits.bytes."
        )
    if head is None:
        size = header_size(view, limits=limits)
        head = Head(size, *_read_header(view, size, limits))
    size, manifest, bounds = head
    end = bounds[-1]
    if len(view) - size != end:
        error = TruncatedBundle if len(view) - size < end else BundleError
        raise error(
            f"{len(view) - size} bytes of tensors came where the header declares {end}. "
            "Fix: send the whole bundle, and only it."
        )
    return manifest, *_read_tensors(view[size:], manifest, bounds)


def read_head(data: bytes | bytearray | memoryview, *, limits: Limits) -> Head:
    """The header of a bundle, from its first bytes.

    Raises:
        LimitExceeded: the whole has more bytes than `limits.bytes`. Else as `unpack`.
    """
    view = memoryview(data).cast("B")
    size = header_size(view, limits=limits)
    head = Head(size, *_read_header(view, size, limits))
    if head.total > limits.bytes:
        raise LimitExceeded(f"a bundle of {head.total} bytes comes; at most {limits.bytes} are allowed. {_RAISE}")
    return head


def verify_segment(segment: Segment) -> None:
    """Check every digest of a segment that was read from a bundle.

    Raises:
        DigestMismatch: its bytes are not those that were written.
    """
    if isinstance(segment.tensors, _Stored):
        segment.tensors.verify()


def load(path: str | os.PathLike[str], *, limits: Limits | None = None, verify: str = "use") -> Context:
    """The context in a file, mapped; raises as `unpack`, and OSError."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise TruncatedBundle(f"{os.fspath(path)} is empty. Fix: write the whole bundle.")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return unpack(memoryview(mapped), limits=limits, verify=verify)


def _read_header(view: memoryview, size: int, limits: Limits) -> tuple[Manifest, list[int]]:
    """The manifest, and where tensors begin and end: tensor i has the bytes bounds[i] to bounds[i + 1]."""
    if len(view) < size:
        raise TruncatedBundle(f"the bundle has {len(view)} bytes, its header alone {size}. Fix: send the whole bundle.")
    raw = bytes(view[8:size])
    return _read_own(raw, limits) or _read_any(raw, limits)


def _read_own(raw: bytes, limits: Limits) -> tuple[Manifest, list[int]] | None:
    """The short way: a header that is, byte for byte, what this writer makes of its manifest. Else None."""
    if not raw.startswith(OPENING.encode() + b'"'):
        return None
    try:
        text = raw.decode()
        manifest_text, _ = _JSON.raw_decode(text, len(OPENING))
    except ValueError:
        return None
    manifest = _manifest(manifest_text, limits)
    names, parts = implied_parts(manifest, limits)
    if len(parts) > limits.tensors or any(part.shape is None for part in parts):
        return None
    bounds = part_bounds(parts)
    same = header_text(manifest_text, names, parts, bounds) == text.rstrip(" ")
    return (manifest, bounds) if same else None


def _read_any(raw: bytes, limits: Limits) -> tuple[Manifest, list[int]]:
    if not raw.startswith(b"{"):
        raise BundleError('the header does not begin with "{". Fix: pass what Context.to_bytes or save wrote.')
    table = parse_json(raw, limits)
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != "avp" or not isinstance(metadata.get("avp"), str):
        raise BundleError(
            "this is no AVP bundle: its __metadata__ holds no manifest. Fix: pass what Context.to_bytes or save wrote."
        )
    if len(metadata) != 2:
        raise BundleError(
            f"__metadata__ holds more than avp and format: {str(sorted(metadata))[:200]}. "
            "Fix: pass what Context.to_bytes or save wrote."
        )
    if len(table) > limits.tensors:
        raise LimitExceeded(
            f"the bundle holds {len(table)} tensors; at most {limits.tensors} are allowed. Fix: raise Limits.tensors."
        )
    manifest = _manifest(metadata["avp"], limits)
    return manifest, check_table(table, manifest, limits)


def _manifest(text: str, limits: Limits) -> Manifest:
    return parse_manifest(parse_json(text.encode(errors="surrogatepass"), limits), limits)


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    """The tensors of one segment in a bundle: bytes bounds[i] to bounds[i + 1] of `data`, K then V, layer by layer."""

    data: memoryview
    codec: Codec
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bounds: list[int]
    digests: bytes
    checked: set[int] = field(default_factory=set)

    def read(self, layer: int, part: str) -> Buffer:
        shape = self.shapes[layer]
        forms = self.codec.parts(self.dtype, shape)
        first = (2 * layer + (part == "v")) * len(forms)
        parts: dict[str, Buffer] = {}
        for index, (suffix, (dtype, form)) in enumerate(forms.items(), first):
            memory = self._checked(index)
            parts[suffix] = from_memory(memory, dtype=dtype, shape=(len(memory),) if form is None else form)
        return self.codec.decode(parts, self.dtype, shape)

    def verify(self) -> None:
        """Check every digest."""
        for index in range(len(self.bounds) - 1):
            self._checked(index)

    def _checked(self, index: int) -> memoryview:
        begin, end = self.bounds[index : index + 2]
        memory = self.data[begin:end]
        if index not in self.checked:
            _check_digest(memory, self.digests[16 * index : 16 * index + 16])
            self.checked.add(index)
        return memory


def _check_digest(memory: memoryview, digest: bytes) -> None:
    if xxhash.xxh3_128_digest(memory) != digest:
        raise DigestMismatch(
            f"{len(memory)} bytes of a tensor are not those that were written (xxh3-128 differs). "
            "Nothing of them was used. Fix: fetch the bundle again."
        )


def _read_tensors(data: memoryview, manifest: Manifest, bounds: list[int]) -> tuple[tuple[Segment, ...], Buffer | None]:
    layers = manifest.model.layout.layers if manifest.model else ()
    segments: list[Segment] = []
    first = 0
    for entry in manifest.segments:
        codec = find_codec(entry.codec)
        shapes = tuple([layer_shape(layer, entry.count) for layer in layers])
        count = len(entry.digests) // 16
        stored = _Stored(data, codec, entry.dtype, shapes, bounds[first : first + count + 1], entry.digests)
        start = 0 if manifest.kind == "segment" else entry.start
        segments.append(to_segment(entry, manifest.tokens[start : start + entry.count], stored))
        first += count
    return tuple(segments), _hidden(data[bounds[first] :], manifest)


def to_segment(entry: SegmentEntry, tokens: tuple[int, ...], tensors: Tensors) -> Segment:
    """The segment that an entry of a manifest describes."""
    return Segment(entry.start, tokens, entry.parent, entry.pages, entry.dtype, entry.engine, entry.exactness, tensors)


def _hidden(memory: memoryview, manifest: Manifest) -> Buffer | None:
    if manifest.hidden is None:
        return None
    _check_digest(memory, manifest.hidden.digest)
    return from_memory(memory, dtype=manifest.hidden.dtype, shape=manifest.hidden.shape)
