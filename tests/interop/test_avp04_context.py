"""Contexts out of frames of 0.4 and into them: nothing lost, nothing claimed, nothing taken on a name alone."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp.buffers import STORAGE, Buffer
from avp.context import Context
from avp.errors import (
    AVPError,
    BundleError,
    IdentityMismatch,
    LimitExceeded,
    TruncatedBundle,
    UnsupportedBundle,
    UnsupportedCache,
    UsageError,
)
from avp.identity import LayerLayout, ModelIdentity
from avp.interop.avp04 import Frame, read_frame, write_frame
from avp.interop.avp04_context import (
    context_from_frame,
    frame_from_context,
    trust_reason,
)
from avp.interop.avp04_proto import DataType, Metadata, PayloadType
from avp.manifest import Limits
from avp.segment import LATENT, Exactness
from avp.testing import synthetic_context

from ..samples import described, hidden_context, kv_bytes, subset, tokens_context
from .wire import HASH, attempt, kv_context, kv_frame, model, take, with_fields

DTYPES = ("float32", "float16", "bfloat16")


def _identity(context: Context) -> ModelIdentity:
    assert context.model is not None
    return context.model


# --- there and back


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([0, 1, 2, 31, 32, 33, 255, 256, 257, 300]),
    st.integers(1, 5),
    st.sampled_from(DTYPES),
    st.sampled_from(["", "zstd"]),
)
def test_kv_with_its_ids_survives_a_frame(
    layers: int, kv_heads: int, tokens: int, head_dim: int, dtype: str, compression: str
) -> None:
    context = kv_context(layers=layers, kv_heads=kv_heads, tokens=tokens, head_dim=head_dim, dtype=dtype)
    data = frame_from_context(context, model_hash=HASH, compression=compression)
    found = take(data, _identity(context), tokens=context.tokens)
    assert kv_bytes(found) == kv_bytes(context)
    assert described(found) == described(context)
    assert [each.engine for each in found.segments] == ["transformers"] * len(context.segments)
    assert found.exactness is Exactness.EXACT
    assert frame_from_context(found, model_hash=HASH, compression=compression) == data
    assert described(Context.from_bytes(found.to_bytes())) == described(found)


def test_the_payload_is_the_shape_and_then_k_and_v_layer_by_layer() -> None:
    context = kv_context(layers=2, kv_heads=2, tokens=300, head_dim=3, dtype="float16")
    frame = read_frame(frame_from_context(context, model_hash=HASH, hidden_dim=6))
    assert struct.unpack("<IIIIB", frame.payload[:17]) == (2, 2, 3, 300, 1)
    whole = np.frombuffer(frame.payload[17:], "<f2").reshape(2, 2, 2, 300, 3)
    for layer in range(2):
        for index, part in enumerate("kv"):
            parts = [segment.read(layer, part).array for segment in context.segments]
            assert whole[layer, index].tobytes() == np.concatenate(parts, 1).tobytes()
    assert frame.metadata == Metadata(
        model_id="synthetic",
        hidden_dim=6,
        num_layers=2,
        payload_type=PayloadType.KV_CACHE,
        dtype=DataType.FLOAT16,
        extra={"model_hash": HASH, "model_family": "synthetic", "num_steps": "0"},
        payload_checksum=frame.metadata.payload_checksum,
    )


def test_kv_without_ids_counts_as_latent_and_approximate() -> None:
    context = kv_context(tokens=40)
    found = take(frame_from_context(context, model_hash=HASH), _identity(context))
    assert found.tokens == (LATENT,) * 40
    assert (len(found), found.pending, found.text) == (40, (), "")
    assert [each.exactness for each in found.segments] == [Exactness.APPROXIMATE]
    assert found.exactness is Exactness.APPROXIMATE
    other = kv_context(tokens=40, seed=1)
    assert take(frame_from_context(other, model_hash=HASH), _identity(context)).segments[0].pages != (
        found.segments[0].pages
    )
    again = Context.from_bytes(found.to_bytes())
    assert described(again) == described(found)
    assert kv_bytes(again) == kv_bytes(context)


def test_exactness_ends_where_the_first_position_has_no_id() -> None:
    context = kv_context(tokens=600)
    ids = (*context.tokens[:400], *(LATENT,) * 200)
    found = take(frame_from_context(context, model_hash=HASH), _identity(context), tokens=ids)
    assert [each.exactness.label for each in found.segments] == ["exact", "approximate", "approximate"]
    assert found.segments[0].pages == context.segments[0].pages
    frame = read_frame(frame_from_context(found, model_hash=HASH))
    assert frame.metadata.extra["num_steps"] == "200"


def test_kv_is_not_copied_out_of_a_frame() -> None:
    data = kv_frame(tokens=300)
    frame = read_frame(data)
    found = take(frame, _identity(kv_context(tokens=300)), tokens=range(300))
    whole = np.frombuffer(data, np.uint8)
    for segment in found.segments:
        array = segment.read(1, "v").array
        assert np.may_share_memory(array, whole)
        assert not array.flags.writeable


def test_hidden_states_survive_a_frame() -> None:
    for dtype in DTYPES:
        context = hidden_context(7, dtype)
        data = frame_from_context(context, model_hash=HASH)
        assert read_frame(data).metadata.tensor_shape == (7, 6)
        found = take(data, _identity(context))
        assert found.hidden is not None
        assert context.hidden is not None
        assert (found.kind, found.hidden.dtype, found.hidden.shape) == ("hidden", dtype, (7, 6))
        assert found.hidden.tobytes() == context.hidden.tobytes()
        assert found.exactness is Exactness.APPROXIMATE
        assert described(Context.from_bytes(found.to_bytes())) == described(found)


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"hidden_dim": 4}, (3, 4)),
        ({"tensor_shape": (12,)}, (1, 12)),
        ({"tensor_shape": (1, 3, 4)}, (3, 4)),
        ({"tensor_shape": (3, 4), "hidden_dim": 4}, (3, 4)),
        ({"tensor_shape": (3, 4), "dtype": DataType.BFLOAT16}, None),
        ({"tensor_shape": (3, 4), "hidden_dim": 3}, None),
        ({"tensor_shape": (3, 0)}, None),
        ({"hidden_dim": 5}, None),
        ({}, None),
        ({"dtype": DataType.INT8, "hidden_dim": 4}, None),
    ],
)
def test_hidden_states_are_rows_of_the_hidden_size(fields: Mapping[str, object], shape: tuple[int, int] | None) -> None:
    frame = Frame(Metadata(extra={"model_hash": HASH}, **fields), memoryview(bytes(48)))  # type: ignore[arg-type]
    if shape is None:
        with pytest.raises(BundleError, match="hidden states"):
            take(frame, model(LayerLayout(1, 4)))
    else:
        hidden = take(frame, model(LayerLayout(1, 4))).hidden
        assert hidden is not None
        assert hidden.shape == shape


def test_more_hidden_states_than_the_limits_allow_are_refused() -> None:
    context = hidden_context(7, "float32")
    frame = read_frame(frame_from_context(context, model_hash=HASH))
    assert take(frame, _identity(context), limits=Limits(tokens=7)).hidden is not None
    with pytest.raises(LimitExceeded, match=r"7 hidden states; at most 6 .*Fix: raise Limits\.tokens"):
        take(frame, _identity(context), limits=Limits(tokens=6))


def test_ids_of_an_array_are_plain_numbers_in_the_context() -> None:
    context = kv_context(tokens=3)
    ids = np.array(context.tokens, np.int64)
    found = take(frame_from_context(context, model_hash=HASH), _identity(context), tokens=ids)
    assert described(Context.from_bytes(found.to_bytes())) == described(context)


# --- what is not taken


@pytest.mark.parametrize("trusted", ["", "cd" * 32])
@pytest.mark.parametrize("make", [lambda: kv_context(tokens=3), lambda: hidden_context(3, "float32")])
def test_state_of_a_peer_that_nobody_trusts_is_refused(make, trusted: str) -> None:  # type: ignore[no-untyped-def]
    context = make()
    for claimed in (HASH, ""):
        frame = read_frame(frame_from_context(context, model_hash=claimed))
        with pytest.raises(IdentityMismatch, match=r"proves no weights.*pass its hash as trust_model_hash"):
            context_from_frame(frame, model=_identity(context), trust_model_hash=trusted)


def test_a_receipt_can_say_that_the_weights_are_not_proven() -> None:
    assert trust_reason(read_frame(kv_frame(tokens=1)).metadata) == (
        "the weights of the sender are trusted, not proven: AVP 0.4 names them by a hash of the config only "
        "(abababababababab…)"
    )


def test_state_that_was_projected_is_refused() -> None:
    frame = with_fields(kv_frame(tokens=3), avp_map_id="vocab:0011223344556677")
    with pytest.raises(IdentityMismatch, match="another model"):
        take(frame, _identity(kv_context(tokens=3)))


@pytest.mark.parametrize("shape", [{"layers": 3}, {"kv_heads": 3}, {"head_dim": 9}])
def test_kv_of_another_shape_is_refused_even_when_trusted(shape: dict[str, int]) -> None:
    with pytest.raises(IdentityMismatch, match=r"layers of .* heads of .*Fix: "):
        take(kv_frame(tokens=3, **shape), _identity(kv_context()))


@pytest.mark.parametrize(
    "layers",
    [
        (LayerLayout(2, 8, window=24), LayerLayout(2, 8)),
        (LayerLayout(2, 8), LayerLayout(1, 8)),
        (LayerLayout(2, 8), LayerLayout(2, 4)),
    ],
)
def test_models_with_windows_or_uneven_layers_are_refused_both_ways(layers: tuple[LayerLayout, ...]) -> None:
    local = model(*layers)
    with pytest.raises(UnsupportedCache, match="Fix: hand over a bundle"):
        take(kv_frame(tokens=3), local)
    with pytest.raises(UnsupportedCache, match="Fix: hand over a bundle"):
        frame_from_context(replace(kv_context(tokens=3), model=local), model_hash=HASH)


def test_ids_that_do_not_fit_the_kv_are_a_wrong_call() -> None:
    frame = read_frame(kv_frame(tokens=3))
    local = _identity(kv_context())
    for ids, what in (((1, 2), "2 token ids were given for KV of 3"), ((1, 2, -2), "-1 to"), ((1, 2, 2**31), "-1 to")):
        with pytest.raises(UsageError, match=what):
            take(frame, local, tokens=ids)


def test_ids_cannot_stand_for_the_latent_steps_that_a_frame_tells_of() -> None:
    extra = {"model_hash": HASH, "num_steps": "2"}
    frame = with_fields(kv_frame(tokens=3), extra=extra)
    local = _identity(kv_context())
    assert take(frame, local, tokens=(1, LATENT, LATENT)).exactness is Exactness.APPROXIMATE
    with pytest.raises(UsageError, match="2 of its positions are latent steps; the token ids leave 1 open"):
        take(frame, local, tokens=(1, 2, LATENT))
    for steps in ("two", "-1", "9" * 5000, "²"):
        wrong = with_fields(kv_frame(tokens=3), extra={**extra, "num_steps": steps})
        with pytest.raises(BundleError, match="no number of latent steps"):
            take(wrong, local, tokens=(1, LATENT, LATENT))


def _kv(*numbers: int, rest: int = 0, **fields: object) -> Frame:
    metadata = Metadata(payload_type=PayloadType.KV_CACHE, extra={"model_hash": HASH}, **fields)  # type: ignore[arg-type]
    return Frame(metadata, memoryview(struct.pack("<IIIIB", *numbers) + bytes(rest)))


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (Frame(_kv(0, 0, 0, 0, 0).metadata, memoryview(bytes(16))), TruncatedBundle),
        (_kv(2, 2, 8, 3, 0, rest=4 * 192 - 1), TruncatedBundle),
        (_kv(2, 2, 8, 3, 0, rest=4 * 192 + 1), BundleError),
        (_kv(2, 2, 8, 3, 1, rest=4 * 192), BundleError),
        (_kv(2, 2, 8, 3, 3, rest=192), UnsupportedBundle),
        (_kv(2, 2, 8, 3, 255, rest=192), UnsupportedBundle),
        (_kv(2, 2, 8, 2**21, 0), LimitExceeded),
        (_kv(2**12, 2, 8, 3, 0), LimitExceeded),
        (_kv(2, 2**32 - 1, 2**32 - 1, 2**20, 0), TruncatedBundle),
        (_kv(2, 2, 8, 3, 0, rest=4 * 192, num_layers=3), BundleError),
        (_kv(2, 2, 8, 3, 0, rest=4 * 192, dtype=DataType.BFLOAT16), BundleError),
        (_kv(2, 2, 8, 3, 1, rest=2 * 192, dtype=DataType.BFLOAT16), BundleError),
        (_kv(0, 0, 0, 0, 0), IdentityMismatch),
    ],
)
def test_kv_that_is_not_what_it_says_is_refused(frame: Frame, error: type[AVPError]) -> None:
    with pytest.raises(error, match="Fix: ") as caught:
        take(frame, model(LayerLayout(2, 8), LayerLayout(2, 8)))
    assert type(caught.value) is error


def test_metadata_that_leave_layers_and_dtype_out_are_taken() -> None:
    found = take(_kv(2, 2, 8, 3, 2, rest=2 * 192), model(LayerLayout(2, 8), LayerLayout(2, 8)))
    assert (len(found), found.segments[0].dtype) == (3, "bfloat16")


# --- what is not written


def test_pending_ids_are_never_dropped_in_silence() -> None:
    context = kv_context(tokens=3)
    with pytest.raises(UsageError, match=r'1 ids of the context are not computed yet.*Fix: connector\.prefill\("",'):
        frame_from_context(replace(context, tokens=(*context.tokens, 5)), model_hash=HASH)


@pytest.mark.parametrize("kept", [(), (0,), (1,), (0, 2)])
def test_a_context_that_lacks_segments_is_refused(kept: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="lacks segments"):
        frame_from_context(subset(kv_context(tokens=600), *kept), model_hash=HASH)


def test_token_ids_alone_are_refused() -> None:
    with pytest.raises(UsageError, match="holds no token ids"):
        frame_from_context(tokens_context(3), model_hash=HASH)


def test_mixed_or_unknown_dtypes_are_refused() -> None:
    context = kv_context(tokens=300)
    first, second = context.segments
    for other in (replace(second, dtype="float32"), replace(second, dtype="int8")):
        with pytest.raises(UsageError, match="one dtype of float32, float16, bfloat16"):
            frame_from_context(replace(context, segments=(first, other)), model_hash=HASH)
    hidden = replace(hidden_context(1, "float32"), hidden=Buffer("int8", np.zeros((1, 6), np.int8)))
    with pytest.raises(UsageError, match="hidden states are int8"):
        frame_from_context(hidden, model_hash=HASH)


def test_a_class_below_exact_travels_with_the_frame() -> None:
    lossy = replace(kv_context(tokens=3), exactness=Exactness.BOUNDED)
    foreign = synthetic_context(tokens=3)
    for context in (lossy, foreign):
        data = frame_from_context(context, model_hash=HASH)
        assert read_frame(data).metadata.extra["exactness"] == "bounded"
        assert take(data, _identity(context), tokens=context.tokens).exactness is Exactness.BOUNDED
    wrong = with_fields(kv_frame(tokens=3), extra={"model_hash": HASH, "exactness": "perfect"})
    with pytest.raises(UnsupportedBundle, match="'perfect'"):
        take(wrong, _identity(foreign))


@dataclass(frozen=True)
class _Nothing:
    """KV of any size in one byte."""

    shape: tuple[int, int, int]

    def read(self, layer: int, part: str) -> Buffer:
        raise AssertionError(f"{part} of layer {layer} was read")


def test_kv_beyond_four_gibibytes_is_refused_before_it_is_read() -> None:
    context = kv_context(layers=2, kv_heads=2, tokens=256, head_dim=8, dtype="float32")
    wide = model(*(LayerLayout(2**10, 2**11),) * 2)
    shape = (2**10, 256, 2**11)
    assert 4 * np.prod(shape) * STORAGE["float32"].itemsize >= 2**32
    segments = tuple(replace(each, tensors=_Nothing(shape)) for each in context.segments)
    with pytest.raises(UsageError, match=r"do not fit a frame of AVP 0\.4"):
        frame_from_context(replace(context, model=wide, segments=segments), model_hash=HASH)


@settings(deadline=None)
@given(st.integers(0, 16), st.binary(min_size=0, max_size=4), st.data())
def test_a_flipped_bit_in_the_shape_never_crashes(at: int, noise: bytes, data: st.DataObject) -> None:
    frame = read_frame(kv_frame(tokens=3))
    payload = bytearray(frame.payload)
    payload[at] ^= 1 << data.draw(st.integers(0, 7))
    payload += noise
    changed = Frame(frame.metadata, memoryview(bytes(payload)))
    found = attempt(lambda: take(changed, _identity(kv_context())))
    if isinstance(found, AVPError):
        assert "Fix: " in str(found)
    else:
        assert len(kv_bytes(found)) == 4


def test_a_frame_that_was_read_is_written_the_same() -> None:
    context = kv_context(tokens=5)
    frame = read_frame(frame_from_context(context, model_hash=HASH))
    assert write_frame(frame.metadata, frame.payload) == frame_from_context(context, model_hash=HASH)
