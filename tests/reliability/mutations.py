"""Bytes and JSON that are nearly right."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from hypothesis import strategies as st

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.sampled_from([2**31, 2**63, 10**400, -1.5, 1e308, float("nan"), "", "exact", "x" * 300, "\ud800", "0" * 64])
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def mutants(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """One of these, with up to three bits flipped, parts cut out, ends cut off, bytes put in or tails exchanged; or
    anything at all.
    """
    data = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 3))):
        at = st.integers(0, len(data)) | st.integers(0, min(len(data), 64))
        begin, end = sorted((draw(at), draw(at)))
        match draw(st.sampled_from(["flip", "cut", "end", "insert", "number", "splice", "any"])):
            case "flip" if begin < len(data):
                data = data[:begin] + bytes([data[begin] ^ (1 << draw(st.integers(0, 7)))]) + data[begin + 1 :]
            case "cut":
                data = data[:begin] + data[end:]
            case "end":
                data = data[:begin]
            case "insert":
                data = data[:begin] + draw(st.binary(max_size=9)) + data[begin:]
            case "number":
                data = data[:begin] + draw(st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\0" * 8])) + data[begin + 4 :]
            case "splice":
                data = data[:begin] + draw(st.sampled_from(originals))[end:]
            case "any":
                data = draw(st.binary(max_size=200))
    return data


@st.composite
def changed(draw: st.DrawFn, value: object) -> object:
    """A JSON value with another value, or none, at a place in it."""
    value = copy.deepcopy(value)
    where, key = None, None
    here = value
    while isinstance(here, dict | list) and here and (where is None or draw(st.integers(0, 3))):
        where = here
        key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        here = here[key]
    if where is None:
        return draw(VALUES)
    if draw(st.booleans()):
        where[key] = draw(VALUES)
    else:
        del where[key]
    return value
