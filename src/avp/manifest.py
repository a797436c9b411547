"""The manifest of a bundle: what it says, read with suspicion (docs/spec/bundle.md)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite

from avp.buffers import STORAGE
from avp.context import KINDS, Turn
from avp.errors import BundleError, LimitExceeded, UnsupportedBundle
from avp.identity import ModelIdentity, canonical_json, identity_from_json, identity_to_json
from avp.segment import LATENT, PAGE, SEGMENT, Exactness, page_id, root_page, worst

VERSION = 1
_KINDS = (*KINDS, "segment")
_ASK = "Fix: ask the sender for a valid bundle."


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader accepts; each is checked before anything is allocated for it.

    bytes: of the whole bundle. header: bytes of its JSON. tensors, layers, tokens: counts. ratio: bytes of a decoded
    tensor over bytes that came in.
    """

    bytes: int = 2**36
    header: int = 2**25
    tensors: int = 2**18
    layers: int = 1024
    tokens: int = 2**20
    ratio: int = 64


@dataclass(frozen=True, slots=True)
class SegmentEntry:
    """One segment in the manifest; `digests` are the xxh3-128 of its tensors in file order, 16 bytes each."""

    start: int
    count: int
    parent: str
    pages: tuple[str, ...]
    codec: str
    dtype: str
    engine: str
    exactness: Exactness
    digests: bytes


