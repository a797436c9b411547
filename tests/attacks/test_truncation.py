"""Bundles that end too early, or too late."""

from __future__ import annotations

import pytest

from avp.bundle import header_size
from avp.context import Context
from avp.errors import BundleError, TruncatedBundle
from avp.testing import synthetic_context

from .forge import Abuse, check, frame, take_apart, victim


def _whole() -> bytes:
    return synthetic_context(tokens=2, layers=1, kv_heads=1, head_dim=2, dtype="float32").to_bytes()


def _in_header() -> list[bytes]:
    data = _whole()
    return [data[:size] for size in range(header_size(data[:8]))]


def _in_tensors() -> list[bytes]:
    data = _whole()
    return [data[:size] for size in range(header_size(data[:8]), len(data))]


def _at_tensor_bounds() -> list[bytes]:
    data = synthetic_context(tokens=300, layers=3).to_bytes()
    size = header_size(data[:8])
    ends = [entry["data_offsets"][0] for entry in take_apart(data).table.values()]  # type: ignore[index]
    return [data[: size + end + more] for end in ends for more in (-1, 0, 1) if end + more >= 0]


def _lossless_tail() -> list[bytes]:
    data = bytes(victim(codec="lossless"))
    return [data[:-1], data[:-7]]


def _trailing() -> list[bytes]:
    return [_whole() + b"\0", _whole() + _whole(), _whole() + bytes(4096)]


def _empty_header() -> list[bytes]:
    return [frame(b""), frame(b"") + bytes(100), frame(b" " * 64), frame(b"{}"), frame(b"{}" + b" " * 62)]


ABUSES = [
    Abuse("the file ends at any byte of the header", _in_header, TruncatedBundle),
    Abuse("the file ends at any byte of the tensors", _in_tensors, TruncatedBundle),
    Abuse("the file ends at, before or after a tensor's begin", _at_tensor_bounds, TruncatedBundle),
    Abuse("the last compressed tensor is cut", _lossless_tail, TruncatedBundle),
    Abuse("bytes follow the last tensor", _trailing, BundleError),
    Abuse("the header is empty, blank or an empty object", _empty_header, BundleError),
]


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda abuse: abuse.name)
def test_refused(abuse: Abuse) -> None:
    check(abuse)


def test_the_victim_itself_is_valid() -> None:
    for data in (_whole(), bytes(victim()), bytes(victim(codec="lossless"))):
        assert Context.from_bytes(data).kind == "kv"
