"""Any context comes back; any other bytes are refused, whatever was changed."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from avp.bundle import peek, tensor_sizes
from avp.context import Context, Turn, text_context
from avp.errors import AVPError, BundleError
from avp.identity import LayerLayout
from avp.segment import LATENT

from .samples import CODECS, DTYPES, described, hidden_context, kv_bytes, kv_context, subset, tokens_context

_TEXTS = st.text(max_size=8)
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def _contexts(draw: st.DrawFn) -> Context:
    ids = draw(st.lists(st.integers(0, 2**31 - 1) | st.just(LATENT), max_size=70))
    pending = draw(st.lists(st.integers(0, 2**31 - 1), max_size=3))
    layers = draw(
        st.lists(
            st.builds(LayerLayout, st.integers(1, 3), st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=3
        )
    )
    turns = []
    for _ in range(draw(st.integers(0, 3))):
        opaque = tuple(sorted(draw(st.tuples(*[st.integers(0, len(ids) + len(pending))] * 2))))
        message = {
            "role": draw(_TEXTS),
            "content": draw(_JSON),
            **draw(st.dictionaries(st.text(min_size=9), _JSON, max_size=2)),
        }
        turns.append(Turn(message, draw(st.sampled_from([None, opaque]))))
    return kv_context(
        ids,
        pending=pending,
        dtype=draw(st.sampled_from(DTYPES)),
        layers=layers,
        seed=draw(st.integers(0, 99)),
        turns=tuple(turns),
        template=draw(st.dictionaries(_TEXTS, _JSON, max_size=3)),
    )


@settings(max_examples=80, deadline=None)
@given(_contexts(), st.sampled_from(CODECS))
def test_any_context_comes_back(context: Context, codec: str) -> None:
    data = context.to_bytes(codec=codec)
    back = Context.from_bytes(data)
    assert described(back) == described(context)
    assert kv_bytes(back) == kv_bytes(context)
    assert back.to_bytes(codec=codec) == data


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"\x00" * 8)
@example(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
def test_arbitrary_bytes_are_refused_with_our_errors(data: bytes) -> None:
    for call in (Context.from_bytes, peek, tensor_sizes):
        with pytest.raises(BundleError):
            call(data)


_ORIGINALS = [
    kv_context(range(40), pending=(3,), turns=(Turn({"role": "user", "content": "hé"}, (0, 40)),)),
    kv_context([*range(30), LATENT, LATENT, 5, 6], dtype="bfloat16"),
    subset(kv_context(range(600)), 1),
    hidden_context(3, "float16"),
    tokens_context(5),
    text_context("plain"),
]
_BUNDLES = [(each, each.to_bytes(codec=codec)) for each in _ORIGINALS for codec in CODECS]


@st.composite
def _mutants(draw: st.DrawFn) -> tuple[bytes, list[Context]]:
    context, data = draw(st.sampled_from(_BUNDLES))
    sources = [context]
    at = st.integers(0, len(data)) | st.integers(0, min(len(data), 1500))
    for _ in range(draw(st.integers(1, 3))):
        kind, begin, end = draw(st.sampled_from("fdris")), draw(at), draw(at)
        begin, end = sorted((min(begin, len(data)), min(end, len(data))))
        if kind == "f" and begin < len(data):
            data = data[:begin] + bytes([data[begin] ^ (1 << draw(st.integers(0, 7)))]) + data[begin + 1 :]
        elif kind == "d":
            data = data[:begin] + data[end:]
        elif kind == "r":
            data = data[:begin] + draw(st.sampled_from(b' 019{}[],"\\u\xff')).to_bytes() + data[begin + 1 :]
        elif kind == "i":
            data = data[:begin] + draw(st.binary(max_size=4)) + data[begin:]
        elif kind == "s":
            other, tail = draw(st.sampled_from(_BUNDLES))
            sources.append(other)
            data = data[:begin] + tail[min(begin, len(tail)) :]
    return data, sources


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(_mutants())
def test_a_changed_bundle_is_refused_or_holds_the_kv_that_was_written(mutant: tuple[bytes, list[Context]]) -> None:
    """No digest covers the manifest: messages, template, names, `exactness`, the ids of latent or unchained pages, and
    the numbers of the layout where no page id depends on them may have changed. The KV and hidden states may not."""
    data, sources = mutant
    try:
        context = Context.from_bytes(data)
    except BundleError:
        return
    written = [(kv_bytes(source), source.hidden and source.hidden.tobytes()) for source in sources]
    assert (kv_bytes(context), context.hidden and context.hidden.tobytes()) in written


@settings(max_examples=300, deadline=None)
@given(_mutants())
def test_a_changed_bundle_read_lazily_raises_only_our_errors(mutant: tuple[bytes, list[Context]]) -> None:
    try:
        context = Context.from_bytes(mutant[0], verify="use")
        kv_bytes(context)
        assume(len(context))
        _ = context[: len(context) - 1], context.to_bytes(), context.text, repr(context), context.nbytes
    except AVPError:
        return
