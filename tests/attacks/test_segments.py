"""Segments alone that hold more than one, less than they say, or what does not follow."""

from __future__ import annotations

from copy import deepcopy

import pytest

from avp.blob import BundleReader, open_blob
from avp.context import Context
from avp.errors import BundleError, DigestMismatch, LimitExceeded, TruncatedBundle
from avp.manifest import Limits
from avp.testing import synthetic_context

from .forge import (
    Abuse,
    Forgery,
    check_segment,
    field_of,
    measured,
    segment_victim,
    take_apart,
    text_victim,
    variants,
    victim,
)

SIZE = 40 * 2 * 8 * 4


def _two() -> list[bytes]:
    """The same segment twice, with tensors for both; and two that follow each other."""
    twice = segment_victim()
    twice.manifest["segments"] = [twice.segment(), deepcopy(twice.segment())]
    second = {
        name.replace("0/", "1/", 1): {**entry, "data_offsets": [4 * SIZE + each for each in entry["data_offsets"]]}  # type: ignore[call-overload, index, dict-item]
        for name, entry in twice.table.items()
    }
    twice.table |= second
    twice.payload *= 2
    following = take_apart(synthetic_context(tokens=300, dtype="float32").to_bytes())
    following.manifest.update(kind="segment", turns=[])
    return [bytes(twice), bytes(following)]


def _none() -> list[bytes]:
    made = []
    for tokens in ([], [1, 2, 3]):
        forgery = segment_victim()
        forgery.manifest.update(segments=[], tokens=tokens, length=len(tokens))
        forgery.table, forgery.payload = {}, b""
        made.append(bytes(forgery))
    return made


def _count(forgery: Forgery, value: object) -> None:
    forgery.segment()["count"] = value


def _tokens(forgery: Forgery, value: object) -> None:
    tokens: list[int] = forgery.manifest["tokens"]  # type: ignore[assignment]
    forgery.manifest["tokens"] = [*tokens, *[5] * 300][: int(str(value))]


def _tokens_and_length(forgery: Forgery, value: object) -> None:
    _tokens(forgery, value)
    forgery.manifest["length"] = value


def _page(forgery: Forgery, value: object) -> None:
    pages = str(forgery.segment()["pages"])
    at = int(str(value))
    forgery.segment()["pages"] = pages[:at] + ("0" if pages[at] != "0" else "1") + pages[at + 1 :]


def _of_context(**fields: object) -> list[bytes]:
    """A context that calls itself a segment."""
    made = []
    for forgery in (victim(), victim(tokens=300), text_victim()):
        forgery.manifest.update(kind="segment", **fields)  # type: ignore[arg-type]
        made.append(bytes(forgery))
    return made


def _hidden() -> list[bytes]:
    forgery = segment_victim()
    forgery.manifest["hidden"] = {"dtype": "float32", "shape": [1, 1], "digest": "00" * 16}
    forgery.table["hidden"] = {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * SIZE, 4 * SIZE + 4]}
    forgery.payload += bytes(4)
    return [bytes(forgery)]


def _called(kind: str) -> list[bytes]:
    forgery = segment_victim()
    forgery.manifest["kind"] = kind
    return [bytes(forgery)]


def _cut() -> list[bytes]:
    data = bytes(segment_victim())
    return [data[:size] for size in (0, 7, 8, 100, len(data) - 4 * SIZE, len(data) - SIZE, len(data) - 1)]


def _announced() -> list[bytes]:
    """Heads of 2^16 heads of 2^16 numbers: terabytes, of which nothing came."""
    return [_wide()]


def _wide() -> bytes:
    forgery = segment_victim(start=0, tokens=1)
    layout = {"kv_heads": 2**16, "head_dim": 2**16, "window": 0, "rope": "", "softcap": 0.0, "scale": 0.0}
    forgery.manifest["model"]["layouts"] = [layout]  # type: ignore[index]
    size = 2**34
    for number, entry in enumerate(forgery.table.values()):
        entry.update(shape=[2**16, 1, 2**16], data_offsets=[number * size, (number + 1) * size])  # type: ignore[attr-defined]
    forgery.payload = b""
    return bytes(forgery)


