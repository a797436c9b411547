"""What packing, saving and loading copy: the KV once, or not at all."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from avp.bundle import pack_runs
from avp.context import Context
from avp.testing import synthetic_context

MIB = 2**20


def _large() -> Context:
    return synthetic_context(layers=4, kv_heads=4, head_dim=64, tokens=2048, dtype="float32")


def _peak(call: object) -> int:
    tracemalloc.start()
    try:
        kept = call()  # type: ignore[operator]
        peak = tracemalloc.get_traced_memory()[1]
        del kept
        return peak
    finally:
        tracemalloc.stop()


def test_packing_copies_the_kv_once() -> None:
    context = _large()
    assert context.nbytes == 16 * MIB
    assert _peak(context.to_bytes) < 1.1 * context.nbytes


def test_packing_in_runs_copies_no_kv() -> None:
    context = _large()
    assert _peak(lambda: pack_runs(context)) < 0.1 * context.nbytes
    assert b"".join(pack_runs(context)) == context.to_bytes()


def test_saving_copies_no_kv(tmp_path: Path) -> None:
    context = _large()
    assert _peak(lambda: context.save(tmp_path / "c.avp")) < 0.1 * context.nbytes


def test_loading_copies_no_kv(tmp_path: Path) -> None:
    context = _large()
    context.save(tmp_path / "c.avp")

    def read_all() -> Context:
        loaded = Context.load(tmp_path / "c.avp")
        for segment in loaded.segments:
            for layer in range(4):
                assert segment.read(layer, "k").nbytes == segment.read(layer, "v").nbytes
        return loaded

    assert _peak(read_all) < 0.1 * context.nbytes


def test_tensors_of_a_file_share_one_map(tmp_path: Path) -> None:
    context = synthetic_context(tokens=64, dtype="float32")
    context.save(tmp_path / "c.avp")
    loaded = Context.load(tmp_path / "c.avp")
    first, again = (loaded.segments[0].read(0, "k").array for _ in range(2))
    assert np.shares_memory(first, again)
    assert not first.flags.writeable
    whole = np.frombuffer(loaded.segments[0].tensors.data, np.uint8)
    assert all(np.shares_memory(whole, loaded.segments[0].read(layer, part).array) for layer in (0, 1) for part in "kv")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_tensors_of_bytes_are_views_of_them(kind: type) -> None:
    data = kind(synthetic_context(tokens=64, dtype="float32").to_bytes())
    given = np.frombuffer(data, np.uint8)
    context = Context.from_bytes(data)
    for layer in (0, 1):
        for part in "kv":
            array = context.segments[0].read(layer, part).array
            assert np.shares_memory(given, array)
            assert not array.flags.writeable
