"""Bundles taken apart and put together wrongly, and the proof that they are refused at no cost."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from avp.blob import BundleReader, open_blob, seal
from avp.bundle import peek, tensor_sizes
from avp.context import Context, text_context
from avp.errors import BundleError, TruncatedBundle
from avp.identity import identity_from_json
from avp.manifest import Limits
from avp.segment import Segment, page_id, root_page
from avp.testing import synthetic_context

# Reading a header takes some bytes for each of its own; never more than this, and never more than this beside.
PER_BYTE = 40
SLACK = 2**18


@dataclass
class Forgery:
    """A bundle in pieces; change any, then `bytes()`."""

    manifest: dict[str, object]
    table: dict[str, object]
    payload: bytes
    metadata: dict[str, object] = field(default_factory=lambda: {"format": "avp"})

    def header(self) -> bytes:
        """The JSON of the header."""
        text = self.metadata.get("avp", json.dumps(self.manifest))
        return json.dumps({"__metadata__": {"avp": text, **self.metadata}, **self.table}).encode()

    def __bytes__(self) -> bytes:
        return frame(self.header(), self.payload)

    def segment(self, number: int = 0) -> dict[str, object]:
        """A segment of the manifest."""
        return self.manifest["segments"][number]  # type: ignore[index, no-any-return]

    def entry(self, name: str) -> dict[str, object]:
        """A tensor of the table."""
        return self.table[name]  # type: ignore[return-value]


def frame(header: bytes, payload: bytes = b"") -> bytes:
    """A length, a header, and what follows."""
    return len(header).to_bytes(8, "little") + header + payload


def take_apart(data: bytes) -> Forgery:
    """The pieces of a bundle."""
    size = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:size])
    return Forgery(json.loads(table.pop("__metadata__")["avp"]), table, data[size:])


def segment_victim(*, start: int = 256, codec: str = "raw", tokens: int = 40) -> Forgery:
    """A valid bundle of one segment alone, 2 layers of float32, to be changed."""
    whole = synthetic_context(tokens=start + tokens, dtype="float32")
    assert whole.model is not None
    return take_apart(b"".join(seal(whole.model, _last(whole, start), codec=codec).runs))


def _last(whole: Context, start: int) -> Segment:
    """The positions from `start` on, which lie in the last segment."""
    return whole.segments[-1].cut(start, len(whole))


def victim(*, codec: str = "raw", tokens: int = 40) -> Forgery:
    """A valid bundle of 2 layers of float32, to be changed."""
    return take_apart(synthetic_context(tokens=tokens, dtype="float32").to_bytes(codec=codec))


def text_victim() -> Forgery:
    """A valid bundle of one message."""
    return take_apart(text_context("hello").to_bytes())


@dataclass(frozen=True)
class Abuse:
    """What is done to a bundle, and the error that must come of it."""

    name: str
    make: Callable[[], Sequence[bytes]]
    error: type[BundleError]
    limits: Limits = field(default_factory=Limits)


def refused(data: bytes, error: type[BundleError], limits: Limits) -> None:
    """Each way of reading refuses `data` with `error` (or, of the header alone, may accept it), allocating little."""
    _refused(data, error, limits, {_now: True, _lazily: True, _opened: True, _peek: False, _sizes: False})


def segment_refused(data: bytes, error: type[BundleError], limits: Limits) -> None:
    """As `refused`, of a segment alone, which `Context.from_bytes` never takes."""
    _refused(data, error, limits, {_opened: True, _streamed: True, _peek: False, _sizes: False})
    raised, _ = measured(lambda: _now(data, limits))
    assert raised is not None


def _refused(
    data: bytes, error: type[BundleError], limits: Limits, ways: Mapping[Callable[[bytes, Limits], None], bool]
) -> None:
    for call, must in ways.items():
        raised, peak = measured(lambda call=call: call(data, limits))  # type: ignore[misc]
        assert raised is not None or not must, f"{call.__name__} accepts it"
        assert raised is None or isinstance(raised, error), f"{call.__name__}: {raised!r}"
        assert peak < PER_BYTE * len(data) + SLACK, f"{call.__name__}: {peak} bytes were allocated for {len(data)}"


def measured(call: Callable[[], object]) -> tuple[BundleError | None, int]:
    """The error of a call, well worded, and the bytes that it held at its worst."""
    raised = None
    tracemalloc.start()
    try:
        call()
    except BundleError as error:
        raised = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if raised is not None:
        assert "Fix: " in str(raised)
        assert len(str(raised)) < 800, "an error repeats what it was given"
    return raised, peak


def check(abuse: Abuse) -> None:
    """Every variant of an abuse is refused."""
    for data in abuse.make():
        refused(data, abuse.error, abuse.limits)


def check_segment(abuse: Abuse) -> None:
    """Every variant of an abuse of a segment alone is refused."""
    for data in abuse.make():
        segment_refused(data, abuse.error, abuse.limits)


def _now(data: bytes, limits: Limits) -> None:
    Context.from_bytes(data, limits=limits)


def _lazily(data: bytes, limits: Limits) -> None:
    context = Context.from_bytes(data, limits=limits, verify="use")
    layers = range(len(context.model.layout.layers)) if context.model else ()
    for segment in context.segments:
        for layer in layers:
            for part in ("k", "v"):
                segment.read(layer, part)


def _opened(data: bytes, limits: Limits) -> None:
    open_blob(data, limits=limits).verify()


def _streamed(data: bytes, limits: Limits) -> None:
    """As a bundle that comes over a wire; what ends too early is as good as refused."""
    reader = BundleReader(limits)
    bundle, rest = reader.feed(memoryview(data))
    if bundle is None or rest:
        raise TruncatedBundle("the stream ends within a bundle. Fix: send all of it.")
    open_blob(bundle, limits=limits).verify()


def _peek(data: bytes, limits: Limits) -> None:
    peek(data, limits=limits)


def _sizes(data: bytes, limits: Limits) -> None:
    tensor_sizes(data, limits=limits)


def variants(
    change: Callable[[Forgery, object], object],
    values: Sequence[object],
    *,
    of: Callable[[], Forgery] = victim,
) -> Callable[[], list[bytes]]:
    """One forgery for each value."""

    def make() -> list[bytes]:
        made = []
        for value in values:
            forgery = of()
            change(forgery, value)
            made.append(bytes(forgery))
        return made

    return make


def field_of(*path: object) -> Callable[[Forgery, object], None]:
    """A change that sets a field of the manifest."""

    def change(forgery: Forgery, value: object) -> None:
        inner: object = forgery.manifest
        for key in path[:-1]:
            inner = inner[key]  # type: ignore[index]
        inner[path[-1]] = value  # type: ignore[index]

    return change


def honest_pages(forgery: Forgery) -> None:
    """Give a changed manifest the page ids that its tokens and model now imply."""
    parent = root_page(identity_from_json(forgery.manifest["model"], max_layers=2**20))
    tokens: Sequence[int] = forgery.manifest["tokens"]  # type: ignore[assignment]
    for entry in forgery.manifest["segments"]:  # type: ignore[attr-defined]
        entry["parent"] = parent
        pages = []
        stop = entry["start"] + entry["count"]
        for start in range(entry["start"], stop, 32):
            parent = page_id(parent, tokens[start : min(start + 32, stop)])
            pages.append(parent)
        entry["pages"] = "".join(pages)
