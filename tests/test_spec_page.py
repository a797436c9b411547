"""docs/spec/bundle.md says what the code does."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

from blake3 import blake3

from avp import registry
from avp.buffers import STORAGE
from avp.bundle import header_size, peek
from avp.context import KINDS, Context
from avp.manifest import VERSION, Limits, parse_manifest
from avp.segment import Exactness, page_id, root_page

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs/spec/bundle.md").read_text(encoding="utf-8")
GOLDEN = (HERE / "golden/tiny.raw.avp").read_bytes()
HEADER = GOLDEN[8 : header_size(GOLDEN[:8])].decode()


def _block(name: str) -> list[str]:
    """The lines of a fenced block."""
    (body,) = re.findall(rf"^```{name}\n(.*?)\n```$", PAGE, re.M | re.S)
    return body.split("\n")  # type: ignore[no-any-return]


def _rows(title: str) -> list[list[str]]:
    """The cells of the table whose first column has that title."""
    (body,) = re.findall(rf"^\| {title} \|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", PAGE, re.M)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in body.strip().split("\n")]


def _names(value: object, prefix: str = "") -> list[str]:
    """Fields of a manifest, in order, as the page names them."""
    found: list[str] = []
    for name, inner in value.items() if isinstance(value, dict) else ():
        found.append(prefix + name)
        if name in ("message", "template"):
            continue
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            found += _names(inner[0], f"{prefix}{name}[].")
        found += _names(inner, f"{prefix}{name}.")
    return found


def _manifest(data: bytes) -> dict[str, object]:
    return json.loads(json.loads(data[8 : header_size(data[:8])])["__metadata__"]["avp"])  # type: ignore[no-any-return]


def test_the_header_shown_is_the_golden_bundles() -> None:
    shown = "".join(_block("header"))
    assert shown == HEADER.rstrip(" ")
    counts = re.search(r"n is (\d+), the padding (\d+) spaces", PAGE)
    assert counts is not None
    assert [int(each) for each in counts.groups()] == [len(HEADER), len(HEADER) - len(shown)]
    assert (8 + len(HEADER)) % 64 == 0


def test_the_tensors_shown_are_the_golden_bundles() -> None:
    assert bytes.fromhex("".join(_block("tensors"))) == GOLDEN[8 + len(HEADER) :]


def test_the_worked_page_id_is_what_the_code_makes() -> None:
    manifest = peek(GOLDEN)
    assert manifest.model is not None
    layout, digest = _block("layout")
    assert blake3(layout.encode()).hexdigest() == digest == manifest.model.layout.digest
    *root_bytes, root = _block("root")
    assert f"= {blake3(bytes.fromhex(''.join(root_bytes))).hexdigest()}" == root == f"= {root_page(manifest.model)}"
    *page_bytes, page = _block("page")
    assert f"= {blake3(bytes.fromhex(''.join(page_bytes))).hexdigest()}" == page
    assert page == f"= {page_id(root[2:], manifest.tokens)}" == f"= {manifest.segments[0].pages[0]}"


def test_the_limits_are_those_of_the_reader() -> None:
    shown = {name.strip("`"): int(default) for name, default, _ in _rows("limit")}
    assert shown == asdict(Limits())


def test_the_fields_are_those_that_the_writer_writes_in_its_order() -> None:
    written = _manifest(GOLDEN)
    written["hidden"] = _manifest((HERE / "golden/hidden-float32.raw.avp").read_bytes())["hidden"]
    assert [row[0].strip("`") for row in _rows("field")] == _names(written)
    assert parse_manifest(written, Limits()).hidden is not None


def test_the_words_are_those_of_the_code() -> None:
    fields = {row[0].strip("`"): re.findall(r"`([^`]+)`", row[1]) for row in _rows("field")}
    assert fields["kind"] == [row[0].strip("`") for row in _rows("kind")] == [*KINDS, "segment"]
    assert fields["segments[].dtype"] == list(STORAGE)
    assert fields["exactness"] == [each.label for each in Exactness]
    assert f"`avp` is {VERSION}. " in PAGE
    assert PAGE.startswith(f"# The bundle, format {VERSION}\n")


def test_a_segment_alone_is_as_the_page_says() -> None:
    for name in ("segment-256", "segment-96", "segment-latent"):
        manifest = _manifest((HERE / f"golden/{name}.raw.avp").read_bytes())
        (entry,) = manifest["segments"]  # type: ignore[misc]
        assert manifest["kind"] == "segment"
        assert len(manifest["tokens"]) == manifest["length"] == entry["count"]  # type: ignore[arg-type]
        assert (manifest["turns"], manifest["template"], manifest["hidden"]) == ([], {}, None)


def test_the_parts_of_the_codecs_are_those_of_the_code() -> None:
    shown: dict[str, list[str]] = {}
    for codec, part, *_ in _rows("codec"):
        shown.setdefault(codec.strip("`"), []).append("" if part == "(none)" else part.strip("`"))
    assert shown == {name: list(registry.codec(name).parts("float32", (1, 2, 3))) for name in shown}
    assert set(shown) == {"raw", "lossless"}


def test_a_reader_written_from_the_page_alone_reads_every_kind_of_value() -> None:
    for name in ("float32", "float16", "bfloat16"):
        packed = (HERE / f"golden/{name}.lossless.avp").read_bytes()
        context = Context.from_bytes((HERE / f"golden/{name}.raw.avp").read_bytes())
        size = header_size(packed[:8])
        table = json.loads(packed[8:size])
        for layer in (0, 1):
            for part in "kv":
                low, high = (_stored(packed[size:], table[f"0/{layer}/{part}{end}"]) for end in ("", ".exp"))
                assert _unpacked(low, high, (2, 40, 4)) == context.segments[0].read(layer, part).tobytes()


def _stored(tensors: bytes, entry: dict[str, list[int]]) -> bytes:
    begin, end = entry["data_offsets"]
    return tensors[begin:end]


def _unpacked(low: bytes, frame: bytes, shape: tuple[int, int, int]) -> bytes:
    """K or V from the two parts of `lossless`, by the words of the page, one value at a time."""
    import zstandard

    heads, count, dim = shape
    size = heads * count * dim
    exponents, planes = zstandard.decompress(frame), len(low) // size
    bits = 8 * (planes + 1)
    found = b""
    for index in range(size):
        head, rest = divmod(index, count * dim)
        position, channel = divmod(rest, dim)
        word = exponents[(head * dim + channel) * count + position] << (8 * planes)
        word |= sum(low[plane * size + index] << (8 * plane) for plane in range(planes))
        found += ((word >> 1) | (word & 1) << (bits - 1)).to_bytes(planes + 1, "little")
    return found
