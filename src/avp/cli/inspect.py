"""`avp inspect`: what a bundle holds, from its header alone."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from avp.bundle import Manifest, header_size, peek, tensor_sizes
from avp.cli.token_text import TokenText, token_text
from avp.cli.words import clean
from avp.errors import BundleError, TruncatedBundle, UsageError
from avp.manifest import VERSION
from avp.segment import LATENT

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class _Model:
    id: str
    family: str
    weights: str
    tokenizer: str


@dataclass(frozen=True, slots=True)
class _Message:
    """`opaque` are the positions [start, stop) before the content that no text stands for."""

    role: str
    characters: int
    opaque: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class _Segment:
    """`pages` is their number; `engine` computed it; `ratio` is stored over raw bytes."""

    start: int
    count: int
    pages: int
    codec: str
    dtype: str
    engine: str
    exactness: str
    stored_bytes: int
    raw_bytes: int
    ratio: float


@dataclass(frozen=True, slots=True)
class _Hidden:
    dtype: str
    shape: tuple[int, ...]
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a header says; the JSON document of `avp inspect --json` has these fields.

    `tokens` counts ids: `positions` of them are computed, `latent` of these have no id, `pending` follow. `absent`
    positions have KV at the sender, but not in this bundle. Of kind "segment", all of them are that segment's own.
    `bytes_per_token` is of raw KV in the widest dtype here, None without KV. `file_bytes` is None where the source is
    no regular file; `size_check` is then "unknown", else "ok", "truncated" or "trailing".
    """

    file: str
    format: int
    kind: str
    model: _Model | None
    exactness: str
    tokens: int
    positions: int
    latent: int
    pending: int
    absent: int
    layers: int
    bytes_per_token: int | None
    messages: tuple[_Message, ...]
    segments: tuple[_Segment, ...]
    hidden: _Hidden | None
    header_bytes: int
    tensor_bytes: int
    total_bytes: int
    file_bytes: int | None
    size_check: str
    text: TokenText | None = None


@click.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--to-text", is_flag=True, help="Show the token ids as text. That is the prompt.")
@click.option("--model", metavar="NAME", help="Whose tokenizer --to-text uses; by default that of the bundle's model.")
def inspect(file: str, *, as_json: bool, to_text: bool, model: str | None) -> None:
    """Show what the bundle FILE (- for stdin) holds.

    Only the header is read, never the tensors. Without --to-text nothing of the prompt is shown. A file that is no
    bundle, or not of the size that its header declares, ends with exit code 2.
    """
    if model is not None and not to_text:
        raise UsageError("--model names a tokenizer, which only --to-text uses. Fix: add --to-text.")
    with _opened(file) as source:
        size = _remaining(source)
        head = _read_head(source)
        manifest, sizes = peek(head), tensor_sizes(head)
    text = token_text(manifest, name=model) if to_text else None
    inspection = _inspect(manifest, sizes, file=file, header_bytes=len(head), file_bytes=size, text=text)
    if as_json:
        click.echo(json.dumps(asdict(inspection), indent=2))
    else:
        _show(inspection, console=Console(file=sys.stdout, highlight=False))
    _check_size(inspection)


@contextmanager
def _opened(file: str) -> Iterator[FileIO]:
    """The source, unbuffered, so that no byte after the header is taken from a pipe."""
    try:
        with FileIO(0, closefd=False) if file == "-" else FileIO(file) as source:
            yield source
    except BundleError as error:
        raise type(error)(clean(str(error))) from error  # it may quote the file
    except OSError as error:
        raise UsageError(
            f"{clean(file)} cannot be read: {error.strerror}. Fix: name a bundle, or - for stdin."
        ) from error


def _remaining(source: FileIO) -> int | None:
    """Bytes from here to the end of a regular file."""
    status = os.fstat(source.fileno())
    return status.st_size - source.tell() if stat.S_ISREG(status.st_mode) else None


def _read_head(source: FileIO) -> bytes:
    """The bytes up to the first tensor, and none after them; memory grows with what comes, not with what is claimed."""
    head = _read(source, 8)
    return head + _read(source, header_size(head) - 8)


def _read(source: FileIO, size: int) -> bytes:
    read = bytearray()
    while len(read) < size and (chunk := source.read(min(size - len(read), _CHUNK))):
        read += chunk
    return bytes(read)


