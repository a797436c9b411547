"""A hello that came over a wire is read with suspicion."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp.errors import BundleError, NoAgreement, UsageError
from avp.greeting import agreement_to_json, hello_from_json, hello_to_json
from avp.handshake import CodecOffer, Hello, Record, negotiate
from avp.identity import CacheLayout, LayerLayout, ModelIdentity, canonical_json
from avp.manifest import Limits
from avp.segment import Exactness

MODEL = ModelIdentity("some/model", "some", "a" * 64, "b" * 64, CacheLayout((LayerLayout(2, 8),) * 3))
CODECS = (CodecOffer("raw"), CodecOffer("int8", Exactness.BOUNDED, 0.25, 1e9, (Record("a" * 64, 0.001, 0.99, 0.98),)))
HELLO = Hello("one", MODEL, "transformers", "float32", "c" * 64, codecs=CODECS, bandwidth=1e9, prefill=1e4)
HUGE = 10**400  # an int that no float holds
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(HUGE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def wire(hello: Hello = HELLO) -> dict[str, object]:
    value = json.loads(canonical_json(hello_to_json(hello)))
    assert isinstance(value, dict)
    return value


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where each value within a JSON value is."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def changed(path: tuple[str | int, ...], new: object) -> object:
    value: object = copy.deepcopy(wire())
    at = value
    for key in path[:-1]:
        at = at[key]  # type: ignore[index]
    at[path[-1]] = new  # type: ignore[index]
    return value


PLACES = list(places(wire()))


def at(path: tuple[str | int, ...], value: object) -> object:
    for key in path:
        value = value[key]  # type: ignore[index]
    return value


OBJECTS = [path for path in [(), *PLACES] if isinstance(at(path, wire()), dict)]


def read(value: object) -> Hello:
    return hello_from_json(value, limits=Limits())


def test_a_hello_comes_back_as_it_was_sent() -> None:
    assert read(wire()) == HELLO
    plain = Hello("file")
    assert read(wire(plain)) == plain


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PLACES), json_values)
def test_any_value_anywhere_is_refused_or_can_be_negotiated_with(path: tuple[str | int, ...], new: object) -> None:
    try:
        hello = read(changed(path, new))
    except (UsageError, BundleError):
        return
    for sender, receiver in ((hello, HELLO), (HELLO, hello)):
        with suppress(NoAgreement):
            agreement = negotiate(sender, receiver, tokens=2**20)
            canonical_json(agreement_to_json(agreement))  # finite, so that it can be told


@settings(max_examples=60, deadline=None)
@given(json_values)
def test_what_is_no_hello_at_all_is_refused(value: object) -> None:
    with pytest.raises((UsageError, BundleError)):
        read(value)


@pytest.mark.parametrize("path", OBJECTS, ids=str)
def test_an_object_has_all_its_fields_and_no_other(path: tuple[str | int, ...]) -> None:
    for name in at(path, wire()):  # type: ignore[attr-defined]
        lacking = wire()
        del at(path, lacking)[name]  # type: ignore[attr-defined]
        with pytest.raises((UsageError, BundleError)):
            read(lacking)
    more = wire()
    at(path, more)["extra"] = 0  # type: ignore[index]
    with pytest.raises((UsageError, BundleError)):
        read(more)


@pytest.mark.parametrize(
    "wrong", [{}, [], True, 1.5, "x" * 300, HUGE, float("nan"), float("inf"), -1], ids=lambda wrong: repr(wrong)[:8]
)
@pytest.mark.parametrize("path", [path for path in PLACES if not isinstance(at(path, wire()), dict | list)], ids=str)
def test_a_value_of_the_wrong_type_or_range_is_refused_or_read_as_itself(
    path: tuple[str | int, ...], wrong: object
) -> None:
    with suppress(UsageError, BundleError):
        assert at(path, wire(read(changed(path, wrong)))) == wrong


def test_a_refusal_is_short_and_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="Fix: ") as caught:
        read(changed(("agent",), "x" * 10_000))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("codecs", 1, "records", 0, "weights"), 5),
        (("codecs", 1, "ratio"), 0),
        (("codecs", 1, "ratio"), -1.0),
        (("codecs", 1, "ratio"), 1e300),
        (("codecs", 1, "ratio"), None),
        (("bandwidth",), 0),
        (("bandwidth",), 5e-324),
        (("prefill",), HUGE),
        (("floor", "top1"), HUGE),
        (("policy",), "worst"),
        (("dtype",), "float64"),
        (("accept",), "perfect"),
        (("codecs",), [{}] * 300),
        (("modes",), [3]),
        (("version",), True),
        (("limits", "tokens"), 2**63),
        (("model", "layers"), [0] * 2000),
    ],
    ids=str,
)
def test_a_value_that_would_spoil_the_negotiation_is_refused(path: tuple[str | int, ...], wrong: object) -> None:
    with pytest.raises((UsageError, BundleError)):
        read(changed(path, wrong))