def _flipped() -> list[bytes]:
    made = []
    for at in (0, SIZE, 4 * SIZE - 1):
        forgery = segment_victim()
        forgery.payload = forgery.payload[:at] + bytes([forgery.payload[at] ^ 1]) + forgery.payload[at + 1 :]
        made.append(bytes(forgery))
    return made


TURNS = [[{"message": {"role": "user", "content": "x"}, "opaque": None}], None, {}, "x", [None]]
HUGE = [2**20 + 32, 2**31, 2**62, 2**63]
NO_START = [2**64, 10**400, -32, -(2**63), None, "256", 256.0, True]

ABUSES = [
    Abuse("two segments in a bundle of kind segment", _two, BundleError),
    Abuse("no segment in a bundle of kind segment", _none, BundleError),
    Abuse("a segment alone with turns", variants(field_of("turns"), TURNS, of=segment_victim), BundleError),
    Abuse(
        "a segment alone with a template",
        variants(field_of("template"), [{"a": 1}, None], of=segment_victim),
        BundleError,
    ),
    Abuse("a segment alone with hidden states", _hidden, BundleError),
    Abuse("a segment alone without a model", variants(field_of("model"), [None], of=segment_victim), BundleError),
    Abuse(
        "a segment alone that counts other tokens than it has",
        variants(_count, [0, 1, 32, 39, 41, 256, 257, 2**63, -1, None], of=segment_victim),
        BundleError,
    ),
    Abuse(
        "a segment alone with tokens too few or too many",
        variants(_tokens, [0, 1, 39, 41, 300], of=segment_victim),
        BundleError,
    ),
    Abuse(
        "a segment alone whose length is that of other tokens",
        variants(_tokens_and_length, [0, 39, 41, 300], of=segment_victim),
        BundleError,
    ),
    Abuse(
        "a segment alone with a page id that does not follow",
        variants(_page, [0, 63, 64, 127], of=segment_victim),
        BundleError,
    ),
    Abuse(
        "a segment alone of another parent than its pages",
        variants(field_of("segments", 0, "parent"), ["00" * 32, "", "00", None], of=segment_victim),
        BundleError,
    ),
    Abuse(
        "a segment alone that starts between two pages",
        variants(field_of("segments", 0, "start"), [1, 31, 33, 255], of=segment_victim),
        BundleError,
    ),
    Abuse(
        "a segment alone that starts beyond the limit of tokens",
        variants(field_of("segments", 0, "start"), HUGE, of=segment_victim),
        LimitExceeded,
    ),
    Abuse(
        "a segment alone that starts at no position",
        variants(field_of("segments", 0, "start"), NO_START, of=segment_victim),
        BundleError,
    ),
    Abuse("a context that calls itself a segment", _of_context, BundleError),
    Abuse("a context without turns that calls itself a segment", lambda: _of_context(turns=[])[1:], BundleError),
    Abuse("a segment alone that calls itself a context", lambda: [*_called("kv"), *_called("text")], BundleError),
    Abuse("a segment alone that is cut", _cut, TruncatedBundle),
    Abuse("a segment alone of 2^32 numbers a token, of which nothing came", _announced, BundleError),
    Abuse("a bit of a segment alone is flipped", _flipped, DigestMismatch),
]


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda abuse: abuse.name)
def test_refused(abuse: Abuse) -> None:
    check_segment(abuse)


def test_a_size_beyond_the_limit_is_refused_before_anything_is_allocated_for_it() -> None:
    """The stream's reader makes room for a whole bundle as soon as it has its header."""
    data = bytes(segment_victim())
    limits = Limits(bytes=len(data) - 1)
    reader = BundleReader(limits)
    raised, peak = measured(lambda: reader.feed(memoryview(data)[:-SIZE]))
    assert isinstance(raised, LimitExceeded)
    assert peak < 40 * len(data)


def test_the_victims_are_valid() -> None:
    for start in (0, 32, 256, 480):
        for codec in ("raw", "lossless"):
            forgery = segment_victim(start=start, codec=codec, tokens=30)
            assert open_blob(bytes(forgery), limits=Limits()).verify().entry.start == start
    assert Context.from_bytes(bytes(victim())).kind == "kv"
