"""Small bundles that claim much: tokens, layers, tensors, lengths of 2^63."""

from __future__ import annotations

import json

import pytest

from avp.errors import BundleError, LimitExceeded, TruncatedBundle
from avp.manifest import Limits

from .forge import Abuse, Forgery, check, field_of, frame, honest_pages, variants, victim

LAYER = {"kv_heads": 1, "head_dim": 1, "window": 0, "rope": "", "softcap": 0.0, "scale": 0.0}


def _long_header() -> list[bytes]:
    return [size.to_bytes(8, "little") + b"{}" for size in (2**25 + 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)]


def _short_header() -> list[bytes]:
    return [size.to_bytes(8, "little") + b"{}" for size in (3, 1000, 2**25)]


def _tokens() -> list[bytes]:
    forgery = victim()
    forgery.manifest["tokens"] = [0] * 1001
    return [bytes(forgery)]


def _layers() -> list[bytes]:
    forgery = victim()
    forgery.manifest["model"]["layers"] = [0] * 1025  # type: ignore[index]
    return [bytes(forgery)]


def _wide_layers() -> list[bytes]:
    """One token in heads of 2^32 numbers a layer: terabytes, of which nothing came."""
    forgery = victim(tokens=1)
    forgery.manifest["model"]["layouts"] = [{**LAYER, "kv_heads": 2**16, "head_dim": 2**16}]  # type: ignore[index]
    honest_pages(forgery)
    size = 2**34
    for number, entry in enumerate(forgery.table.values()):
        entry.update(shape=[2**16, 1, 2**16], data_offsets=[number * size, (number + 1) * size])  # type: ignore[attr-defined]
    return [bytes(forgery)]


def _implied(layers: int, segments: int) -> Forgery:
    """A manifest of some kilobytes that implies layers x segments x 2 tensors, without their digests."""
    forgery = victim(tokens=1)
    forgery.manifest["model"]["layouts"] = [LAYER]  # type: ignore[index]
    forgery.manifest["model"]["layers"] = [0] * layers  # type: ignore[index]
    forgery.manifest["tokens"] = [-1] * (32 * segments)
    forgery.manifest["length"] = 32 * segments
    one = {**forgery.segment(), "count": 1}
    forgery.manifest["segments"] = [{**one, "start": 32 * number, "digests": ""} for number in range(segments)]
    honest_pages(forgery)
    forgery.table = {}
    forgery.payload = b""
    return forgery


def _header_of_own_spelling(forgery: Forgery) -> bytes:
    text = json.dumps(json.dumps(forgery.manifest)).encode()
    return frame(b'{"__metadata__":{"avp":' + text + b',"format":"avp"}}')


def _many_tensors() -> list[bytes]:
    forgery = _implied(1024, 129)
    return [bytes(forgery), _header_of_own_spelling(forgery)]


def _without_digests() -> list[bytes]:
    forgery = _implied(1024, 128)
    return [bytes(forgery), _header_of_own_spelling(forgery)]


def _table() -> list[bytes]:
    forgery = victim()
    forgery.table.update({f"x{i}": 0 for i in range(2000)})
    return [bytes(forgery)]


def _hidden() -> list[bytes]:
    made = []
    for shape in ([2**31, 2**31], [2**31, 1], [1, 2**31]):
        forgery = victim(tokens=0)
        forgery.manifest["kind"] = "hidden"
        forgery.manifest["hidden"] = {"dtype": "float32", "shape": shape, "digest": "00" * 16}
        size = 4 * shape[0] * shape[1]
        forgery.table = {"hidden": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
        made.append(bytes(forgery))
    return made


HUGE = [2**31 + 1, 2**63, 2**64, 10**400]

ABUSES = [
    Abuse("the header claims 32 MiB to 2^64 - 1 bytes", _long_header, LimitExceeded),
    Abuse("the header claims more bytes than came", _short_header, TruncatedBundle),
    Abuse("more tokens than the limit", _tokens, LimitExceeded, Limits(tokens=1000)),
    Abuse("more layers than the limit", _layers, LimitExceeded),
    Abuse("layers of 2^32 numbers a token", _wide_layers, TruncatedBundle),
    Abuse("a few kilobytes imply more tensors than the limit", _many_tensors, LimitExceeded),
    Abuse("a few kilobytes imply 262,144 tensors without their digests", _without_digests, BundleError),
    Abuse("more tensors in the table than the limit", _table, LimitExceeded, Limits(tensors=1000)),
    Abuse("hidden states of up to 2^62 numbers", _hidden, TruncatedBundle),
    Abuse(
        "hidden states of more than 2^31 rows",
        variants(field_of("hidden"), [{"dtype": "float32", "shape": [size, 1], "digest": "00" * 16} for size in HUGE]),
        BundleError,
    ),
    Abuse("a length of 2^63", variants(field_of("length"), HUGE), BundleError),
    Abuse("a segment starts at 2^63", variants(field_of("segments", 0, "start"), HUGE), BundleError),
    Abuse("a segment counts 2^63 positions", variants(field_of("segments", 0, "count"), HUGE), BundleError),
    Abuse("2^63 heads", variants(field_of("model", "layouts", 0, "kv_heads"), HUGE), BundleError),
    Abuse("a head of 2^63 numbers", variants(field_of("model", "layouts", 0, "head_dim"), HUGE), BundleError),
    Abuse("a window of 2^63", variants(field_of("model", "layouts", 0, "window"), HUGE), BundleError),
    Abuse("a softcap that no float holds", variants(field_of("model", "layouts", 0, "softcap"), HUGE), BundleError),
]


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda abuse: abuse.name)
def test_refused(abuse: Abuse) -> None:
    check(abuse)