@dataclass(frozen=True, slots=True)
class HiddenEntry:
    """The hidden states in the manifest."""

    dtype: str
    shape: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle holds, from its header alone.

    Of kind "segment" it is one segment and no context: `tokens` are those of the segment, wherever it starts.
    """

    kind: str
    model: ModelIdentity | None
    tokens: tuple[int, ...]
    length: int
    turns: tuple[Turn, ...]
    template: Mapping[str, object]
    exactness: Exactness
    segments: tuple[SegmentEntry, ...]
    hidden: HiddenEntry | None


def manifest_to_json(manifest: Manifest) -> str:
    """The manifest as JSON: deterministic, so equal contexts give equal bytes."""
    hidden = manifest.hidden
    value: dict[str, object] = {
        "avp": VERSION,
        "kind": manifest.kind,
        "model": identity_to_json(manifest.model) if manifest.model else None,
        "tokens": list(manifest.tokens),
        "length": manifest.length,
        "turns": [
            {"message": dict(turn.message), "opaque": turn.opaque and list(turn.opaque)} for turn in manifest.turns
        ],
        "template": dict(manifest.template),
        "exactness": manifest.exactness.label,
        "segments": [
            {
                "start": entry.start,
                "count": entry.count,
                "parent": entry.parent,
                "pages": "".join(entry.pages),
                "codec": entry.codec,
                "dtype": entry.dtype,
                "engine": entry.engine,
                "exactness": entry.exactness.label,
                "digests": entry.digests.hex(),
            }
            for entry in manifest.segments
        ],
        "hidden": hidden and {"dtype": hidden.dtype, "shape": list(hidden.shape), "digest": hidden.digest.hex()},
    }
    # Messages and tools keep the order of their keys: a chat template may write them out.
    return canonical_json(value, sort_keys=False)


def parse_json(raw: bytes, limits: Limits) -> dict[str, object]:
    """A JSON object without duplicate keys, NaN or deeper nesting than Python bears; the caller bounds its size."""
    if raw.count(b"{") + raw.count(b"[") > 3 * limits.tensors + 65536:
        raise LimitExceeded(
            f"the header holds more lists and objects than {limits.tensors} tensors need. Fix: raise Limits.tensors."
        )
    try:
        value = _JSON.decode(raw.decode())
        if b"\\u" in raw:  # only an escape can smuggle half a surrogate pair past UTF-8
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise BundleError(f"the header is nested too deeply. {_ASK}") from None
    except UnicodeEncodeError as error:
        raise BundleError(f"the header holds half a surrogate pair, which is no text. {_ASK}") from error
    except UnicodeDecodeError as error:
        raise BundleError(f"the header is not UTF-8 ({error.reason} at byte {error.start}). {_ASK}") from error
    except BundleError:
        raise
    except ValueError as error:
        raise BundleError(f"the header is not JSON: {error}. {_ASK}") from error
    if not isinstance(value, dict):
        raise BundleError(f"the header is a JSON {type(value).__name__}, not an object. {_ASK}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BundleError(f"the header has the key {twice[:80]!r} twice. {_ASK}")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if not isfinite(value):
        raise BundleError(f"the header holds {digits[:80]}, which is no finite number. {_ASK}")
    return value


def _no_constant(name: str) -> object:
    raise BundleError(f"the header holds {name}, which is not JSON. {_ASK}")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def parse_manifest(value: Mapping[str, object], limits: Limits) -> Manifest:
    """The manifest, every field checked.

    Raises:
        UnsupportedBundle: another format version or kind, an unknown dtype.
        LimitExceeded: more tokens or layers than allowed.
        BundleError: a field is missing, unknown, of the wrong type or in contradiction to another.
    """
    version = value.get("avp")
    if type(version) is not int or version != VERSION:
        raise UnsupportedBundle(
            f"the bundle has format version {str(version)[:80]!r}; this reader knows {VERSION}. Fix: upgrade avp."
        )
    expected = {"avp", "kind", "model", "tokens", "length", "turns", "template", "exactness", "segments", "hidden"}
    if set(value) != expected:
        raise BundleError(
            f"the manifest's fields differ from format {VERSION}: {str(sorted(expected ^ set(value)))[:200]}. {_ASK}"
        )
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UnsupportedBundle(
            f"the bundle is of the unknown kind {str(kind)[:80]!r}. Fix: upgrade avp; known are {', '.join(_KINDS)}."
        )
    model = None if value["model"] is None else identity_from_json(value["model"], max_layers=limits.layers)
    tokens = _tokens(value["tokens"], limits)
    length = _int(value["length"], "length", 0, len(tokens))
    template = value["template"]
    if not isinstance(template, dict):
        raise BundleError(f"the manifest's template is no object. {_ASK}")
    segments = _segments(value["segments"], model, tokens[:length], limits.tokens if kind == "segment" else 0)
    exactness = worst([_exactness(value["exactness"]), _floor(kind, tokens), *(entry.exactness for entry in segments)])
    hidden = _hidden(value["hidden"])
    turns = _turns(value["turns"], len(tokens))
    manifest = Manifest(kind, model, tokens, length, turns, template, exactness, segments, hidden)
    _check_kind(manifest)
    return manifest


def _floor(kind: str, tokens: tuple[int, ...]) -> Exactness:
    """The best class that a context of this kind can have, whatever its sender claims."""
    if kind in ("tokens", "text"):
        return Exactness.TEXT
    return Exactness.APPROXIMATE if LATENT in tokens else Exactness.EXACT


def _check_kind(manifest: Manifest) -> None:
    kind = manifest.kind
    if kind == "segment" and not _is_segment(manifest):
        raise BundleError(f"a bundle of kind segment holds other things than one segment, or not all of it. {_ASK}")
    if kind not in ("kv", "segment") and (manifest.segments or manifest.length):
        raise BundleError(f"a bundle of kind {kind} holds KV. {_ASK}")
    if kind == "hidden" and manifest.hidden is None:
        raise BundleError(f"a bundle of kind hidden holds no hidden states. {_ASK}")
    if kind != "text" and manifest.model is None:
        raise BundleError(f"a bundle of kind {kind} names no model. {_ASK}")
    if kind in ("kv", "tokens") and LATENT in manifest.tokens[manifest.length :]:
        raise BundleError(f"a token that is yet to be computed has no id. {_ASK}")


def _is_segment(manifest: Manifest) -> bool:
    other = manifest.turns or manifest.template or manifest.hidden
    counts = [entry.count for entry in manifest.segments]
    return not other and counts == [manifest.length] and manifest.length == len(manifest.tokens)


def _tokens(value: object, limits: Limits) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise BundleError(f"the manifest's tokens are no list. {_ASK}")
    if len(value) > limits.tokens:
        raise LimitExceeded(
            f"the bundle holds {len(value)} tokens; at most {limits.tokens} are allowed. Fix: raise Limits.tokens."
        )
    if set(map(type, value)) - {int} or (value and not (min(value) >= LATENT and max(value) < 2**31)):
        raise BundleError(f"the manifest's tokens are not all ids from -1 to 2^31-1. {_ASK}")
    return tuple(value)


def _int(value: object, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BundleError(
            f"the manifest's {name} is {str(value)[:80]}, not a whole number from {low} to {high}. {_ASK}"
        )
    return value


def _exactness(value: object) -> Exactness:
    for each in Exactness:
        if value == each.label:
            return each
    raise UnsupportedBundle(
        f"the bundle's exactness is {str(value)[:80]!r}. "
        f"Fix: upgrade avp; known are {', '.join(each.label for each in Exactness)}."
    )


def _hex(value: object, name: str) -> bytes:
    try:
        digits = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        digits = None
    if digits is None or digits.hex() != value:
        raise BundleError(f"the manifest's {name} are no lower-case hex digits. {_ASK}")
    return digits


def _dtype(value: object) -> str:
    if not isinstance(value, str) or value not in STORAGE:
        raise UnsupportedBundle(
            f"the bundle holds the unknown dtype {str(value)[:80]!r}. Fix: upgrade avp; known are {', '.join(STORAGE)}."
        )
    return value


def _turns(value: object, positions: int) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise BundleError(f"the manifest's turns are no list. {_ASK}")
    turns: list[Turn] = []
    for item in value:
        if not isinstance(item, dict) or set(item) != {"message", "opaque"} or not isinstance(item["message"], dict):
            raise BundleError(f"a turn of the manifest is no message. {_ASK}")
        if not isinstance(item["message"].get("role", "user"), str):
            raise BundleError(f"a message's role is no string. {_ASK}")
        opaque = item["opaque"]
        if opaque is not None:
            if not isinstance(opaque, list) or len(opaque) != 2:
                raise BundleError(f"a turn's opaque positions are no pair. {_ASK}")
            start = _int(opaque[0], "opaque start", 0, positions)
            opaque = (start, _int(opaque[1], "opaque stop", start, positions))
        turns.append(Turn(item["message"], opaque))
    return tuple(turns)


def _hidden(value: object) -> HiddenEntry | None:
    if value is None:
        return None
    if (
        not isinstance(value, dict)
        or set(value) != {"dtype", "shape", "digest"}
        or not isinstance(value["shape"], list)
    ):
        raise BundleError(f"the manifest's hidden states have other fields than dtype, shape, digest. {_ASK}")
    shape = tuple(_int(size, "hidden shape", 0, 2**31) for size in value["shape"])
    digest = _hex(value["digest"], "hidden digest")
    if len(shape) != 2 or len(digest) != 16:
        raise BundleError(f"the manifest's hidden states are not [n, hidden] with a digest of 16 bytes. {_ASK}")
    return HiddenEntry(_dtype(value["dtype"]), shape, digest)


def _segments(
    value: object, model: ModelIdentity | None, tokens: tuple[int, ...], shift: int
) -> tuple[SegmentEntry, ...]:
    """The segments; `shift` is 0, or the highest position at which a single segment that holds all `tokens` starts."""
    if not isinstance(value, list) or (value and model is None) or (shift and len(value) != 1):
        raise BundleError(f"the manifest's segments are no list, belong to no model, or are not just one. {_ASK}")
    entries: list[SegmentEntry] = []
    stop, parent = 0, root_page(model) if model is not None and not shift else ""
    for item in value:
        entry = _segment(item, len(tokens), shift)
        if entry.start < stop:
            raise BundleError(f"the segments overlap or are out of order at position {entry.start}. {_ASK}")
        if not shift and entry.start == stop and entry.parent != parent:
            raise BundleError(f"the segment at position {stop} does not follow from the page before it. {_ASK}")
        run = tokens if shift else tokens[entry.start : entry.start + entry.count]
        _check_pages(entry, run)
        if LATENT in run:  # whatever its sender claims
            entry = replace(entry, exactness=worst([entry.exactness, Exactness.APPROXIMATE]))
        stop, parent = entry.start + entry.count, entry.pages[-1]
        entries.append(entry)
    return tuple(entries)


_FIELDS = {"start", "count", "parent", "pages", "codec", "dtype", "engine", "exactness", "digests"}


def _segment(item: object, length: int, shift: int) -> SegmentEntry:
    if not isinstance(item, dict) or set(item) != _FIELDS:
        raise BundleError(f"a segment must have just the fields {', '.join(sorted(_FIELDS))}. {_ASK}")
    if not isinstance(item["codec"], str) or not isinstance(item["engine"], str):
        raise BundleError(f"a segment's codec or engine is no string. {_ASK}")
    start = _int(item["start"], "segment start", 0, 2**63 if shift else length)
    if shift and start > shift:
        raise LimitExceeded(f"the segment starts at {start}; at most {shift} is allowed. Fix: raise Limits.tokens.")
    count = _int(item["count"], "segment count", 1, min(SEGMENT, length - (0 if shift else start)))
    parent, pages = _hex(item["parent"], "parent"), _hex(item["pages"], "pages")
    if start % PAGE or len(pages) != 32 * -(-count // PAGE) or len(parent) != 32:
        raise BundleError(
            f"a segment's start is no multiple of {PAGE}, or its page ids are not one for each page. {_ASK}"
        )
    ids = tuple(pages[i : i + 32].hex() for i in range(0, len(pages), 32))
    return SegmentEntry(
        start,
        count,
        parent.hex(),
        ids,
        item["codec"],
        _dtype(item["dtype"]),
        item["engine"],
        _exactness(item["exactness"]),
        _hex(item["digests"], "digests"),
    )


def _check_pages(entry: SegmentEntry, tokens: tuple[int, ...]) -> None:
    """Page ids follow from token ids: one that does not is a lie. With latent positions it cannot be told."""
    parent = entry.parent
    for i, page in enumerate(entry.pages):
        run = tokens[i * PAGE : min((i + 1) * PAGE, entry.count)]
        if LATENT not in run and page_id(parent, run) != page:
            raise BundleError(
                f"the id of the page at position {entry.start + i * PAGE} does not follow from its token ids. {_ASK}"
            )
        parent = page
