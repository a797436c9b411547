"""A manifest is read with suspicion: every field checked, every error short and with a way out."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest

from avp.bundle import peek
from avp.context import Context, Turn, text_context
from avp.errors import BundleError, LimitExceeded, UnsupportedBundle
from avp.manifest import Limits, manifest_to_json, parse_json, parse_manifest
from avp.segment import LATENT, Exactness
from avp.testing import synthetic_context

from .samples import bundle_of, kv_context, subset

LIMITS = Limits()


def _manifest(context: Context | None = None) -> dict[str, object]:
    """The manifest of a context, as the JSON of its bundle has it."""
    if context is None:
        context = kv_context(range(300), turns=(Turn({"role": "user", "content": "x"}, (0, 9)),))
    return _of(context.to_bytes())


def _of(data: bytes) -> dict[str, object]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["avp"])  # type: ignore[no-any-return]


WHOLE = _manifest()
HIDDEN = {"dtype": "float32", "shape": [2, 3], "digest": "00" * 16}


def _with(*path: object, value: object) -> dict[str, object]:
    changed = deepcopy(WHOLE)
    inner: object = changed
    for key in path[:-1]:
        inner = inner[key]  # type: ignore[index]
    inner[path[-1]] = value  # type: ignore[index]
    return changed


def test_a_manifest_comes_back() -> None:
    manifest = parse_manifest(WHOLE, LIMITS)
    assert (manifest.kind, manifest.length, len(manifest.segments)) == ("kv", 300, 2)
    assert manifest.turns == (Turn({"role": "user", "content": "x"}, (0, 9)),)


def test_the_keys_of_messages_and_template_keep_their_order() -> None:
    message = {"role": "user", "content": {"b": 1, "a": 2}, "aa": 3}
    context = kv_context(range(3), turns=(Turn(message),), template={"z": 1, "a": 2})
    manifest = parse_manifest(json.loads(manifest_to_json(peek(context.to_bytes()))), LIMITS)
    assert list(manifest.turns[0].message) == ["role", "content", "aa"]
    assert list(manifest.turns[0].message["content"]) == ["b", "a"]  # type: ignore[arg-type]
    assert list(manifest.template) == ["z", "a"]


@pytest.mark.parametrize("field", WHOLE)
def test_every_field_is_needed(field: str) -> None:
    with pytest.raises(BundleError, match="Fix: "):
        parse_manifest({name: value for name, value in WHOLE.items() if name != field}, LIMITS)


def test_no_other_field_is_taken() -> None:
    with pytest.raises(BundleError, match=r"differ from format 1: \['more'\]"):
        parse_manifest({**WHOLE, "more": 1}, LIMITS)


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None, [], "x" * 1000])
def test_another_version_is_unsupported(version: object) -> None:
    with pytest.raises(UnsupportedBundle, match=r"this reader knows 1\. Fix: upgrade avp"):
        parse_manifest(_with("avp", value=version), LIMITS)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kind",), "weights"),
        (("kind",), ["kv"]),
        (("exactness",), "Exact"),
        (("exactness",), 0),
        (("exactness",), None),
        (("segments", 0, "exactness"), "perfect"),
        (("segments", 0, "dtype"), "float64"),
        (("segments", 0, "dtype"), ["float32"]),
        (("hidden",), {**HIDDEN, "dtype": "float8"}),
    ],
)
def test_a_word_that_this_reader_does_not_know_is_unsupported(path: tuple[object, ...], value: object) -> None:
    with pytest.raises(UnsupportedBundle, match="Fix: "):
        parse_manifest(_with(*path, value=value), LIMITS)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (("tokens",), [{}, "12", [1.0] * 300, [True] * 300, [-2] * 300, [2**31] * 300, [None], [10**400] * 300, []]),
        (("length",), [-1, 301, 1.0, True, None, "300", 10**400]),
        (("model",), [None, 5]),
        (("template",), [None, [], "x"]),
        (("turns",), [None, {}, [5], [{}], [{"message": {}}], [{"message": [], "opaque": None}]]),
        (("turns", 0, "message"), [None, [], {"role": 5}, {"role": None}]),
        (("turns", 0, "opaque"), [[], [1], [1, 2, 3], {}, 5, [2, 1], [-1, 1], [0, 301], [0.0, 1], [True, 2]]),
        (("segments",), [None, {}, [5], [{}], [None]]),
        (("segments", 0, "start"), [-32, 1, 31, 300, 2**63, 0.0, None]),
        (("segments", 0, "count"), [0, -1, 257, 255, 301, 2**63, 256.0, None]),
        (("segments", 1, "start"), [0, 32, 224, 288]),
        (("segments", 0, "pages"), ["", "00" * 256, "zz" * 256, None, 5, "AA" * 256, "0 " * 256, "0" * 511]),
        (("segments", 0, "parent"), [None, 5, "", "00", "00" * 31, "00" * 33, "zz" * 32, "AA" * 32]),
        (("segments", 0, "codec"), [None, 5, ["raw"]]),
        (("segments", 0, "engine"), [None, 5, ["transformers"]]),
        (("segments", 0, "digests"), [None, 5, "zz", "0", "AA" * 128]),
        (("segments", 0, "more"), [1]),
        (("hidden",), [5, [], {}, {**HIDDEN, "more": 1}]),
        (
            ("hidden",),
            [{**HIDDEN, "shape": bad} for bad in (None, 5, [], [1], [1, 2, 3], [-1, 2], [1.0, 2], [2**32, 1])],
        ),
        (("hidden",), [{**HIDDEN, "digest": bad} for bad in (None, "", "00" * 15, "00" * 17, "zz" * 16, "AA" * 16)]),
    ],
)
def test_a_field_of_the_wrong_form_is_refused_in_few_words(path: tuple[object, ...], values: list[object]) -> None:
    for value in values:
        with pytest.raises(BundleError, match="Fix: ") as error:
            parse_manifest(_with(*path, value=value), LIMITS)
        assert len(str(error.value)) < 500


def test_page_ids_must_follow_from_the_tokens() -> None:
    with pytest.raises(BundleError, match="page at position 0 does not follow"):
        parse_manifest(_with("tokens", 0, value=7), LIMITS)
    with pytest.raises(BundleError, match="page at position 256 does not follow"):
        parse_manifest(_with("tokens", 257, value=7), LIMITS)
    lie = "0" * 64 + str(WHOLE["segments"][0]["pages"])[64:]  # type: ignore[index]
    with pytest.raises(BundleError, match="page at position 0 does not follow"):
        parse_manifest(_with("segments", 0, "pages", value=lie), LIMITS)


def test_page_ids_after_a_gap_follow_from_the_parent_that_is_told() -> None:
    for name in ("pages", "parent"):
        whole = _manifest(subset(kv_context(range(600)), 1))
        entry = whole["segments"][0]  # type: ignore[index]
        entry[name] = "0" * 64 + entry[name][64:]
        with pytest.raises(BundleError, match="page at position 256 does not follow"):
            parse_manifest(whole, LIMITS)


def test_a_segment_follows_the_one_before_it_and_the_first_the_root() -> None:
    for number, position in ((0, 0), (1, 256)):
        with pytest.raises(BundleError, match=f"segment at position {position} does not follow from the page before"):
            parse_manifest(_with("segments", number, "parent", value="00" * 32), LIMITS)


def test_page_ids_of_latent_positions_cannot_be_checked_but_those_after_them_can() -> None:
    whole = _manifest(kv_context([LATENT, *range(40)]))
    pages = whole["segments"][0]["pages"]  # type: ignore[index]
    whole["segments"][0]["pages"] = "0" * 64 + pages[64:]  # type: ignore[index]
    with pytest.raises(BundleError, match="page at position 32 does not follow"):
        parse_manifest(whole, LIMITS)


def test_a_kind_holds_what_its_name_says() -> None:
    text = _manifest(text_context("x"))
    for kind, message in (("kv", "names no model"), ("hidden", "no hidden states"), ("tokens", "names no model")):
        with pytest.raises(BundleError, match=message):
            parse_manifest({**text, "kind": kind}, LIMITS)
    for kind in ("hidden", "tokens", "text"):
        with pytest.raises(BundleError, match=f"a bundle of kind {kind} holds KV"):
            parse_manifest({**WHOLE, "kind": kind}, LIMITS)


def test_a_token_yet_to_be_computed_has_an_id() -> None:
    pending = _manifest(kv_context(range(3), pending=(5,)))
    with pytest.raises(BundleError, match="yet to be computed"):
        parse_manifest({**pending, "tokens": [0, 1, 2, LATENT]}, LIMITS)


def test_a_context_is_as_exact_as_its_worst_segment() -> None:
    assert parse_manifest(_with("segments", 1, "exactness", value="bounded"), LIMITS).exactness is Exactness.BOUNDED
    assert parse_manifest(_with("exactness", value="text"), LIMITS).exactness is Exactness.TEXT


def test_latent_positions_are_approximate_whatever_their_sender_claims() -> None:
    whole = _manifest(kv_context([*range(256), LATENT]))
    for part in (whole, *whole["segments"]):  # type: ignore[misc]
        part["exactness"] = "exact"
    found = parse_manifest(whole, LIMITS)
    assert [entry.exactness for entry in found.segments] == [Exactness.EXACT, Exactness.APPROXIMATE]
    assert found.exactness is Exactness.APPROXIMATE


def test_tokens_beyond_the_limit_are_a_limit() -> None:
    with pytest.raises(LimitExceeded, match="300 tokens; at most 299"):
        parse_manifest(WHOLE, Limits(tokens=299))


# --- one segment alone

ALONE = _of(bundle_of(kv_context(range(300)), kv_context(range(300)).segments[1]))


def _alone(name: str, value: object) -> dict[str, object]:
    changed = deepcopy(ALONE)
    changed["segments"][0][name] = value  # type: ignore[index]
    return changed


def test_a_segment_alone_starts_anywhere_and_its_tokens_are_its_own() -> None:
    found = parse_manifest(ALONE, LIMITS)
    assert (found.kind, found.tokens, found.length) == ("segment", tuple(range(256, 300)), 44)
    assert [(entry.start, entry.count, entry.engine) for entry in found.segments] == [(256, 44, "synthetic")]
    for start in (0, 32, LIMITS.tokens):
        assert parse_manifest(_alone("start", start), LIMITS).segments[0].start == start


def test_a_segment_starts_within_the_limit_of_tokens() -> None:
    for start in (288, 2**40, 2**63):
        with pytest.raises(LimitExceeded, match=r"at most 256 is allowed\. Fix: raise Limits\.tokens"):
            parse_manifest(_alone("start", start), Limits(tokens=256))


@pytest.mark.parametrize("start", [1, 31, 257, -32, 2**64, None, 32.0])
def test_a_segment_starts_at_a_page(start: object) -> None:
    with pytest.raises(BundleError, match="start"):
        parse_manifest(_alone("start", start), LIMITS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("segments", []),
        ("segments", ALONE["segments"] * 2),  # type: ignore[operator]
        ("turns", [{"message": {"role": "user"}, "opaque": None}]),
        ("template", {"a": 1}),
        ("hidden", HIDDEN),
        ("length", 0),
        ("length", 43),
        ("tokens", [*range(256, 301)]),
        ("model", None),
    ],
)
def test_a_segment_alone_is_one_and_nothing_else(field: str, value: object) -> None:
    with pytest.raises(BundleError, match="Fix: "):
        parse_manifest({**ALONE, field: value}, LIMITS)


@pytest.mark.parametrize("count", [0, 1, 32, 43, 45, 256, 2**63])
def test_a_segment_alone_counts_all_of_its_tokens(count: int) -> None:
    with pytest.raises(BundleError, match="Fix: "):
        parse_manifest(_alone("count", count), LIMITS)


def test_a_segment_alone_of_another_kind_is_no_context() -> None:
    for kind in ("kv", "hidden", "tokens", "text"):
        with pytest.raises(BundleError, match="Fix: "):
            parse_manifest({**ALONE, "kind": kind}, LIMITS)


# --- JSON


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "a JSON list, not an object"),
        (b"null", "a JSON NoneType, not an object"),
        (b"{'a':1}", "not JSON"),
        (b'{"a":1,}', "not JSON"),
        (b'{"a":01}', "not JSON"),
        (b'{"a":1} x', "not JSON"),
        (b'\xef\xbb\xbf{"a":1}', "not JSON"),
        (b'{"a":"\xff"}', "not UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a":"\\ud800"}', "half a surrogate pair"),
        (b'{"\\uDC00":1}', "half a surrogate pair"),
        (b'{"a":NaN}', "holds NaN"),
        (b'{"a":-Infinity}', "holds -Infinity"),
        (b'{"a":1e999}', "holds 1e999"),
        (b'{"a":-1e999}', "holds -1e999"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a":1,"a":2}', "'a' twice"),
        (b'{"b":{"a":1,"c":3,"a":1}}', "'a' twice"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "more lists and objects|nested too deeply"),
        (b'{"a":' + b"[" * 60_000 + b"]" * 60_000 + b"}", "nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message) as error:
        parse_json(raw, LIMITS)
    assert len(str(error.value)) < 500


def test_a_surrogate_pair_is_one_character() -> None:
    assert parse_json(b'{"a":"\\ud83c\\udf0d"}', LIMITS) == {"a": "🌍"}


def test_many_keys_of_which_the_last_comes_twice_are_refused_in_linear_time() -> None:
    # Counted, not timed: each key is looked at once. Quadratic search would take hours here.
    raw = b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b',"199999":0}'
    with pytest.raises(BundleError, match="'199999' twice"):
        parse_json(raw, LIMITS)


def test_lists_and_objects_are_counted_before_they_are_made() -> None:
    with pytest.raises(LimitExceeded, match=r"Fix: raise Limits\.tensors"):
        parse_json(b'{"a":[' + b"{}," * 70_000 + b"{}]}", Limits(tensors=1))


def test_synthetic_contexts_have_valid_manifests() -> None:
    for tokens in (0, 1, 300):
        assert parse_manifest(_manifest(synthetic_context(tokens=tokens)), LIMITS).length == tokens
