"""Manifests that say what is not so, or what this reader does not know."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from avp.errors import BundleError, UnsupportedBundle
from avp.segment import page_ids
from avp.testing import synthetic_context

from .forge import Abuse, Forgery, check, field_of, text_victim, variants, victim


def _foreign(forgery: Forgery, value: object) -> None:
    forgery.manifest["model"][value] = "x"  # type: ignore[index]


def _no_model() -> list[bytes]:
    forgery = victim()
    forgery.manifest["model"] = None
    forgery.manifest["segments"] = []
    forgery.table, forgery.payload = {}, b""
    return [bytes(forgery)]


def _text_with(name: str, value: object) -> list[bytes]:
    forgery = text_victim()
    forgery.manifest[name] = value
    return [bytes(forgery)]


def _own_spelling_of_unknown_codec() -> list[bytes]:
    data = synthetic_context(tokens=3).to_bytes()
    return [data.replace(rb"\"codec\":\"raw\"", rb"\"codec\":\"rat\"")]


def _dtype_of_codec() -> list[bytes]:
    forgery = victim(codec="lossless")
    forgery.segment()["dtype"] = "int8"
    return [bytes(forgery)]


def _pages(forgery: Forgery, value: object) -> None:
    pages = str(forgery.segment()["pages"])
    at = int(str(value))
    forgery.segment()["pages"] = pages[:at] + ("0" if pages[at] != "0" else "1") + pages[at + 1 :]


def _overlap() -> list[bytes]:
    forgery = victim(tokens=300)
    forgery.manifest["segments"] = [forgery.segment(1), forgery.segment(0)]
    again = victim(tokens=300)
    again.manifest["segments"] = [again.segment(0), again.segment(0)]
    return [bytes(forgery), bytes(again)]


def _foreign_parent() -> list[bytes]:
    """A parent and page ids that agree with each other, of a tenant's chain."""
    forgery = victim(tokens=300)
    tokens: Sequence[int] = forgery.manifest["tokens"][256:]  # type: ignore[index]
    forgery.segment(1).update(parent="ab" * 32, pages="".join(page_ids("ab" * 32, tokens)))
    return [bytes(forgery)]


def _second_without_digests() -> list[bytes]:
    forgery = victim(tokens=512)
    forgery.segment(1)["digests"] = ""
    return [bytes(forgery)]


OPAQUE = [[0, 41], [-1, 3], [5, 4], [2**63, 2**63], [0], [0, 1, 2], "01", {}, [0.0, 1], [None, 1]]
WORDS = ["", "KV", "weights", "x" * 10_000, None, 5, [], {}]
LINKS = ["../../etc/passwd", "os:system", "avp.codecs.raw:CODEC", "RAW", "", "x" * 100_000]

ABUSES = [
    Abuse("digests for the first segment alone", _second_without_digests, BundleError),
    Abuse(
        "another format version",
        variants(field_of("avp"), [0, 2, "1", 1.0, True, None, "x" * 10_000]),
        UnsupportedBundle,
    ),
    Abuse("an unknown kind", variants(field_of("kind"), WORDS), UnsupportedBundle),
    Abuse("an unknown dtype", variants(field_of("segments", 0, "dtype"), WORDS), UnsupportedBundle),
    Abuse("an unknown exactness", variants(field_of("exactness"), ["EXACT", "perfect", *WORDS]), UnsupportedBundle),
    Abuse(
        "an unknown codec, or a path as its name", variants(field_of("segments", 0, "codec"), LINKS), UnsupportedBundle
    ),
    Abuse("an unknown codec in the writer's own spelling", _own_spelling_of_unknown_codec, UnsupportedBundle),
    Abuse("a dtype that the codec does not take", _dtype_of_codec, BundleError),
    Abuse("a field that the format does not have", variants(field_of("more"), [1, None]), BundleError),
    Abuse("a foreign field in the identity", variants(_foreign, ["more", "__class__", "path"]), BundleError),
    Abuse("an identity without fingerprint", variants(field_of("model", "weights"), [None, 5, [], {}]), BundleError),
    Abuse(
        "other weights than the pages are of", variants(field_of("model", "weights"), ["0" * 63 + "1", ""]), BundleError
    ),
    Abuse(
        "another window than the pages are of",
        variants(field_of("model", "layouts", 0, "window"), [1, 4096]),
        BundleError,
    ),
    Abuse(
        "a layer of a layout that is not there",
        variants(field_of("model", "layers"), [[0, 1], [-1, 0], [0, True]]),
        BundleError,
    ),
    Abuse("a layer too few for the tensors", variants(field_of("model", "layers"), [[0], [0, 0, 0], []]), BundleError),
    Abuse("KV without a model", _no_model, BundleError),
    Abuse("KV in a bundle of kind text", lambda: _text_with("length", 1), BundleError),
    Abuse("a kind of hidden without hidden states", lambda: _text_with("kind", "hidden"), BundleError),
    Abuse("a page id that does not follow from the tokens", variants(_pages, [0, 63, 64, 127]), BundleError),
    Abuse(
        "page ids for other pages",
        variants(field_of("segments", 0, "pages"), ["", "00" * 32, "00" * 96, 5]),
        BundleError,
    ),
    Abuse("other tokens than the pages are of", variants(field_of("tokens"), [[1] * 40, [0] * 40]), BundleError),
    Abuse(
        "token ids below -1, beyond 2^31 - 1, or none",
        variants(field_of("tokens", 0), [-2, 2**31, 1.0, True, None, "1"]),
        BundleError,
    ),
    Abuse("opaque positions out of bounds", variants(field_of("turns", 0, "opaque"), OPAQUE), BundleError),
    Abuse(
        "a turn that is no message",
        variants(field_of("turns", 0, "message"), [None, [], "x", {"role": 5}]),
        BundleError,
    ),
    Abuse(
        "a parent that is not the page before",
        variants(field_of("segments", 0, "parent"), ["00" * 32, "", "zz", "AA" * 32, None, 5]),
        BundleError,
    ),
    Abuse("a second segment that does not follow from the first", _foreign_parent, BundleError),
    Abuse("an engine that is no string", variants(field_of("segments", 0, "engine"), [None, 5, [], {}]), BundleError),
    Abuse("segments that overlap or run backwards", _overlap, BundleError),
    Abuse("a segment between two pages", variants(field_of("segments", 0, "start"), [1, 31, -32]), BundleError),
    Abuse(
        "digests too few or too many",
        variants(field_of("segments", 0, "digests"), ["", "00" * 16, "00" * 160]),
        BundleError,
    ),
]


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda abuse: abuse.name)
def test_refused(abuse: Abuse) -> None:
    check(abuse)
