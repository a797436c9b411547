"""A blob is a segment in the form in which it travels: a bundle of its own, wherever its bytes lie."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from avp.blob import Blob, is_sealed_quickly, open_blob, open_bundle, open_shared, seal
from avp.bundle import header_size, peek
from avp.context import Context, text_context
from avp.errors import BundleError, DigestMismatch, LimitExceeded, TruncatedBundle, UnsupportedBundle, UsageError
from avp.identity import CacheLayout, LayerLayout, ModelIdentity
from avp.manifest import Limits
from avp.segment import LATENT, Exactness, Segment
from avp.shared import SharedTensors

from .samples import (
    CODECS,
    DTYPES,
    bundle_of,
    described,
    hidden_context,
    kv_bytes,
    kv_context,
    named,
    segment_bytes,
    shared,
    small_blob,
    tokens_context,
)

LIMITS = Limits()


def _model(context: Context) -> ModelIdentity:
    assert context.model is not None
    return context.model


def _joined(blob: Blob) -> bytes:
    return b"".join(blob.runs)


CONTEXT = kv_context(range(600))
LATENTS = kv_context([*range(250), LATENT, LATENT, *range(40)])
SEGMENTS = [
    *CONTEXT.segments,
    CONTEXT.segments[0].cut(96, 256),
    CONTEXT.segments[1].cut(320, 333),
    *LATENTS.segments,
]


# --- sealed and opened


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("segment", SEGMENTS, ids=lambda each: f"{each.start}-{each.stop}")
def test_a_segment_comes_back_as_it_went(segment: Segment, codec: str) -> None:
    sealed = seal(_model(CONTEXT), segment, codec=codec)
    data = _joined(sealed)
    assert sealed.nbytes == len(data)
    found = open_blob(data, limits=LIMITS).verify()
    assert named(found.segment) == named(segment)
    assert segment_bytes(found.segment) == segment_bytes(segment)
    assert (found.model, found.entry) == (sealed.model, sealed.entry)
    assert found.entry.codec == codec
    assert _joined(found) == data
    assert bytes(found.header) == bytes(sealed.header) == data[: header_size(data)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_every_dtype_comes_back(dtype: str, codec: str) -> None:
    context = kv_context(range(300), dtype=dtype)
    found = open_blob(bundle_of(context, context.segments[1], codec=codec), limits=LIMITS).verify()
    assert segment_bytes(found.segment) == segment_bytes(context.segments[1])


def test_what_was_opened_can_be_sealed_again() -> None:
    segment = CONTEXT.segments[1]
    for codec in CODECS:
        data = bundle_of(CONTEXT, segment, codec=codec)
        found = open_blob(data, limits=LIMITS)
        assert _joined(seal(found.model, found.segment, codec=codec)) == data
        assert _joined(seal(found.model, found.segment)) == bundle_of(CONTEXT, segment)


def test_the_runs_of_a_raw_blob_are_views_of_the_segments_own_memory() -> None:
    segment = CONTEXT.segments[1]
    header, *runs = seal(_model(CONTEXT), segment).runs
    assert len(header) == header_size(header)
    owned = [segment.read(layer, part).array for layer in (0, 1) for part in "kv"]
    assert len(runs) == 2 * 2 + 2 * 1  # one for each head
    assert all(any(np.shares_memory(np.frombuffer(run, np.uint8), array) for array in owned) for run in runs)


def test_an_opened_blob_is_a_view_of_its_bytes() -> None:
    data = bytearray(bundle_of(CONTEXT, CONTEXT.segments[1]))
    found = open_blob(data, limits=LIMITS)
    array = found.segment.read(0, "k").array
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))
    assert not array.flags.writeable
    assert all(run.readonly for run in found.runs)


@pytest.mark.parametrize("segment", SEGMENTS, ids=lambda each: f"{each.start}-{each.stop}")
def test_stock_safetensors_opens_a_blob(segment: Segment, tmp_path: Path) -> None:
    (tmp_path / "s.avp").write_bytes(bundle_of(CONTEXT, segment))
    with safe_open(tmp_path / "s.avp", framework="np") as stock:
        manifest = json.loads(stock.metadata()["avp"])
        assert (manifest["kind"], manifest["length"]) == ("segment", len(segment))
        assert manifest["segments"][0]["start"] == segment.start
        assert len(stock.keys()) == 4
        for layer in (0, 1):
            for part in "kv":
                assert stock.get_tensor(f"0/{layer}/{part}").tobytes() == segment.read(layer, part).tobytes()


def test_a_blobs_manifest_is_the_segments_and_nothing_elses() -> None:
    manifest = peek(seal(_model(CONTEXT), CONTEXT.segments[2]).header)
    assert (manifest.kind, manifest.model, manifest.length) == ("segment", CONTEXT.model, 88)
    assert manifest.tokens == tuple(range(512, 600))
    assert (manifest.turns, dict(manifest.template), manifest.hidden) == ((), {}, None)
    assert manifest.exactness is Exactness.EXACT


def test_latent_positions_are_approximate_whatever_their_sender_claims() -> None:
    segment = replace(LATENTS.segments[0], exactness=Exactness.EXACT)
    found = open_blob(bundle_of(LATENTS, segment), limits=LIMITS)
    assert found.segment.exactness is found.entry.exactness is Exactness.APPROXIMATE


def test_sealing_with_what_is_no_codec_says_so() -> None:
    with pytest.raises(UsageError, match="no codec is named 'zip'"):
        seal(_model(CONTEXT), CONTEXT.segments[0], codec="zip")


# --- contexts and others in the same stream


@pytest.mark.parametrize("codec", CODECS)
def test_a_context_passes_through(codec: str) -> None:
    for context in (CONTEXT, hidden_context(3, "float32"), tokens_context(4), text_context("hé")):
        found = open_bundle(context.to_bytes(codec=codec), limits=LIMITS)
        assert isinstance(found, Context)
        assert described(found) == described(context)
        assert kv_bytes(found) == kv_bytes(context)


def test_a_context_is_checked_as_a_whole_when_it_passes_through() -> None:
    data = bytearray(CONTEXT.to_bytes())
    data[-1] ^= 1
    with pytest.raises(DigestMismatch):
        open_bundle(data, limits=LIMITS)


def test_a_context_is_no_blob() -> None:
    with pytest.raises(BundleError, match="a context of kind text came where a segment was due"):
        open_blob(text_context("x").to_bytes(), limits=LIMITS)


def test_a_blob_with_a_codec_of_another_installation_is_unsupported() -> None:
    data = bundle_of(CONTEXT, CONTEXT.segments[1]).replace(b'codec\\":\\"raw', b'codec\\":\\"rat')
    with pytest.raises(UnsupportedBundle, match="unknown codec 'rat'"):
        open_blob(data, limits=LIMITS)


def test_a_blob_is_bound_by_the_limits() -> None:
    data = bundle_of(CONTEXT, CONTEXT.segments[1])
    assert open_blob(data, limits=Limits(bytes=len(data), tokens=256, tensors=4, layers=2))
    small = {"bytes": len(data) - 1, "header": 100, "tokens": 255, "tensors": 3, "layers": 1}
    for name, value in small.items():
        with pytest.raises(LimitExceeded, match=rf"Fix: raise Limits\.{name}"):
            open_blob(data, limits=replace(LIMITS, **{name: value}))


def test_a_truncated_blob_is_refused() -> None:
    data = bundle_of(CONTEXT, CONTEXT.segments[1])
    for size in (0, 7, 8, 500, header_size(data) - 1, header_size(data), len(data) - 1):
        with pytest.raises(TruncatedBundle):
            open_blob(data[:size], limits=LIMITS)
    with pytest.raises(BundleError, match="and only it"):
        open_blob(data + b"x", limits=LIMITS)


# --- digests


@pytest.mark.parametrize("codec", CODECS)
def test_verify_finds_every_flipped_byte_of_the_tensors(codec: str) -> None:
    data = small_blob(codec)
    size = header_size(data)
    assert open_blob(data, limits=LIMITS).verify()
    for at in range(size, len(data)):
        for bit in (0, 7):
            changed = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
            found = open_blob(changed, limits=LIMITS)
            with pytest.raises(DigestMismatch, match="Fix: fetch the bundle again"):
                found.verify()


def test_a_flipped_byte_of_the_header_is_refused_or_changes_no_kv() -> None:
    """No digest covers the manifest: names, fingerprints, the start and the claimed class may have changed."""
    data = small_blob()
    written = open_blob(data, limits=LIMITS).segment
    for at in range(header_size(data)):
        for bit in range(8):
            try:
                found = open_blob(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :], limits=LIMITS).verify()
            except BundleError:
                continue
            assert segment_bytes(found.segment, 1) == segment_bytes(written, 1)
            assert (found.segment.tokens, found.segment.pages) == (written.tokens, written.pages)


def test_a_segment_in_shared_memory_is_sealed_as_the_same_bytes_and_the_second_time_quickly() -> None:
    for segment in shared(CONTEXT, capacity=600).segments:
        assert not is_sealed_quickly(segment, "raw")
        first = seal(_model(CONTEXT), segment)
        assert _joined(first) == bundle_of(CONTEXT, CONTEXT.segments[segment.start // 256])
        assert is_sealed_quickly(segment, "raw")
        assert not is_sealed_quickly(segment, "lossless")
        assert _joined(seal(_model(CONTEXT), segment)) == _joined(first)


def test_a_blob_that_was_sealed_here_is_right() -> None:
    for context in (CONTEXT, shared(CONTEXT, capacity=600)):
        for codec in CODECS:
            blob = seal(_model(context), context.segments[0], codec=codec)
            assert blob.verify() is blob


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.binary(max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_changed_blob_is_refused_or_holds_the_kv_that_was_written(begin: int, end: int, new: bytes) -> None:
    data = small_blob()
    begin, end = sorted((begin % len(data), end % len(data)))
    try:
        found = open_blob(data[:begin] + new + data[end:], limits=LIMITS).verify()
    except BundleError:
        return
    assert segment_bytes(found.segment, 1) == segment_bytes(open_blob(data, limits=LIMITS).segment, 1)


# --- shared memory


def _shared() -> tuple[Context, Blob, SharedTensors]:
    """A context in shared memory, the blob of its second segment, and where that lies."""
    context = shared(kv_context(range(300)))
    tensors = context.segments[1].tensors
    assert isinstance(tensors, SharedTensors)
    return context, seal(_model(context), context.segments[1]), tensors


def test_a_header_and_shared_memory_are_the_blob() -> None:
    context, sealed, tensors = _shared()
    found = open_shared(sealed.header, tensors, limits=LIMITS).verify()
    plain = kv_context(range(300)).segments[1]
    assert named(found.segment) == named(plain)
    assert segment_bytes(found.segment) == segment_bytes(plain)
    assert (found.model, found.entry) == (context.model, sealed.entry)
    assert _joined(found) == _joined(sealed) == bundle_of(kv_context(range(300)), plain)
    assert bytes(found.header) == bytes(sealed.header)
    memory = np.frombuffer(tensors.file.view, np.uint8)
    assert all(np.shares_memory(np.frombuffer(run, np.uint8), memory) for run in found.runs[1:])


def test_every_changed_byte_of_shared_memory_is_found() -> None:
    _, sealed, tensors = _shared()
    found = open_shared(sealed.header, tensors, limits=LIMITS)
    for layer, offsets in enumerate(tensors.offsets):
        for name, offset in zip("KV", offsets, strict=True):
            width = tensors.layout.layers[layer].head_dim * 4
            for position in (256, 299):
                at = offset + position * width
                before = os.pread(tensors.file.fd, 1, at)
                os.pwrite(tensors.file.fd, bytes([before[0] ^ 1]), at)
                with pytest.raises(DigestMismatch, match=f"{name} of layer {layer} in shared memory"):
                    found.verify()
                os.pwrite(tensors.file.fd, before, at)
    assert found.verify()


def test_what_others_write_beside_a_segment_does_not_matter() -> None:
    _, sealed, tensors = _shared()
    os.pwrite(tensors.file.fd, b"\xff" * 16 * 200, tensors.offsets[0][0])  # positions 0 to 200 of K of the first head
    assert open_shared(sealed.header, tensors, limits=LIMITS).verify()


@pytest.mark.parametrize(
    "change",
    [
        {"start": 257},
        {"stop": 299},
        {"start": 0, "stop": 45},
        {"layout": CacheLayout((LayerLayout(2, 4), LayerLayout(1, 6)))},
        {"layout": CacheLayout((LayerLayout(2, 4),))},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_header_of_other_shapes_is_refused(change: dict[str, object]) -> None:
    _, sealed, tensors = _shared()
    with pytest.raises(BundleError, match="describes other tensors"):
        open_shared(sealed.header, replace(tensors, **change), limits=LIMITS)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"capacity": 10**9}, {"capacity": 299}, {"start": -44, "stop": 0}], ids=str)
def test_shared_memory_that_does_not_hold_what_it_should_is_refused(change: dict[str, int]) -> None:
    _, sealed, tensors = _shared()
    with pytest.raises(BundleError, match="smaller than what it is said to hold"):
        open_shared(sealed.header, replace(tensors, **change), limits=LIMITS)  # type: ignore[arg-type]


def test_a_header_of_another_kind_or_form_is_refused() -> None:
    context, sealed, tensors = _shared()
    whole = context.to_bytes()
    packed = seal(_model(context), context.segments[1], codec="lossless")
    for header, message in (
        (whole[: header_size(whole)], "none of a segment"),
        (packed.header, "describes other tensors"),
        (bytes(sealed.header) + b"more", "bytes follow the header"),
        (bytes(sealed.header)[:-1], "its header alone"),
        (b"", "takes 8"),
    ):
        with pytest.raises(BundleError, match=message):
            open_shared(header, tensors, limits=LIMITS)
