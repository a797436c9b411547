"""What a GGUF file says of itself, read without an engine: scalars, short lists, where its tensors lie.

<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>: magic, u32 version, u64 tensors, u64 pairs, then the pairs,
then name, shape, type and offset of every tensor. `gguf.GGUFReader` takes 11 s for Gemma's, every token being an array.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from blake3 import blake3

from avp.errors import UsageError

Scalar: TypeAlias = str | int | float | bool

SHORT = 4096  # lists of at most so many numbers are read
_STRING, _ARRAY = 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_WIDTH = {kind: struct.calcsize(code) for kind, code in _CODES.items()}
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes begin in the file; `shape` as GGUF has it, the fastest axis first."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file. `tokenizer` is BLAKE3 over all that turns text into ids, as the file spells it; `factors`
    over the factors on rotary frequencies that the file brings as a tensor, or "".
    """

    values: Mapping[str, Scalar | tuple[Scalar, ...]]
    tensors: Mapping[str, Place]
    tokenizer: str
    factors: str

    def text(self, key: str) -> str:
        """A string of the header, or ""."""
        value = self.values.get(key, "")
        return value if isinstance(value, str) else ""


def read_header(path: Path) -> Header:
    """The header of the GGUF file.

    Raises:
        UsageError: it is no GGUF file, or its header breaks off.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24 or file.read(4) != b"GGUF":
            raise UsageError(f"{path} is not a GGUF file: it does not begin with the bytes GGUF.\nFix: get it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
            try:
                return _read(blob)
            except (struct.error, KeyError, UnicodeDecodeError, OverflowError) as error:
                raise UsageError(
                    f"{path} is not a GGUF file that can be read: its header breaks off.\nFix: get it again."
                ) from error


def file_digest(path: Path) -> str:
    """BLAKE3 of the whole file: what all engines name the weights of a GGUF by."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _read(blob: mmap.mmap) -> Header:
    (tensors, pairs), at = struct.unpack_from("<QQ", blob, 8), 24
    values: dict[str, Scalar | tuple[Scalar, ...]] = {}
    words: dict[bytes, bytes] = {}
    for _ in range(pairs):
        key, start = _string(blob, at)
        (kind,) = struct.unpack_from("<I", blob, start)
        at = _skip(blob, start + 4, kind=kind)
        value = _value(blob, start + 4, kind=kind)
        if value is not None:
            values[key.decode()] = value
        if key.startswith(b"tokenizer.ggml."):
            words[key] = blake3(blob[start:at]).digest()
    places: dict[str, Place] = {}
    for _ in range(tensors):
        name, at = _string(blob, at)
        (axes,) = struct.unpack_from("<I", blob, at)
        *shape, kind, offset = struct.unpack_from(f"<{axes}QIQ", blob, at + 4)
        at += 4 + 8 * axes + 12
        places[name.decode()] = Place(tuple(shape), kind, offset)
    alignment = values.get("general.alignment", _ALIGNMENT)
    step = alignment if isinstance(alignment, int) and alignment > 0 else _ALIGNMENT
    begin = -(-at // step) * step
    placed = {name: Place(place.shape, place.kind, begin + place.offset) for name, place in places.items()}
    digest = blake3(b"avp-gguf-tokenizer-1\0" + b"".join(key + b"\0" + words[key] for key in sorted(words)))
    return Header(MappingProxyType(values), MappingProxyType(placed), digest.hexdigest(), _factors(blob, placed))


def _factors(blob: mmap.mmap, tensors: Mapping[str, Place]) -> str:
    place = tensors.get("rope_freqs.weight")
    if place is None:
        return ""
    return blake3(blob[place.offset : place.offset + 4 * place.shape[0]]).hexdigest()


def _value(blob: mmap.mmap, at: int, *, kind: int) -> Scalar | tuple[Scalar, ...] | None:
    """A scalar, or a short list of numbers; None for what is longer or nested."""
    if kind == _STRING:
        return _string(blob, at)[0].decode(errors="replace")
    if kind != _ARRAY:
        found: Scalar = struct.unpack_from(f"<{_CODES[kind]}", blob, at)[0]
        return found
    element, count = struct.unpack_from("<IQ", blob, at)
    if element not in _CODES or count > SHORT:
        return None
    return tuple(struct.unpack_from(f"<{count}{_CODES[element]}", blob, at + 12))


def _string(blob: mmap.mmap, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", blob, at)
    return blob[at + 8 : at + 8 + length], at + 8 + length


def _skip(blob: mmap.mmap, at: int, *, kind: int) -> int:
    """The offset behind the value of this kind that begins at `at`."""
    if kind == _STRING:
        return at + 8 + int(struct.unpack_from("<Q", blob, at)[0])
    if kind != _ARRAY:
        return at + _WIDTH[kind]
    element, count = struct.unpack_from("<IQ", blob, at)
    at += 12
    if element in _WIDTH:
        return at + int(count) * _WIDTH[element]
    for _ in range(count):
        at = _skip(blob, at, kind=element)
    return at
