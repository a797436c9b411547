"""Bundles come out of a stream as they went in, whatever its pieces; nothing is allocated before it is checked."""

from __future__ import annotations

from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp.blob import BundleReader, open_blob
from avp.bundle import header_size
from avp.context import text_context
from avp.errors import BundleError, DigestMismatch, LimitExceeded
from avp.manifest import Limits
from avp.testing import synthetic_context

from .attacks.forge import measured
from .samples import bundle_of, kv_context, small_blob, tokens_context

LIMITS = Limits()
CONTEXT = kv_context(range(600))
STREAMED = [
    bundle_of(CONTEXT, CONTEXT.segments[1]),
    bundle_of(CONTEXT, CONTEXT.segments[2], codec="lossless"),
    small_blob(),
    text_context("a context too").to_bytes(),
    kv_context(range(3)).to_bytes(),
    tokens_context(2).to_bytes(),
]


def _fed(pieces: list[bytes], limits: Limits = LIMITS) -> tuple[list[bytes], BundleReader]:
    reader = BundleReader(limits)
    found = []
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            before = len(rest)
            bundle, rest = reader.feed(rest)
            assert len(rest) < before or bundle is not None
            if bundle is not None:
                found.append(bytes(bundle))
    return found, reader


def _pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in cycle(sizes):
        if at >= len(data):
            return pieces
        pieces.append(data[at : at + size])
        at += size
    return pieces


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 63, 64, 65, 1000, 4096, 10**6])
def test_pieces_of_every_size_give_the_same_bundles_in_order(size: int) -> None:
    found, reader = _fed(_pieces(b"".join(STREAMED), [size]))
    assert found == STREAMED
    assert reader.idle


@given(st.lists(st.sampled_from(STREAMED), max_size=5), st.lists(st.integers(1, 5000), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_any_pieces_give_the_same_bundles_in_order(bundles: list[bytes], sizes: list[int]) -> None:
    found, reader = _fed(_pieces(b"".join(bundles), sizes))
    assert found == bundles
    assert reader.idle


def test_what_came_out_of_a_stream_is_whole_and_its_own() -> None:
    piece = bytearray(STREAMED[0])
    bundle, rest = BundleReader(LIMITS).feed(memoryview(piece))
    assert bundle is not None
    assert not rest
    piece[:] = bytes(len(piece))
    assert open_blob(bundle, limits=LIMITS).verify().entry.start == 256


def test_an_empty_piece_changes_nothing() -> None:
    reader = BundleReader(LIMITS)
    for part in (b"", STREAMED[2][:5], b"", STREAMED[2][5:100], b"", STREAMED[2][100:-1], b""):
        bundle, rest = reader.feed(memoryview(part))
        assert (bundle, bytes(rest)) == (None, b"")
        assert not part or not reader.idle
    bundle, _ = reader.feed(memoryview(STREAMED[2][-1:]))
    assert bundle is not None
    assert (bytes(bundle), reader.idle) == (STREAMED[2], True)


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 500, -33, -1])
def test_a_stream_that_ends_within_a_bundle_is_not_idle(cut: int) -> None:
    found, reader = _fed([STREAMED[3] + STREAMED[2][:cut]])
    assert found == [STREAMED[3]]
    assert not reader.idle


def test_a_bundle_cut_short_and_followed_by_another_is_refused() -> None:
    cut = STREAMED[2][:-1] + STREAMED[2]
    (bundle,), reader = _fed([cut[: len(STREAMED[2])]])
    with pytest.raises(DigestMismatch):
        open_blob(bundle, limits=LIMITS).verify()
    with pytest.raises(BundleError):
        reader.feed(memoryview(cut[len(STREAMED[2]) :]))


@pytest.mark.parametrize("step", [1, 10**6])
def test_a_size_beyond_the_limit_is_refused_before_there_is_room_for_it(step: int) -> None:
    claimed = (2**40).to_bytes(8, "little") + b"{" * 100
    large = bundle_of(CONTEXT, CONTEXT.segments[1])
    for data, limits, message in (
        (claimed, LIMITS, r"Limits\.header"),
        (large, Limits(bytes=len(large) - 1), r"Limits\.bytes"),
        (large, Limits(tokens=100), r"Limits\.tokens"),
    ):
        raised, peak = measured(lambda data=data, limits=limits: _fed(_pieces(data, [step]), limits))  # type: ignore[misc]
        assert isinstance(raised, LimitExceeded)
        assert raised.args
        assert peak < 60 * len(data) + 2**18
        with pytest.raises(LimitExceeded, match=message):
            _fed([data], limits)


def test_what_no_bundle_begins_with_is_refused_at_its_header() -> None:
    for data in (bytes(8), b"\x02" + bytes(7) + b"{}", b"\x40" + bytes(7) + b" " * 64):
        with pytest.raises(BundleError):
            _fed([data])


def test_a_reader_that_refused_refuses_again() -> None:
    reader = BundleReader(Limits(bytes=100))
    for piece in (STREAMED[0], b"x"):
        with pytest.raises(LimitExceeded):
            reader.feed(memoryview(piece))


def test_no_room_is_made_for_tensors_before_the_header_is_whole() -> None:
    wide = synthetic_context(layers=4, kv_heads=4, head_dim=256, tokens=256, dtype="float32")
    data = bundle_of(wide, wide.segments[0])
    size = header_size(data)
    assert len(data) > 2**23
    reader = BundleReader(LIMITS)
    raised, peak = measured(lambda: reader.feed(memoryview(data)[: size - 1]))
    assert raised is None
    assert peak < 4 * size + 2**16
