"""A hello that came over a wire is read with suspicion."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp.errors import BundleError, UsageError
from avp.greeting import hello_from_json, hello_to_json
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
OBJECTS = [path for path in [(), *PLACES] if isinstance(changed((*path, "extra"), 0) if path == () else None, dict)]


def read(value: object) -> Hello:
    return hello_from_json(value, limits=Limits())


def test_a_hello_comes_back_as_it_was_sent() -> None:
    assert read(wire()) == HELLO
    plain = Hello("file")
    assert read(wire(plain)) == plain


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PLACES), json_values)
def test_any_value_anywhere_is_read_or_refused_and_what_is_read_can_be_negotiated_with(
    path: tuple[str | int, ...], new: object
) -> None:
    try:
        hello = read(changed(path, new))
    except (UsageError, BundleError):
        return
    for sender, receiver in ((hello, HELLO), (HELLO, hello)):
        try:
            negotiate(sender, receiver, tokens=2**20)
        except Exception as error:
            assert type(error).__name__ == "NoAgreement"
            raise AssertionError from error if type(error).__name__ != "NoAgreement" else None
