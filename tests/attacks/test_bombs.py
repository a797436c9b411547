"""Compressed tensors that expand: the size is known before, and nothing larger is ever made."""

from __future__ import annotations

import pytest
import xxhash
import zstandard

from avp.context import Context
from avp.errors import BundleError, LimitExceeded
from avp.manifest import Limits
from avp.testing import synthetic_context

from .forge import Abuse, Forgery, check, honest_pages, measured, take_apart, victim


def _with_frame(frame: bytes) -> bytes:
    """A lossless bundle whose first exponents are `frame`, with the digest that belongs to it."""
    forgery = victim(codec="lossless")
    old = forgery.entry("0/0/k.exp")["data_offsets"]
    begin, end = old  # type: ignore[misc]
    forgery.payload = forgery.payload[:begin] + frame + forgery.payload[end:]
    moved = len(frame) - (end - begin)
    forgery.entry("0/0/k.exp").update(shape=[len(frame)], data_offsets=[begin, begin + len(frame)])
    for name, entry in forgery.table.items():
        if name not in ("0/0/k", "0/0/k.exp"):
            entry["data_offsets"] = [offset + moved for offset in entry["data_offsets"]]  # type: ignore[index]
    digests = str(forgery.segment()["digests"])
    forgery.segment()["digests"] = digests[:32] + xxhash.xxh3_128_hexdigest(frame) + digests[64:]
    return bytes(forgery)


def _bombs() -> list[bytes]:
    return [
        _with_frame(zstandard.ZstdCompressor(write_content_size=told).compress(bytes(2**26))) for told in (True, False)
    ]


def _claims() -> list[bytes]:
    return [
        _with_frame(b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"\x01\x00\x00")
        for size in (2**40, 2**64 - 1)
    ]


def _exponents() -> bytes:
    forgery = victim(codec="lossless")
    begin, end = forgery.entry("0/0/k.exp")["data_offsets"]  # type: ignore[misc]
    return zstandard.decompress(forgery.payload[begin:end])


def _wrong_frames() -> list[bytes]:
    right = zstandard.compress(_exponents())
    hidden_bomb = zstandard.compress(bytes(len(_exponents()))) + zstandard.compress(bytes(2**24))
    lying = bytearray(zstandard.ZstdCompressor(write_content_size=True).compress(bytes(2**16)))
    return [
        _with_frame(frame)
        for frame in (
            right + b"\0",
            right + right,
            hidden_bomb,
            right[:-1],
            right[:-8],
            zstandard.compress(_exponents()[:-1]),
            zstandard.compress(_exponents() + b"\0"),
            b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" * 20,
            bytes(lying[:6]) + b"\xff" * 40,
            b"no frame at all, but long enough to be one",
        )
    ]


def _empty_frame() -> list[bytes]:
    return [_with_frame(b"")]


def _ratio() -> list[bytes]:
    return [synthetic_context(tokens=200, head_dim=64).to_bytes(codec="lossless")]


def _huge_logical() -> list[bytes]:
    """Mantissas declared for 2^32 numbers a token, of which nothing came."""
    forgery: Forgery = take_apart(synthetic_context(tokens=1, layers=1).to_bytes(codec="lossless"))
    forgery.manifest["model"]["layouts"][0].update(kv_heads=2**16, head_dim=2**16)  # type: ignore[index]
    honest_pages(forgery)
    for entry in forgery.table.values():
        entry["shape"] = [1] if len(entry["shape"]) == 1 else [1, 2**16, 1, 2**16]  # type: ignore[index]
    bounds = [0, 2**32, 2**32 + 1, 2**33 + 1, 2**33 + 2]
    for entry, begin, end in zip(forgery.table.values(), bounds, bounds[1:], strict=False):
        entry["data_offsets"] = [begin, end]  # type: ignore[index]
    return [bytes(forgery)]


# A digest proves that the frame is the sender's, not that it is harmless: reading it is what refuses it.
WHEN_READ = [
    Abuse("64 MiB of zeros in a frame of 2 kB, size told or not", _bombs, BundleError),
    Abuse("a frame that claims 2^40 or 2^64 - 1 bytes", _claims, BundleError),
    Abuse("a frame cut, followed, doubled, short, long, skippable or none", _wrong_frames, BundleError),
    Abuse("no frame at all", _empty_frame, BundleError),
]
FROM_THE_HEADER = [
    Abuse("a tensor that expands more than Limits.ratio", _ratio, LimitExceeded, Limits(ratio=1)),
    Abuse("a compressed tensor of 2^32 numbers, of which nothing came", _huge_logical, BundleError),
]
ABUSES = WHEN_READ + FROM_THE_HEADER


@pytest.mark.parametrize("abuse", FROM_THE_HEADER, ids=lambda abuse: abuse.name)
def test_refused(abuse: Abuse) -> None:
    check(abuse)


@pytest.mark.parametrize("abuse", WHEN_READ, ids=lambda abuse: abuse.name)
def test_refused_when_read(abuse: Abuse) -> None:
    for data in abuse.make():
        segment = Context.from_bytes(data).segments[0]
        raised, peak = measured(lambda segment=segment: segment.read(0, "k"))  # type: ignore[misc]
        assert isinstance(raised, abuse.error)
        assert peak < 8 * len(data) + 2**17
