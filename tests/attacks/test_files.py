"""Files: what is not needed is not read, and what is not there is not made up."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from avp.bundle import header_size, peek
from avp.context import Context
from avp.errors import DigestMismatch, TruncatedBundle
from avp.testing import synthetic_context

from .forge import Abuse, measured

MIB = 2**20


def _sparse(path: Path) -> int:
    """A valid header of 64 MiB of tensors whose bytes are a hole; the header's size."""
    context = synthetic_context(layers=4, kv_heads=4, head_dim=64, tokens=8192, dtype="float32")
    data = context.to_bytes()
    size = header_size(data[:8])
    path.write_bytes(data[:size])
    os.truncate(path, len(data))
    return size


def _resident(path: Path) -> int:
    """Bytes of the file that this process has mapped and touched."""
    maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    return sum(1024 * int(re.search(r"Rss:\s+(\d+)", each)[1]) for each in maps)  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts mapped pages through /proc")
def test_a_mapped_file_is_touched_at_its_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.avp"
    size = _sparse(path)
    context = Context.load(path)
    assert len(context) == 8192
    assert _resident(path) <= size + 2**17  # the kernel maps up to 64 KiB around a touched page
    with pytest.raises(DigestMismatch):
        context.segments[0].read(0, "k")


def test_reading_a_header_reads_the_header(tmp_path: Path) -> None:
    size = _sparse(tmp_path / "c.avp")
    with open(tmp_path / "c.avp", "rb", buffering=0) as file:
        first = file.read(8)
        manifest = peek(first + file.read(header_size(first) - 8))
        assert (manifest.length, file.tell()) == (8192, size)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _short(path: Path) -> None:
    path.write_bytes(b"\x00" * 7)


def _cut(path: Path) -> None:
    os.truncate(path, _sparse(path) + 60 * MIB)


CUTS = {"an empty file": _empty, "a file of 7 bytes": _short, "a file cut within its tensors": _cut}
ABUSES = [Abuse(name, lambda: [], TruncatedBundle) for name in CUTS]


@pytest.mark.parametrize("name", CUTS)
def test_refused(tmp_path: Path, name: str) -> None:
    CUTS[name](tmp_path / "c.avp")
    raised, peak = measured(lambda: Context.load(tmp_path / "c.avp"))
    assert isinstance(raised, TruncatedBundle)
    assert peak < 8 * MIB
