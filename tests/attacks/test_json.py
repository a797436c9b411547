"""Headers that are no JSON, or more JSON than is good."""

from __future__ import annotations

import json

import pytest

from avp.errors import BundleError, LimitExceeded

from .forge import Abuse, Forgery, check, frame, text_victim, variants, victim


def _manifest_text(change: str, by: str) -> bytes:
    forgery = text_victim()
    text = json.dumps(forgery.manifest)
    assert change in text
    forgery.metadata["avp"] = text.replace(change, by)
    return bytes(forgery)


def _content(literal: str) -> bytes:
    return _manifest_text('"hello"', literal)


def _broken() -> list[bytes]:
    header = victim().header()
    return [
        *(frame(text) for text in (b"{", b"{}}", b"[]", b"null", b'"x"', b"7", b"{'a':1}", b"\x00" * 64, header[:-1])),
        frame(b" " + header, victim().payload),
        frame(header + b"\0", victim().payload),
    ]


def _no_utf8() -> list[bytes]:
    header = text_victim().header()
    return [frame(header.replace(b"hello", bad)) for bad in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80")]


def _surrogates() -> list[bytes]:
    header = text_victim().header()
    outer = frame(header.replace(b"hello", b"\\ud800"))
    return [outer, _content(r'"\ud800"'), _content(r'"\uDFFF"'), _content(r'{"\udc00":1}')]


def _twice() -> list[bytes]:
    header = victim().header()
    return [
        frame(header[:-1] + b',"0/0/k":{"dtype":"F32","shape":[2,40,8],"data_offsets":[0,2560]}}', victim().payload),
        frame(header.replace(b'"dtype"', b'"dtype":"F16","dtype"', 1), victim().payload),
        frame(header[:-1] + b',"__metadata__":{}}', victim().payload),
        _manifest_text('"kind"', '"kind":"kv","kind"'),
        _content('{"a":1,"a":2}'),
    ]


def _deep() -> list[bytes]:
    return [
        frame(b'{"a":' * 30_000 + b"1" + b"}" * 30_000),
        frame(b"[" * 60_000),
        frame(b'{"a":' + b"[" * 60_000 + b"]" * 60_000 + b"}"),
        _content("[" * 60_000 + "]" * 60_000),
    ]


def _numbers() -> list[bytes]:
    return [
        _content(literal)
        for literal in ("NaN", "Infinity", "-Infinity", "1e999", "-1e400", "9" * 5000, "-" + "9" * 5000)
    ]


def _many() -> list[bytes]:
    return [frame(b'{"a":[' + b"[]," * 900_000 + b"[]]}"), _content("[" + "{}," * 900_000 + "{}]")]


def _metadata(forgery: Forgery, value: object) -> None:
    forgery.metadata = value  # type: ignore[assignment]


def _no_manifest() -> list[bytes]:
    payload = victim().payload
    table = victim().table
    whole: list[object] = [
        None,
        [],
        "avp",
        {},
        {"format": "pt"},
        {"format": "avp"},
        {"avp": "{}"},
        {"format": "avp", "avp": {}},
    ]
    return [frame(json.dumps({"__metadata__": value, **table}).encode(), payload) for value in whole]


def _manifest_no_json() -> list[bytes]:
    made = []
    for text in ("", "x", "[]", "null", "{", '{"avp":1', "\x00", "7"):
        forgery = victim()
        forgery.metadata["avp"] = text
        made.append(bytes(forgery))
        made.append(frame(b'{"__metadata__":{"avp":' + json.dumps(text).encode() + b',"format":"avp"}}'))
    return made


ABUSES = [
    Abuse(
        "__metadata__ holds another field",
        variants(_metadata, [{"format": "avp", "x": "y"}, {"format": "avp", "": 5}]),
        BundleError,
    ),
    Abuse("the header is no JSON object", _broken, BundleError),
    Abuse("the header is not UTF-8", _no_utf8, BundleError),
    Abuse("half a surrogate pair is smuggled in by an escape", _surrogates, BundleError),
    Abuse("a key comes twice", _twice, BundleError),
    Abuse("JSON is nested tens of thousands deep", _deep, BundleError),
    Abuse("NaN, infinity, 1e999 or a number of 5,000 digits", _numbers, BundleError),
    Abuse("a million empty lists", _many, LimitExceeded),
    Abuse("__metadata__ holds no manifest", _no_manifest, BundleError),
    Abuse("the manifest is no JSON object", _manifest_no_json, BundleError),
    Abuse("a safetensors file of another writer", variants(_metadata, [{"format": "pt", "avp": "{}"}]), BundleError),
]


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda abuse: abuse.name)
def test_refused(abuse: Abuse) -> None:
    check(abuse)
