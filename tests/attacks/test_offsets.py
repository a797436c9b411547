"""Tensor tables that lie: where tensors are, how large, of what kind, and which there are."""

from __future__ import annotations

import pytest

from avp.errors import BundleError, DigestMismatch

from .forge import Abuse, Forgery, check, variants, victim

FIRST, SECOND = "0/0/k", "0/0/v"
SIZE = 40 * 2 * 8 * 4


def _offsets(name: str) -> object:
    def change(forgery: Forgery, value: object) -> None:
        forgery.entry(name)["data_offsets"] = value

    return change


def _entry(key: str) -> object:
    def change(forgery: Forgery, value: object) -> None:
        forgery.entry(FIRST)[key] = value

    return change


def _shift_all(forgery: Forgery, value: object) -> None:
    for entry in forgery.table.values():
        entry["data_offsets"] = [offset + value for offset in entry["data_offsets"]]  # type: ignore[index]
    forgery.payload = bytes(value) + forgery.payload  # type: ignore[call-overload]


def _swap_order(forgery: Forgery, value: object) -> None:
    forgery.table = dict(sorted(forgery.table.items(), reverse=True))


def _rename(forgery: Forgery, value: object) -> None:
    forgery.table = {str(value) if name == FIRST else name: entry for name, entry in forgery.table.items()}


def _drop(forgery: Forgery, value: object) -> None:
    del forgery.table[str(value)]


def _add(forgery: Forgery, value: object) -> None:
    forgery.table["extra"] = {"dtype": "U8", "shape": [value], "data_offsets": [4 * SIZE, 4 * SIZE + value]}  # type: ignore[operator]
    forgery.payload += bytes(value)  # type: ignore[call-overload]


def _replace_entry(forgery: Forgery, value: object) -> None:
    forgery.table[FIRST] = value


def _lossless() -> Forgery:
    return victim(codec="lossless")


def _flip(forgery: Forgery, value: object) -> None:
    payload = bytearray(forgery.payload)
    payload[value] ^= 1  # type: ignore[index]
    forgery.payload = bytes(payload)


def _swap_payload(forgery: Forgery, value: object) -> None:
    forgery.payload = forgery.payload[SIZE : 2 * SIZE] + forgery.payload[:SIZE] + forgery.payload[2 * SIZE :]


def _swap_digests(forgery: Forgery, value: object) -> None:
    digests = str(forgery.segment()["digests"])
    forgery.segment()["digests"] = digests[32:64] + digests[:32] + digests[64:]


def _free_length() -> list[bytes]:
    made = []
    for shape in ([-1], [2**40], [2**63], [2**64], [1.0], ["1"], [True], [], [1, 1], None, {}, 5):
        forgery = victim(codec="lossless")
        forgery.entry("0/0/k.exp")["shape"] = shape
        made.append(bytes(forgery))
    forgery = victim(codec="lossless")
    forgery.table["0/0/k.exp"] = None
    return [*made, bytes(forgery)]


OVERLAPS = [[0, SIZE], [SIZE - 1, 2 * SIZE - 1], [SIZE // 2, SIZE + SIZE // 2]]
GAPS = [[SIZE + 1, 2 * SIZE + 1], [SIZE, 2 * SIZE + 4], [SIZE + 64, 2 * SIZE + 64]]
LIES = [[SIZE, SIZE], [2 * SIZE, SIZE], [-SIZE, 0], [2**63, 2**63 + SIZE], [SIZE, 2**64], [-(2**63), SIZE]]
NO_NUMBERS = [[0.0, SIZE], [False, SIZE], ["0", SIZE], [0], [0, SIZE, SIZE], {}, None, 0]

ABUSES = [
    Abuse("two tensors overlap", variants(_offsets(SECOND), OVERLAPS), BundleError),
    Abuse("a gap lies between two tensors", variants(_offsets(SECOND), GAPS), BundleError),
    Abuse("bytes lie before the first tensor", variants(_shift_all, [1, 64]), BundleError),
    Abuse("offsets run backwards, below 0 or past 2^63", variants(_offsets(SECOND), LIES), BundleError),
    Abuse("offsets are no whole numbers", variants(_offsets(FIRST), NO_NUMBERS), BundleError),
    Abuse(
        "the dtype of a tensor is another", variants(_entry("dtype"), ["F16", "I32", "F64", "", None, 5]), BundleError
    ),
    Abuse(
        "the shape of a tensor is another",
        variants(_entry("shape"), [[40, 2, 8], [2, 40], [640], [2, 40, -8], [2, 40, 2**62], [2.0, 40, 8], None, []]),
        BundleError,
    ),
    Abuse("a table entry has another field", variants(_entry("more"), [1]), BundleError),
    Abuse("a table entry is no object", variants(_replace_entry, [None, 5, [], "x", True]), BundleError),
    Abuse("a tensor is missing", variants(_drop, [FIRST, "0/1/v"]), BundleError),
    Abuse("a tensor is there that the manifest does not imply", variants(_add, [0, 1, 64]), BundleError),
    Abuse(
        "a tensor has another name",
        variants(_rename, ["1/0/k", "0/0/K", "", "../../etc/passwd", "hidden"]),
        BundleError,
    ),
    Abuse("the tensors are in another order", variants(_swap_order, [0]), BundleError),
    Abuse("a compressed tensor has no length, or one of 2^40 or more", _free_length, BundleError),
]
DIGESTS = [
    Abuse("a bit of a tensor is flipped", variants(_flip, [0, 1, SIZE - 1, SIZE, 4 * SIZE - 1]), DigestMismatch),
    Abuse("a bit of a compressed tensor is flipped", variants(_flip, [0, -1], of=_lossless), DigestMismatch),
    Abuse("K and V change places", variants(_swap_payload, [0]), DigestMismatch),
    Abuse("the digests of K and V change places", variants(_swap_digests, [0]), DigestMismatch),
]
ABUSES += DIGESTS


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda abuse: abuse.name)
def test_refused(abuse: Abuse) -> None:
    check(abuse)