def _inspect(
    manifest: Manifest,
    sizes: dict[str, int],
    *,
    file: str,
    header_bytes: int,
    file_bytes: int | None,
    text: TokenText | None,
) -> Inspection:
    stored = sum(sizes.values())
    total = header_bytes + stored
    model, hidden = manifest.model, manifest.hidden
    segments = _segments(manifest, sizes)
    return Inspection(
        file,
        VERSION,
        manifest.kind,
        _Model(model.id, model.family, model.weights, model.tokenizer) if model else None,
        manifest.exactness.label,
        len(manifest.tokens),
        manifest.length,
        manifest.tokens.count(LATENT),
        len(manifest.tokens) - manifest.length,
        manifest.length - sum(segment.count for segment in segments),
        len(model.layout.layers) if model else 0,
        max((segment.raw_bytes // segment.count for segment in segments), default=None),
        tuple(_Message(turn.role, len(turn.content), turn.opaque) for turn in manifest.turns),
        segments,
        _Hidden(hidden.dtype, hidden.shape, sizes["hidden"]) if hidden else None,
        header_bytes,
        stored,
        total,
        file_bytes,
        _verdict(file_bytes, total),
        text,
    )


def _segments(manifest: Manifest, sizes: dict[str, int]) -> tuple[_Segment, ...]:
    stored = [0] * len(manifest.segments)
    for name, size in sizes.items():
        number = name.partition("/")[0]
        if number.isdecimal():
            stored[int(number)] += size
    rows: list[_Segment] = []
    for entry, size in zip(manifest.segments, stored, strict=True):
        raw = entry.count * manifest.model.layout.bytes_per_token(entry.dtype) if manifest.model else 0
        ratio = round(size / raw, 4) if raw else 1.0
        rows.append(
            _Segment(
                entry.start,
                entry.count,
                len(entry.pages),
                entry.codec,
                entry.dtype,
                entry.engine,
                entry.exactness.label,
                size,
                raw,
                ratio,
            )
        )
    return tuple(rows)


def _verdict(file_bytes: int | None, total: int) -> str:
    if file_bytes is None:
        return "unknown"
    return "ok" if file_bytes == total else "truncated" if file_bytes < total else "trailing"


def _check_size(inspection: Inspection) -> None:
    difference = (inspection.file_bytes or 0) - inspection.total_bytes
    name = clean(inspection.file)
    if inspection.size_check == "truncated":
        raise TruncatedBundle(f"{name} lacks its last {-difference} bytes. Fix: fetch or write the whole bundle.")
    if inspection.size_check == "trailing":
        raise BundleError(f"{name} has {difference} bytes after the bundle's end. Fix: keep one bundle to a file.")


def _show(inspection: Inspection, *, console: Console) -> None:
    console.print(_facts(inspection))
    if inspection.messages:
        console.print()
        console.print(_table(("MESSAGE", "ROLE", "CHARACTERS", "OPAQUE POSITIONS"), _message_rows(inspection)))
    if inspection.segments:
        console.print()
        headings = ("START", "COUNT", "PAGES", "CODEC", "DTYPE", "EXACTNESS", "BYTES", "OF RAW")
        console.print(_table(headings, _segment_rows(inspection)))
    if inspection.text is not None:
        console.print()
        if not inspection.text.same_tokenizer:
            console.print(_line("TEXT (by another tokenizer than the bundle's: it may be wrong)"))
        else:
            console.print(_line("TEXT"))
        # Not by the console, which would wrap it.
        click.echo(clean(inspection.text.text, keep="\n\t"))


def _facts(inspection: Inspection) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in _fact_rows(inspection):
        table.add_row(label, _line(value))
    return table


def _fact_rows(inspection: Inspection) -> Iterator[tuple[str, str]]:
    yield "file", inspection.file
    yield "format", str(inspection.format)
    yield "kind", inspection.kind
    if inspection.model is not None:
        yield "model", f"{inspection.model.id} (family {inspection.model.family})"
        yield "weights", inspection.model.weights
        yield "tokenizer", inspection.model.tokenizer
        yield "layers", str(inspection.layers)
    if inspection.segments:
        yield "engine", ", ".join(dict.fromkeys(segment.engine for segment in inspection.segments))
    yield "exactness", inspection.exactness
    yield "tokens", str(inspection.tokens)
    yield "positions", _positions(inspection)
    yield "pending", str(inspection.pending)
    if inspection.bytes_per_token is not None:
        yield "bytes/token", f"{inspection.bytes_per_token:,}"
    if inspection.hidden is not None:
        shape = " x ".join(map(str, inspection.hidden.shape))
        yield "hidden", f"{shape} {inspection.hidden.dtype}, {inspection.hidden.stored_bytes:,} bytes"
    yield "header", f"{inspection.header_bytes:,} bytes"
    yield "tensors", f"{inspection.tensor_bytes:,} bytes"
    yield "size", _size(inspection)


def _positions(inspection: Inspection) -> str:
    notes = [f"{inspection.latent} latent"] if inspection.latent else []
    if inspection.kind == "segment":
        start = inspection.segments[0].start
        notes.append(f"{start} to {start + inspection.positions} of a context")
    notes += [f"{inspection.absent} not in this bundle"] if inspection.absent else []
    return f"{inspection.positions}" + (f" ({', '.join(notes)})" if notes else "")


def _size(inspection: Inspection) -> str:
    declared = f"{inspection.total_bytes:,} bytes"
    if inspection.file_bytes is None:
        return f"{declared} declared, not checked: this is no regular file"
    if inspection.size_check == "ok":
        return f"{declared}, as declared"
    return f"{declared} declared, {inspection.size_check}: the file has {inspection.file_bytes:,}"


def _message_rows(inspection: Inspection) -> Iterator[tuple[str, ...]]:
    for number, message in enumerate(inspection.messages):
        opaque = f"{message.opaque[0]} to {message.opaque[1]}" if message.opaque else ""
        yield str(number), message.role, f"{message.characters:,}", opaque


def _segment_rows(inspection: Inspection) -> Iterator[tuple[str, ...]]:
    for segment in inspection.segments:
        numbers = (str(segment.start), str(segment.count), str(segment.pages))
        words = (segment.codec, segment.dtype, segment.exactness)
        yield (*numbers, *words, f"{segment.stored_bytes:,}", f"{100 * segment.ratio:.1f} %")


def _table(headings: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False)
    words = ("ROLE", "CODEC", "DTYPE", "EXACTNESS", "OPAQUE POSITIONS")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_line, row))
    return table


def _line(value: str) -> Text:
    return Text(clean(value))
