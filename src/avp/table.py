"""The tensor table of a bundle: which tensors a manifest implies, in which order, form and place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise, zip_longest
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from avp import registry
from avp.buffers import Buffer, itemsize
from avp.errors import BundleError, LimitExceeded, UnsupportedBundle, UsageError
from avp.identity import LayerLayout
from avp.manifest import Limits, Manifest, SegmentEntry
from avp.protocols import Codec

OPENING = '{"__metadata__":{"avp":'
_CODES: Mapping[str, str] = MappingProxyType(
    {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8"}
)
_ASK = "Fix: ask the sender for a valid bundle."


class Part(NamedTuple):
    """One tensor as the manifest implies it: `name` within its segment, and its dtype and shape.

    Shape None: bytes of any length that, with the `beside` bytes of the same tensor's other parts, decode to `logical`
    bytes. `text` is dtype and shape as the header spells them.
    """

    name: str
    code: str
    shape: list[int] | None
    size: int
    logical: int
    beside: int
    text: str


class Head(NamedTuple):
    """The first bytes of a bundle: how many they are, what they say, and where tensors begin and end behind them."""

    size: int
    manifest: Manifest
    bounds: list[int]

    @property
    def total(self) -> int:
        """Bytes of the whole bundle."""
        return self.size + self.bounds[-1]


def find_codec(name: str) -> Codec:
    """The codec that a manifest names.

    Raises:
        UnsupportedBundle: none of that name is installed.
    """
    try:
        return registry.codec(name)
    except UsageError as error:
        raise UnsupportedBundle(
            f"the bundle is written with the unknown codec {name[:80]!r}. Fix: install what brings it, or ask for raw."
        ) from error


def layer_shape(layer: LayerLayout, count: int) -> tuple[int, int, int]:
    """Shape of K, and of V, of `count` positions in one layer."""
    return layer.kv_heads, count, layer.head_dim


def written_parts(buffers: Sequence[Buffer]) -> list[Part]:
    """The tensors of a bundle that is being written."""
    return [_part("", buffer.dtype, buffer.shape) for buffer in buffers]


def part_bounds(parts: Sequence[Part]) -> list[int]:
    """Where tensors begin and end: tensor i has the bytes bounds[i] to bounds[i + 1]."""
    return list(accumulate([part.size for part in parts], initial=0))


def header_text(manifest: str, names: Sequence[str], parts: Sequence[Part], bounds: Sequence[int]) -> str:
    """The JSON of a header, as this writer writes it: one spelling for one content."""
    rows = [
        f'"{name}":{{{part.text},"data_offsets":[{begin},{end}]}}'
        for name, part, (begin, end) in zip(names, parts, pairwise(bounds), strict=True)
    ]
    opening = OPENING + json.dumps(manifest, ensure_ascii=False) + ',"format":"avp"}'
    return ",".join([opening, *rows]) + "}"


def implied_parts(manifest: Manifest, limits: Limits) -> tuple[list[str], list[Part]]:
    """Names and forms of the tensors that a manifest implies, in file order.

    Raises:
        LimitExceeded: more tensors than allowed. UnsupportedBundle: an unknown codec.
        BundleError: a codec that does not take the dtype, or digests that are not one for each tensor.
    """
    layers = manifest.model.layout.layers if manifest.model else ()
    if 2 * len(layers) * len(manifest.segments) > limits.tensors:
        raise LimitExceeded(f"the manifest declares more than {limits.tensors} tensors. Fix: raise Limits.tensors.")
    names: list[str] = []
    parts: list[Part] = []
    forms: dict[tuple[str, str, int], tuple[Part, ...]] = {}
    for number, entry in enumerate(manifest.segments):
        key = (entry.codec, entry.dtype, entry.count)
        if key not in forms:
            forms[key] = _segment_parts(find_codec(entry.codec), entry, layers)
        if len(entry.digests) != 16 * len(forms[key]):
            raise _digest_count(entry, len(forms[key]))
        names += [f"{number}{part.name}" for part in forms[key]]
        parts += forms[key]
    if manifest.hidden is not None:
        names.append("hidden")
        parts.append(_part("", manifest.hidden.dtype, manifest.hidden.shape))
    return names, parts


def check_table(table: Mapping[str, object], manifest: Manifest, limits: Limits) -> list[int]:
    """The bounds of the tensors, if the table is just what the manifest implies: names, order, dtypes, shapes, no gaps.

    Raises:
        LimitExceeded: a tensor would expand too much. BundleError: the table differs.
    """
    names, parts = implied_parts(manifest, limits)
    if list(table) != names:
        wrong = next(pair for pair in zip_longest(names, table) if pair[0] != pair[1])
        raise BundleError(f"the manifest implies tensor {wrong[0]} where the header has {str(wrong[1])[:80]!r}. {_ASK}")
    entries = list(table.values())
    for index, part in enumerate(parts):
        if part.shape is None:
            parts[index] = _sized(names[index], part, entries[index], limits)
    bounds = part_bounds(parts)
    for name, part, entry, (begin, end) in zip(names, parts, entries, pairwise(bounds), strict=True):
        implied = {"dtype": part.code, "shape": part.shape, "data_offsets": [begin, end]}
        if entry != implied or not _whole(entry):
            raise BundleError(f"tensor {name} is declared as {str(entry)[:120]} but must be {implied}. {_ASK}")
    return bounds


def _whole(entry: object) -> bool:
    """Whether the numbers of a table entry are whole numbers as written: to Python, 0, 0.0 and false are equal."""
    numbers = (*entry["shape"], *entry["data_offsets"]) if isinstance(entry, dict) else ()
    return {type(number) for number in numbers} <= {int}


def _sized(name: str, part: Part, entry: object, limits: Limits) -> Part:
    """A part of free length, with the length that its entry declares."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not (isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and 0 <= shape[0] < 2**40):
        raise BundleError(f"tensor {name} is declared as {str(entry)[:120]} but must be bytes in one dimension. {_ASK}")
    if part.logical > limits.ratio * (part.beside + shape[0]):
        raise LimitExceeded(
            f"tensor {name} would expand from {part.beside + shape[0]} to {part.logical} bytes, more than "
            f"{limits.ratio} times. Fix: raise Limits.ratio if the sender is trusted."
        )
    return part._replace(shape=shape, size=shape[0])


