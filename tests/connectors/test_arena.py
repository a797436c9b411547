"""Memory: what a fork shares, what it copies, and what happens when runs meet."""

from __future__ import annotations

import pytest
import torch

from avp.connectors.arena import SLACK, Arena, Shape, Snapshot, continue_from
from avp.connectors.huggingface import HuggingFaceConnector
from avp.identity import CacheLayout, LayerLayout
from avp.testing.tiny import tiny_connector

LAYOUT = CacheLayout((LayerLayout(2, 4), LayerLayout(1, 8)))
SHAPE = Shape(LAYOUT, torch.float32, torch.device("cpu"))


def filled(length: int, *, capacity: int = 64) -> Arena:
    arena = Arena.empty(SHAPE, capacity)
    assert arena.claim(0)
    for rows in (*arena.keys, *arena.values):
        rows[:, :, :length] = torch.arange(length, dtype=torch.float32)[None, None, :, None]
    arena.release(length)
    return arena


def write(arena: Arena, position: int, value: float) -> None:
    for rows in (*arena.keys, *arena.values):
        rows[:, :, position] = value


def test_one_run_goes_on_in_place_and_a_second_one_forks() -> None:
    arena = filled(10)
    snapshot = Snapshot(arena, 10)
    first = continue_from(snapshot, 10, 20)
    second = continue_from(snapshot, 10, 20)
    assert first is arena
    assert second is not arena
    write(first, 10, 1.0)
    write(second, 10, 2.0)
    assert float(first.keys[0][0, 0, 10, 0]) == 1.0
    assert float(second.keys[0][0, 0, 10, 0]) == 2.0
    assert torch.equal(first.keys[0][:, :, :10], second.keys[0][:, :, :10])
    assert first.copied == second.copied == 0


def test_the_prefix_of_a_fork_is_the_same_physical_memory() -> None:
    arena = filled(10)
    fork = arena.fork(10)
    for rows in (*arena.keys, *arena.values):  # a write through the shared mapping shows in the private one
        rows[:, :, 3] = 77.0
    assert float(fork.values[1][0, 0, 3, 0]) == 77.0
    assert fork.copied == 0


def test_a_fork_of_a_fork_copies_once_however_many_follow() -> None:
    fork = filled(10).fork(10)
    write(fork, 10, 5.0)
    fork.release(11)
    children = [fork.fork(11) for _ in range(3)]
    for i, child in enumerate(children):
        write(child, 11, float(i))
    assert [float(child.keys[0][0, 0, 10, 0]) for child in children] == [5.0] * 3
    assert [float(child.keys[0][0, 0, 11, 0]) for child in children] == [0.0, 1.0, 2.0]
    assert [child.copied for child in children] == [0, 0, 0]
    assert fork._twin is not None
    assert fork._twin.copied == SHAPE.nbytes(11)


def test_a_chain_of_runs_goes_on_in_place() -> None:
    arena = filled(10)
    for length in range(10, 20):
        assert continue_from(Snapshot(arena, length), length, length + 1) is arena
        arena.release(length + 1)
    assert arena.copied == 0


def test_a_failed_run_leaves_the_arena_as_it_was() -> None:
    arena = filled(10)
    assert arena.claim(10)
    write(arena, 10, 9.0)
    arena.release(10)
    assert arena.claim(10)


def test_a_run_that_needs_more_room_moves_to_a_larger_arena() -> None:
    arena = filled(10, capacity=12)
    larger = continue_from(Snapshot(arena, 10), 10, 40)
    assert larger.capacity == 40 + SLACK
    assert torch.equal(larger.keys[1][:, :, :10], arena.keys[1][:, :, :10])
    assert larger.copied == SHAPE.nbytes(10)


def test_a_shorter_prefix_never_writes_over_a_longer_one() -> None:
    arena = filled(10)
    shorter = continue_from(Snapshot(arena, 10), 6, 12)
    write(shorter, 6, -1.0)
    assert float(arena.keys[0][0, 0, 6, 0]) == 6.0


def test_a_device_that_cannot_map_copies_once_for_each_run() -> None:
    meta = Shape(LAYOUT, torch.float32, torch.device("meta"))
    arena = Arena.empty(meta, 64)
    arena.used = 10
    first, second = continue_from(Snapshot(arena, 10), 10, 20), continue_from(Snapshot(arena, 10), 10, 20)
    assert (first.copied, second.copied) == (0, meta.nbytes(10))


@pytest.fixture(scope="module")
def connector() -> HuggingFaceConnector:
    return tiny_connector()


def test_sixteen_generations_copy_no_kv(connector: HuggingFaceConnector) -> None:
    context = connector.prefill(list(range(3, 203)))
    made = [connector.generate([5, 6, 7], context=context, max_new_tokens=4).context for _ in range(16)]
    arenas = {connector._snapshots[each].arena for each in (context, *made)}
    assert len(arenas) == 16  # the first goes on in place
    assert sum(arena.copied for arena in arenas) == 0
    assert len({each.tokens for each in made}) == 1


def test_a_received_context_is_copied_into_the_engine_once(connector: HuggingFaceConnector) -> None:
    received = connector.prefill(list(range(3, 103)))
    received = received.from_bytes(received.to_bytes())
    snapshots = []
    for _ in range(3):
        connector.generate([5], context=received, max_new_tokens=2)
        snapshots.append(connector._snapshots[received])
    assert snapshots[0] is snapshots[1] is snapshots[2]


def test_memory_goes_with_the_last_context(connector: HuggingFaceConnector) -> None:
    import weakref

    context = connector.prefill(list(range(3, 103)))
    arena = weakref.ref(connector._snapshots[context].arena)
    del context
    assert arena() is None
