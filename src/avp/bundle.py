"""Bundle: the wire and file form of a context. It is a safetensors blob; the manifest lies in its `__metadata__`.

The format is on one page: docs/spec/bundle.md, the twin of this file.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import xxhash

from avp import registry
from avp.buffers import Buffer, from_memory, itemsize
from avp.context import Context, Segment, worst
from avp.errors import BundleError, DigestMismatch, LimitExceeded, TruncatedBundle, UnsupportedBundle, UsageError
from avp.manifest import HiddenEntry, Limits, Manifest, SegmentEntry, manifest_to_json, parse_json, parse_manifest
from avp.identity import LayerLayout
from avp.protocols import Codec

__all__ = ["Limits", "Manifest", "load", "pack", "peek", "unpack", "write"]

_CODES: Mapping[str, str] = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8"})
_ALIGN = 64  # the header is padded so that tensors start on a cache line
_ASK = "Fix: ask the sender for a valid bundle."


# --- writing


def pack(context: Context, *, codec: str = "raw") -> bytes:
    """The context as one blob; the KV is copied once, into the result. Raises as `Context.to_bytes`."""
    header, tensors = _lay_out(context, codec)
    return b"".join([header, *(run for tensor in tensors for run in tensor.runs())])


def write(context: Context, path: str | os.PathLike[str], *, codec: str = "raw") -> int:
    """The context as a file, mode 0600, by way of a temporary file beside it; returns the bytes written."""
    header, tensors = _lay_out(context, codec)
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            size = file.write(header)
            for tensor in tensors:
                for run in tensor.runs():
                    _write_all(file.fileno(), run)
                    size += len(run)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return size


def _write_all(fd: int, run: memoryview) -> None:
    while run:
        run = run[os.write(fd, run) :]


def _lay_out(context: Context, codec_name: str) -> tuple[bytes, list[Buffer]]:
    """The header (length, JSON, padding) and the tensors that follow it."""
    codec = registry.codec(codec_name)
    entries: list[SegmentEntry] = []
    named: list[tuple[str, Buffer]] = []
    layers = len(context.model.layout.layers) if context.model else 0
    for number, segment in enumerate(context.segments):
        digests: list[bytes] = []
        for layer in range(layers):
            for part in ("k", "v"):
                encoded = codec.encode(segment.read(layer, part))
                named.extend((f"{number}/{layer}/{part}{suffix}", buffer) for suffix, buffer in encoded.items())
                digests.extend(_digest(buffer) for buffer in encoded.values())
        entries.append(
            SegmentEntry(
                segment.start,
                len(segment),
                segment.pages,
                codec.name,
                segment.dtype,
                worst([segment.exactness, codec.exactness]),
                b"".join(digests),
            )
        )
    hidden = None
    if context.hidden is not None:
        hidden = HiddenEntry(context.hidden.dtype, context.hidden.shape, _digest(context.hidden))
        named.append(("hidden", context.hidden))
    return _header(manifest_to_json(context, entries, hidden), named), [buffer for _, buffer in named]


def _header(manifest: str, named: list[tuple[str, Buffer]]) -> bytes:
    parts = [_part("", buffer.dtype, buffer.shape, 0) for _, buffer in named]
    bounds = list(accumulate([part.size for part in parts], initial=0))
    text = _header_text(manifest, [name for name, _ in named], parts, bounds).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return struct.pack("<Q", len(text)) + text


_OPENING = '{"__metadata__":{"avp":'


def _header_text(manifest: str, names: list[str], parts: list[_Part], bounds: list[int]) -> str:
    """The JSON of a header, as this writer writes it: one spelling for one content."""
    rows = [
        f'"{name}":{{{part.text},"data_offsets":[{begin},{end}]}}'
        for name, part, begin, end in zip(names, parts, bounds, bounds[1:], strict=False)
    ]
    opening = _OPENING + json.dumps(manifest, ensure_ascii=False) + ',"format":"avp"}'
    return ",".join([opening, *rows]) + "}"


def _digest(buffer: Buffer) -> bytes:
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


def header_size(head: bytes | memoryview, *, limits: Limits | None = None) -> int:
    """Bytes from the start to the first tensor, told by the first eight.

    Raises:
        TruncatedBundle: fewer than eight bytes. LimitExceeded: a longer header than `limits.header`.
    """
    limits = limits or Limits()
    if len(head) < 8:
        raise TruncatedBundle(f"the bundle has {len(head)} bytes; its header's length alone takes 8. Fix: send the whole bundle.")
    size = int(struct.unpack("<Q", bytes(head[:8]))[0])
    if size > limits.header:
        raise LimitExceeded(
            f"the header claims {size} bytes; at most {limits.header} are allowed. Fix: raise Limits.header, or this is no bundle."
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
    limits = limits or Limits()
    view = memoryview(data).toreadonly().cast("B")
    if len(view) > limits.bytes:
        raise LimitExceeded(f"the bundle has {len(view)} bytes; at most {limits.bytes} are allowed. Fix: raise Limits.bytes.")
    size = header_size(view, limits=limits)
    manifest, bounds = _read_header(view, size, limits)
    end = bounds[-1]
    if len(view) - size != end:
        error = TruncatedBundle if len(view) - size < end else BundleError
        raise error(f"{len(view) - size} bytes of tensors came where the header declares {end}. Fix: send the whole bundle, and only it.")
    context, sources = _to_context(view[size:], manifest, bounds)
    if verify == "now":
        for source in sources:
            source.verify()
    return context


def load(path: str | os.PathLike[str], *, limits: Limits | None = None, verify: str = "use") -> Context:
    """The context in a file, mapped; raises as `unpack`, and OSError."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise TruncatedBundle(f"{os.fspath(path)} is empty. Fix: write the whole bundle.")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return unpack(memoryview(mapped), limits=limits, verify=verify)


