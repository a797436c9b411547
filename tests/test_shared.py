"""KV in memory that another process maps: what was written is what is read, for as long as anybody uses it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import xxhash

from avp.buffers import STORAGE
from avp.identity import CacheLayout, LayerLayout
from avp.shared import MemoryFile, SharedTensors, arena_bytes, arena_offsets

from .samples import DTYPES, fill_arena

LAYOUT = CacheLayout((LayerLayout(2, 4), LayerLayout(1, 6, window=16)))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memfd and /proc")

# Says it is ready, waits for a line, then reads all of the arena whose descriptor it was given.
CHILD = """
import sys
import xxhash
from avp.identity import CacheLayout, LayerLayout
from avp.shared import MemoryFile, SharedTensors

layout = CacheLayout((LayerLayout(2, 4), LayerLayout(1, 6, window=16)))
tensors = SharedTensors.of(MemoryFile.adopt(int(sys.argv[1])), layout, "float32", 50, 3, 40)
print("ready", flush=True)
sys.stdin.readline()
for layer in (0, 1):
    for part in "kv":
        print(xxhash.xxh3_128_hexdigest(tensors.read(layer, part).tobytes()))
"""


def _whole(dtype: str = "float32", capacity: int = 50) -> SharedTensors:
    file = MemoryFile.create(arena_bytes(LAYOUT, dtype, capacity))
    tensors = SharedTensors.of(file, LAYOUT, dtype, capacity, 0, capacity)
    fill_arena(tensors, seed=1)
    return tensors


def _part(whole: SharedTensors, start: int, stop: int) -> SharedTensors:
    return SharedTensors.of(whole.file, whole.layout, whole.dtype, whole.capacity, start, stop)


def _digests(tensors: SharedTensors) -> list[str]:
    return [
        xxhash.xxh3_128_hexdigest(tensors.read(layer, part).tobytes())
        for layer in range(len(tensors.layout.layers))
        for part in "kv"
    ]


# --- the file


def test_memory_begins_as_zeros_and_takes_room_only_where_it_is_written() -> None:
    file = MemoryFile.create(2**40)
    assert (file.size, os.fstat(file.fd).st_size, os.fstat(file.fd).st_blocks) == (2**40, 2**40, 0)
    assert bytes(file.view[2**39 : 2**39 + 4]) == bytes(4)
    os.pwrite(file.fd, b"abc", 2**30)
    assert bytes(file.view[2**30 : 2**30 + 4]) == b"abc\0"
    assert os.fstat(file.fd).st_blocks * 512 < 2**20


def test_memory_of_no_bytes_can_be_mapped() -> None:
    assert len(MemoryFile.create(0).view) == 1


def test_the_view_cannot_be_written() -> None:
    file = MemoryFile.create(10)
    assert file.view.readonly
    assert file.view is file.view


def test_a_child_does_not_inherit_memory_by_accident() -> None:
    assert not os.get_inheritable(MemoryFile.create(10).fd)


@LINUX
def test_nobody_who_holds_the_descriptor_can_change_the_size_under_a_mapping() -> None:
    file = MemoryFile.create(10_000)
    for fd in (file.fd, os.dup(file.fd)):
        for size in (0, 9_999, 20_000):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    os.close(fd)
    os.pwrite(file.fd, b"still written", 0)
    assert bytes(file.view[:5]) == b"still"


# --- the layout


def test_tensors_lie_k_before_v_layer_by_layer_without_gaps() -> None:
    assert list(arena_offsets(LAYOUT, 4, 10)) == [(0, 320), (640, 880)]
    assert arena_bytes(LAYOUT, "float32", 10) == 880 + 240
    assert arena_bytes(LAYOUT, "bfloat16", 10) == (880 + 240) // 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_read_is_a_view_of_its_positions(dtype: str) -> None:
    whole = _whole(dtype)
    memory = np.frombuffer(whole.file.view, np.uint8)
    raw = bytes(whole.file.view)
    for layer, (heads, dim) in enumerate(((2, 4), (1, 6))):
        for part in "kv":
            offset = whole.offsets[layer][part == "v"]
            count = heads * 50 * dim
            rows = np.frombuffer(raw, STORAGE[dtype], count, offset).reshape(heads, 50, dim)
            found = _part(whole, 3, 40).read(layer, part)
            assert (found.dtype, found.shape) == (dtype, (heads, 37, dim))
            assert found.tobytes() == rows[:, 3:40].tobytes()
            assert np.shares_memory(found.array, memory)
            assert not found.array.flags.writeable


def test_what_a_torch_arena_wrote_is_read() -> None:
    torch = pytest.importorskip("torch")
    from avp.connectors.arena import Arena, Shape

    arena = Arena.empty(Shape(LAYOUT, torch.float32, torch.device("cpu")), 64)
    assert arena.claim(0)
    assert arena.file is not None
    tensors = SharedTensors.of(arena.file, LAYOUT, "float32", 64, 5, 20)
    for number, rows in enumerate((*arena.keys, *arena.values)):
        rows[:, :, :20] = torch.arange(20, dtype=torch.float32)[None, None, :, None] + 100 * number
    arena.release(20)
    for layer in (0, 1):
        for number, part in ((layer, "k"), (2 + layer, "v")):
            found = tensors.read(layer, part).array
            assert (found == np.arange(5, 20, dtype=np.float32)[None, :, None] + 100 * number).all()


@pytest.mark.parametrize(
    ("capacity", "start", "stop", "fits"),
    [
        (50, 0, 50, True),
        (50, 3, 40, True),
        (49, 0, 49, True),
        (51, 0, 50, False),
        (2**40, 0, 1, False),
        (50, 0, 51, False),
        (50, -1, 3, False),
        (50, 5, 5, False),
        (50, 7, 5, False),
        (-50, 0, 1, False),
    ],
)
def test_whether_positions_lie_in_the_memory_is_told_without_reading(
    capacity: int, start: int, stop: int, fits: bool
) -> None:
    whole = _whole()
    assert SharedTensors.of(whole.file, LAYOUT, "float32", capacity, start, stop).fits is fits


# --- other processes


def _child(fd: int) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(fd)], pass_fds=(fd,), stdin=-1, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@LINUX
def test_another_process_reads_what_was_written() -> None:
    whole = _whole()
    with _child(whole.file.fd) as child:
        found, _ = child.communicate("\n", timeout=60)
    assert found.split() == _digests(_part(whole, 3, 40))


@LINUX
def test_another_process_sees_what_is_written_after_it_mapped() -> None:
    whole = _whole()
    with _child(whole.file.fd) as child:
        fill_arena(whole, seed=2)
        found, _ = child.communicate("\n", timeout=60)
    assert found.split() == _digests(_part(whole, 3, 40))


@LINUX
def test_memory_outlives_the_one_who_made_it() -> None:
    whole = _whole()
    expected = _digests(_part(whole, 3, 40))
    fd, inode = whole.file.fd, os.fstat(whole.file.fd).st_ino
    with _child(fd) as child:
        del whole
        gc.collect()
        assert not _mapped(inode)
        found, _ = child.communicate("\n", timeout=60)
    assert found.split() == expected


@LINUX
def test_an_adopted_descriptor_is_closed_with_its_last_user() -> None:
    whole = _whole()
    adopted = MemoryFile.adopt(os.dup(whole.file.fd))
    assert adopted.size == whole.file.size
    same = SharedTensors.of(adopted, LAYOUT, "float32", 50, 0, 50)
    assert _digests(same) == _digests(whole)
    fd = adopted.fd
    del adopted
    os.fstat(fd)
    del same
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@LINUX
def test_memory_dies_with_its_last_user() -> None:
    whole = _whole()
    inode, fd = os.fstat(whole.file.fd).st_ino, whole.file.fd
    file = weakref.ref(whole.file)
    part = _part(whole, 3, 40)
    del whole
    array = part.read(0, "k").array
    assert _mapped(inode)
    del part
    gc.collect()
    assert file() is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert _mapped(inode), "an array that was read keeps the memory, without the file"
    assert len(array.tobytes()) == 2 * 37 * 4 * 4
    del array
    gc.collect()
    assert not _mapped(inode)


def _mapped(inode: int) -> bool:
    """Whether this process maps the memory file of that inode."""
    rows = [row.split() for row in Path("/proc/self/maps").read_text().splitlines()]
    return any("avp-kv" in row[5] for row in rows if len(row) > 5 and row[4] == str(inode))


# --- digests


@pytest.mark.parametrize("dtype", DTYPES)
def test_digests_are_those_of_each_tensor_in_order_whatever_the_layers_shapes(dtype: str) -> None:
    layers = (LayerLayout(2, 4), LayerLayout(2, 4), LayerLayout(1, 6, window=16), LayerLayout(2, 4), LayerLayout(2, 8))
    layout, capacity = CacheLayout(layers), 70
    whole = SharedTensors.of(MemoryFile.create(arena_bytes(layout, dtype, capacity)), layout, dtype, capacity, 0, 70)
    fill_arena(whole, seed=3)
    for start, stop in ((0, 70), (3, 40), (69, 70)):
        tensors = _part(whole, start, stop)
        assert tensors.hash().hex() == "".join(_digests(tensors))


def test_tensors_larger_than_what_is_gathered_at_once_are_hashed_whole() -> None:
    layout, capacity = CacheLayout((LayerLayout(3, 512),) * 2), 500
    whole = SharedTensors.of(
        MemoryFile.create(arena_bytes(layout, "float32", capacity)), layout, "float32", 500, 0, 500
    )
    fill_arena(whole, seed=4)
    assert whole.hash().hex() == "".join(_digests(whole))


def test_digests_are_computed_once_for_all_who_show_the_same_positions() -> None:
    whole = _whole()
    first = _part(whole, 3, 40)
    assert not first.hashed
    known = first.digests
    assert _part(whole, 3, 40).hashed
    assert not _part(whole, 3, 39).hashed
    fill_arena(whole, seed=2)
    assert _part(whole, 3, 40).digests == known
    assert _part(whole, 3, 40).hash() != known
