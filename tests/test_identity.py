"""Identity: equal weights and layouts are told apart from equal names and shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from avp.errors import BundleError, LimitExceeded, UsageError
from avp.identity import (
    CacheLayout,
    LayerLayout,
    ModelIdentity,
    canonical_json,
    fingerprint,
    identity_from_json,
    identity_to_json,
)

LAYER = LayerLayout(2, 64, window=128, rope='{"theta":1e4}', softcap=50.0, scale=0.0625)
IDENTITY = ModelIdentity("org/name", "llama", "ab" * 32, "cd" * 32, CacheLayout((LAYER, LayerLayout(2, 64), LAYER)))


def test_weights_and_layout_decide_names_do_not() -> None:
    assert IDENTITY.same_weights(replace(IDENTITY, id="other", family="other", tokenizer="other"))
    assert not IDENTITY.same_weights(replace(IDENTITY, weights="ef" * 32))
    assert not IDENTITY.same_weights(replace(IDENTITY, layout=CacheLayout((LAYER,))))
    assert IDENTITY.same_tokenizer(replace(IDENTITY, weights="ef" * 32))
    assert not IDENTITY.same_tokenizer(replace(IDENTITY, tokenizer="ef" * 32))
    assert IDENTITY.describe() == "org/name (weights abababab…)"


@pytest.mark.parametrize(
    "change", [{"kv_heads": 3}, {"head_dim": 65}, {"window": 0}, {"rope": ""}, {"softcap": 0.0}, {"scale": 0.0}]
)
def test_everything_that_changes_the_numbers_of_a_cache_changes_the_digest(change: dict[str, object]) -> None:
    assert CacheLayout((replace(LAYER, **change),)).digest != CacheLayout((LAYER,)).digest  # type: ignore[arg-type]


def test_equal_layouts_have_one_digest_however_their_numbers_are_spelled() -> None:
    whole = CacheLayout((replace(LAYER, softcap=50, scale=0),))
    minus = CacheLayout((replace(LAYER, softcap=50.0, scale=-0.0),))
    assert whole == minus
    assert canonical_json(identity_to_json(replace(IDENTITY, layout=whole))) == canonical_json(
        identity_to_json(replace(IDENTITY, layout=minus))
    )
    assert whole.digest == minus.digest


def test_a_layout_digest_has_a_golden_value() -> None:
    golden = "915ad792c0737ae36da99fcacd8b0bf9d09db8301dadf67ec1e59ccb154a4874"
    assert CacheLayout((LayerLayout(1, 2),)).digest == golden


def test_bytes_per_token_are_those_of_k_and_v_of_every_layer() -> None:
    assert IDENTITY.layout.bytes_per_token("bfloat16") == 3 * 2 * 2 * 64 * 2
    assert IDENTITY.layout.bytes_per_token("float32") == 3 * 2 * 2 * 64 * 4
    with pytest.raises(UsageError, match="dtype 'float8'"):
        IDENTITY.layout.bytes_per_token("float8")


def test_an_identity_comes_back_from_json_with_equal_layers_written_once() -> None:
    value = identity_to_json(IDENTITY)
    assert len(value["layouts"]) == 2  # type: ignore[arg-type]
    assert value["layers"] == [0, 1, 0]
    assert identity_from_json(value, max_layers=3) == IDENTITY


def _changed(**fields: object) -> dict[str, object]:
    return {**identity_to_json(IDENTITY), **fields}


def _layer(**fields: object) -> dict[str, object]:
    whole = identity_to_json(IDENTITY)["layouts"][1]  # type: ignore[index]
    return _changed(layouts=[{**whole, **fields}], layers=[0])


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        _changed(more=1),
        *(_changed(**{name: 5}) for name in ("id", "family", "weights", "tokenizer")),
        _changed(layouts={}),
        _changed(layers={}),
        _changed(layouts=[]),
        _changed(layers=[0]),
        _changed(layers=[0, 1, 2]),
        _changed(layers=[0, 1, -1]),
        _changed(layers=[0, 1, True]),
        _changed(layers=[0, 1, 0.0]),
        _changed(layouts=[5, 5]),
        _changed(layouts=[{}, {}]),
        *(_layer(kv_heads=bad) for bad in (0, -1, 65537, True, 1.0, "1", None)),
        *(_layer(head_dim=bad) for bad in (0, -1, 65537, True, 1.0, "1", None)),
        *(_layer(window=bad) for bad in (-1, 2**31 + 1, 10**4000, True, 0.0)),
        *(_layer(softcap=bad) for bad in (-1, "0", None, False, 10**4000, [])),
        *(_layer(scale=bad) for bad in (-0.5, "0", None, False, 10**4000, {})),
        _layer(rope=None),
        _layer(more=1),
    ],
)
def test_an_identity_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(BundleError, match="Fix: ") as error:
        identity_from_json(value, max_layers=3)
    assert len(str(error.value)) < 500


def test_whole_numbers_are_numbers() -> None:
    assert identity_from_json(_layer(softcap=30, scale=0), max_layers=1).layout.layers[0].softcap == 30.0


def test_more_layers_than_allowed_are_a_limit() -> None:
    with pytest.raises(LimitExceeded, match="3 layers; at most 2 are allowed"):
        identity_from_json(identity_to_json(IDENTITY), max_layers=2)


def test_a_fingerprint_covers_names_shapes_values_and_order() -> None:
    entries = [("a", (2, 3), b"123456"), ("b", (1,), b"7")]
    found = {
        fingerprint(changed)
        for changed in (
            entries,
            entries[::-1],
            [("x", (2, 3), b"123456"), entries[1]],
            [("a", (3, 2), b"123456"), entries[1]],
            [("a", (2, 3), b"123457"), entries[1]],
            [("a", (2, 3), b"12345"), ("b", (1,), b"67")],
            entries[:1],
            [],
        )
    }
    assert len(found) == 8
    assert fingerprint(iter(entries)) == fingerprint(entries)


def test_canonical_json_is_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'
    assert canonical_json({"b": 1, "a": 2}, sort_keys=False) == '{"b":1,"a":2}'


@pytest.mark.parametrize("value", [{1, 2}, b"x", float("nan"), float("inf"), "\ud800", object()])
def test_what_is_no_json_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="cannot be written as JSON"):
        canonical_json({"a": value})


def test_a_value_that_holds_itself_is_refused() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(UsageError, match="cannot be written as JSON"):
        canonical_json(value)