def _segment_parts(codec: Codec, entry: SegmentEntry, layers: tuple[LayerLayout, ...]) -> tuple[Part, ...]:
    """The tensors of a segment, in file order; many bundles of one model ask for the same."""
    try:
        count = sum(2 * len(codec.parts(entry.dtype, layer_shape(layer, entry.count))) for layer in layers[:1])
        if len(entry.digests) != 16 * count * len(layers):  # before anything is made for each tensor
            raise _digest_count(entry, count * len(layers))
        return _forms(codec.name, entry.dtype, entry.count, layers)
    except UsageError as error:
        raise BundleError(f"codec {codec.name} does not take {entry.dtype}. {_ASK}") from error


@lru_cache(maxsize=64)
def _forms(codec: str, dtype: str, count: int, layers: tuple[LayerLayout, ...]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for index, layer in enumerate(layers):
        shape = layer_shape(layer, count)
        form = registry.codec(codec).parts(dtype, shape)
        sizes = (prod(size) * itemsize(part) for part, size in form.values() if size is not None)
        logical, beside = prod(shape) * itemsize(dtype), sum(sizes)
        for letter in ("k", "v"):
            parts += [
                _part(f"/{index}/{letter}{suffix}", part, size)._replace(logical=logical, beside=beside)
                for suffix, (part, size) in form.items()
            ]
    return tuple(parts)


def _digest_count(entry: SegmentEntry, count: int) -> BundleError:
    return BundleError(
        f"the segment at position {entry.start} has not one digest of 16 bytes for each of its {count} tensors. {_ASK}"
    )


def _part(name: str, dtype: str, shape: tuple[int, ...] | None) -> Part:
    size = 0 if shape is None else prod(shape) * itemsize(dtype)
    text = f'"dtype":"{_CODES[dtype]}","shape":[{",".join(map(str, shape or ()))}]'
    return Part(name, _CODES[dtype], None if shape is None else list(shape), size, 0, 0, text)