class _Part(NamedTuple):
    """One tensor as the manifest implies it: `name` within its segment, and its dtype and shape.

    Shape None: bytes of any length, that decode to `logical` bytes. `text` is dtype and shape as the header spells them.
    """

    name: str
    code: str
    shape: list[int] | None
    size: int
    logical: int
    text: str


def _read_header(view: memoryview, size: int, limits: Limits) -> tuple[Manifest, list[int]]:
    """The manifest, and where tensors begin and end: tensor i has the bytes bounds[i] to bounds[i + 1]."""
    if len(view) < size:
        raise TruncatedBundle(f"the bundle has {len(view)} bytes, its header alone {size}. Fix: send the whole bundle.")
    raw = bytes(view[8:size])
    return _read_own(raw, limits) or _read_any(raw, limits)


def _read_own(raw: bytes, limits: Limits) -> tuple[Manifest, list[int]] | None:
    """The short way: a header that is, byte for byte, what this writer makes of its manifest needs no parsing. Else None."""
    opening = _OPENING.encode()
    if not raw.startswith(opening + b'"'):
        return None
    try:
        text = raw.decode()
        manifest_text, _ = json.JSONDecoder().raw_decode(text, len(_OPENING))
    except ValueError:
        return None
    manifest = parse_manifest(parse_json(manifest_text.encode(errors="surrogatepass"), limits), limits)
    names, parts = _expected(manifest, limits)
    if len(parts) > limits.tensors or any(part.shape is None for part in parts):
        return None
    bounds = list(accumulate([part.size for part in parts], initial=0))
    same = _header_text(manifest_text, names, parts, bounds) == text.rstrip(" ")
    return (manifest, bounds) if same else None


def _read_any(raw: bytes, limits: Limits) -> tuple[Manifest, list[int]]:
    table = parse_json(raw, limits)
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != "avp" or not isinstance(metadata.get("avp"), str):
        raise BundleError("this is no AVP bundle: its __metadata__ holds no manifest. Fix: pass what Context.to_bytes or save wrote.")
    if len(table) > limits.tensors:
        raise LimitExceeded(f"the bundle holds {len(table)} tensors; at most {limits.tensors} are allowed. Fix: raise Limits.tensors.")
    manifest = parse_manifest(parse_json(metadata["avp"].encode(errors="surrogatepass"), limits), limits)
    return manifest, _check_table(table, manifest, limits)


def _check_table(table: dict[str, object], manifest: Manifest, limits: Limits) -> list[int]:
    """The bounds of the tensors, if the table is just what the manifest implies: names, order, dtypes, shapes, no gaps."""
    names, parts = _expected(manifest, limits)
    if list(table) != names:
        wrong = next(pair for pair in zip_longest(names, table) if pair[0] != pair[1])
        raise BundleError(f"the manifest implies tensor {wrong[0]} where the header has {str(wrong[1])[:80]}. {_ASK}")
    entries = list(table.values())
    for index, part in enumerate(parts):
        if part.shape is None:
            parts[index] = _sized(names[index], part, entries[index], limits)
    bounds = list(accumulate([part.size for part in parts], initial=0))
    implied = [
        {"dtype": part.code, "shape": part.shape, "data_offsets": [begin, end]}
        for part, begin, end in zip(parts, bounds, bounds[1:], strict=False)
    ]
    if entries != implied:
        index = next(i for i, entry in enumerate(entries) if entry != implied[i])
        raise BundleError(f"tensor {names[index]} is declared as {str(entries[index])[:120]} but must be {implied[index]}. {_ASK}")
    return bounds


