"""A buffer is bytes with a shape and a dtype, wherever they lie."""

from __future__ import annotations

import numpy as np
import pytest

from avp.buffers import STORAGE, Buffer, from_memory, itemsize
from avp.errors import UsageError


def test_every_dtype_has_its_size() -> None:
    assert {name: itemsize(name) for name in STORAGE} == {
        "float32": 4,
        "float16": 2,
        "bfloat16": 2,
        "uint8": 1,
        "int8": 1,
    }


def test_an_unknown_dtype_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"'float64'.*Fix: use one of float32, float16, bfloat16"):
        itemsize("float64")


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (0,), (2, 0, 4)])
@pytest.mark.parametrize("dtype", STORAGE)
def test_bytes_come_back_as_the_same_array(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).astype(STORAGE[dtype]).reshape(shape)
    buffer = Buffer(dtype, array)
    data = buffer.tobytes()
    assert (buffer.shape, buffer.nbytes, len(data)) == (shape, array.nbytes, array.nbytes)
    back = from_memory(memoryview(data), dtype=dtype, shape=shape)
    assert np.array_equal(back.array, array)
    assert back.array.dtype == array.dtype
    assert not data or np.shares_memory(back.array, np.frombuffer(data, np.uint8))


def test_a_contiguous_array_is_one_run_without_a_copy() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (run,) = Buffer("float32", array).runs()
    assert np.shares_memory(np.frombuffer(run, np.uint8), array)


def test_a_slice_of_positions_is_one_run_a_head_without_a_copy() -> None:
    whole = np.arange(60, dtype=np.float32).reshape(3, 5, 4)
    part = whole[:, 1:3]
    runs = list(Buffer("float32", part).runs())
    assert len(runs) == 3
    assert all(np.shares_memory(np.frombuffer(run, np.uint8), whole) for run in runs)
    assert b"".join(runs) == part.tobytes()


@pytest.mark.parametrize("view", [np.s_[:, :, ::2], np.s_[::-1], np.s_[:, ::-1]])
def test_any_stride_is_read_in_order(view: tuple[slice, ...]) -> None:
    array = np.arange(60, dtype=np.float32).reshape(3, 5, 4)[view]
    assert Buffer("float32", array).tobytes() == array.tobytes()


def test_an_empty_buffer_has_no_runs() -> None:
    assert list(Buffer("int8", np.empty((3, 0, 2), np.int8)).runs()) == []


@pytest.mark.parametrize("size", [0, 23, 25])
def test_a_wrong_number_of_bytes_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=rf"{size} bytes are not a float32 tensor of shape \[2, 3\]"):
        from_memory(memoryview(bytes(size)), dtype="float32", shape=(2, 3))