def _sized(name: str, part: _Part, entry: object, limits: Limits) -> _Part:
    """A part of free length, with the length that its entry declares."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not (isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and 0 <= shape[0] < 2**40):
        raise BundleError(f"tensor {name} is declared as {str(entry)[:120]} but must be bytes in one dimension. {_ASK}")
    if part.logical > limits.ratio * shape[0]:
        raise LimitExceeded(
            f"tensor {name} would expand from {shape[0]} to {part.logical} bytes, more than {limits.ratio} times. "
            "Fix: raise Limits.ratio if the sender is trusted."
        )
    return part._replace(shape=shape, size=shape[0])


def _expected(manifest: Manifest, limits: Limits) -> tuple[list[str], list[_Part]]:
    """Names and forms of the tensors, in file order."""
    layers = manifest.model.layout.layers if manifest.model else ()
    if 2 * len(layers) * len(manifest.segments) > limits.tensors:
        raise LimitExceeded(f"the manifest declares more than {limits.tensors} tensors. Fix: raise Limits.tensors.")
    names: list[str] = []
    parts: list[_Part] = []
    forms: dict[tuple[str, str, int], list[_Part]] = {}
    for number, entry in enumerate(manifest.segments):
        key = (entry.codec, entry.dtype, entry.count)
        if key not in forms:
            forms[key] = _segment_parts(_codec(entry.codec), entry, layers)
        names += [f"{number}{part.name}" for part in forms[key]]
        parts += forms[key]
    if manifest.hidden is not None:
        names.append("hidden")
        parts.append(_part("", manifest.hidden.dtype, manifest.hidden.shape, 0))
    return names, parts


def _segment_parts(codec: Codec, entry: SegmentEntry, layers: tuple[LayerLayout, ...]) -> list[_Part]:
    """The tensors of a segment, in file order."""
    parts: list[_Part] = []
    for index, layer in enumerate(layers):
        shape = (layer.kv_heads, entry.count, layer.head_dim)
        logical = prod(shape) * itemsize(entry.dtype)
        try:
            form = codec.parts(entry.dtype, shape)
        except UsageError as error:
            raise BundleError(f"codec {codec.name} does not take {entry.dtype}. {_ASK}") from error
        for letter in ("k", "v"):
            parts += [_part(f"/{index}/{letter}{suffix}", dtype, size, logical) for suffix, (dtype, size) in form.items()]
    return parts


def _part(name: str, dtype: str, shape: tuple[int, ...] | None, logical: int) -> _Part:
    size = 0 if shape is None else prod(shape) * itemsize(dtype)
    text = f'"dtype":"{_CODES[dtype]}","shape":[{",".join(map(str, shape or ()))}]'
    return _Part(name, _CODES[dtype], None if shape is None else list(shape), size, logical, text)


def _codec(name: str) -> Codec:
    try:
        return registry.codec(name)
    except UsageError as error:
        raise UnsupportedBundle(f"the bundle is written with the unknown codec {name[:80]!r}. Fix: install what brings it, or ask for raw.") from error


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    """The tensors of one segment in a bundle: the bytes bounds[i] to bounds[i + 1] of `data`, K then V, layer by layer."""

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
            f"{len(memory)} bytes of a tensor are not those that were written (xxh3-128 differs). Nothing of them was used. "
            "Fix: fetch the bundle again."
        )


def _to_context(data: memoryview, manifest: Manifest, bounds: list[int]) -> tuple[Context, list[_Stored]]:
    layers = manifest.model.layout.layers if manifest.model else ()
    segments: list[Segment] = []
    sources: list[_Stored] = []
    first = 0
    for entry in manifest.segments:
        codec = _codec(entry.codec)
        shapes = tuple([(layer.kv_heads, entry.count, layer.head_dim) for layer in layers])
        count = 2 * len(layers) * len(codec.parts(entry.dtype, shapes[0]))
        if len(entry.digests) != 16 * count:
            raise BundleError(f"the segment at position {entry.start} has not one digest of 16 bytes for each of its {count} tensors. {_ASK}")
        stored = _Stored(data, codec, entry.dtype, shapes, bounds[first : first + count + 1], entry.digests)
        sources.append(stored)
        tokens = manifest.tokens[entry.start : entry.start + entry.count]
        segments.append(Segment(entry.start, tokens, entry.pages, entry.dtype, entry.exactness, stored))
        first += count
    context = Context(
        manifest.kind,
        manifest.model,
        manifest.tokens,
        manifest.length,
        manifest.turns,
        MappingProxyType(dict(manifest.template)),
        tuple(segments),
        _hidden(data[bounds[first] :], manifest),
        manifest.exactness,
    )
    return context, sources


def _hidden(memory: memoryview, manifest: Manifest) -> Buffer | None:
    if manifest.hidden is None:
        return None
    _check_digest(memory, manifest.hidden.digest)
    return from_memory(memory, dtype=manifest.hidden.dtype, shape=manifest.hidden.shape)
