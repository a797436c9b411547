"""The plug-in's two sides over a store on disk, without vLLM: what is found, loaded, saved and repaired."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from avp.blob import seal
from avp.buffers import Buffer
from avp.connectors.vllm_worker import Copied
from avp.errors import StoreFailed
from avp.protocols import Store
from avp.segment import Exactness, Segment, page_ids, root_page
from avp.stores import open_store

from .sides import MODEL, Node, Request, kv, prompt, segments

Start = Callable[..., Node]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    nodes: list[Node] = []

    def make(**extra: Any) -> Node:
        nodes.append(Node(f"disk:{tmp_path}", **extra))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"disk:{tmp_path}")
    yield opened
    opened.close()


def settle(node: Node) -> None:
    """Have all saves written: a request that waits is answered after those before it."""
    node.serve(Request(prompt(32, seed=77), {"avp": {"wait": True}}))


@pytest.mark.parametrize(("length", "found"), [(31, 0), (32, 0), (33, 32), (1000, 992), (1024, 992), (1025, 1024)])
def test_all_full_pages_but_the_last_position_are_loaded(start: Start, length: int, found: int) -> None:
    ids = prompt(length)
    one = start()
    said = one.serve(Request(list(ids), {"avp": {"wait": True}}))
    assert (said["loaded"], said["computed"]) == (0, length)
    two = start()
    request = Request(list(ids))
    said = two.serve(request)
    assert (said["loaded"], said["computed"], said["exactness"]) == (found, length - found, "exact")
    assert two.holds(request, length)


def test_the_handle_names_the_last_full_page(start: Start) -> None:
    said = start().serve(Request(prompt(100)), new=40)
    pages = page_ids(root_page(MODEL), [*prompt(100), *prompt(40, seed=9)][:128])
    assert (said["handle"], said["tokens"]) == (pages[-1], 128)


def test_decoded_pages_are_saved_too_unless_only_prompts_are(start: Start, store: Store) -> None:
    node = start()
    node.serve(Request(prompt(40)), new=60)
    settle(node)
    assert sorted((each.start, each.count) for each in store.entries())[1:] == [(0, 32), (32, 32), (64, 32)]
    other = start(save="prompt", tenant="other")
    other.serve(Request(prompt(40)), new=60)
    settle(other)
    assert sorted((each.start, each.count) for each in store.entries(tenant="other")) == [(0, 32), (0, 32)]
    third = start(save="nothing", tenant="third")
    third.serve(Request(prompt(40)), new=60)
    settle(third)
    assert list(store.entries(tenant="third")) == []


def test_nothing_is_saved_twice(start: Start, tmp_path: Path) -> None:
    node = start()
    node.serve(Request(prompt(300)))
    node.serve(Request(prompt(300)), local=288)
    settle(node)
    before = {path: path.stat().st_mtime_ns for path in segments(tmp_path)}
    again = start()
    again.serve(Request(prompt(300), {"avp": {"wait": True}}))
    settle(again)
    assert {path: path.stat().st_mtime_ns for path in segments(tmp_path)} == before


def test_a_short_last_page_is_kept_on_demand(start: Start, store: Store) -> None:
    start().serve(Request(prompt(40), {"avp": {"wait": True, "tail": True}}))
    assert sorted((each.start, each.count) for each in store.entries()) == [(0, 32), (32, 8)]
    said = start().serve(Request([*prompt(40), 1, 2], {"avp": {}}))
    assert said["loaded"] == 32


def test_tenants_and_salts_and_secrets_divide(start: Start) -> None:
    ids = prompt(200)
    start(tenant="red", secret="one").serve(Request(list(ids), {"avp": {"wait": True}}))
    for extra, salt, loaded in (
        ({"tenant": "red", "secret": "one"}, None, 192),
        ({"tenant": "red", "secret": "two"}, None, 0),
        ({"tenant": "blue", "secret": "one"}, None, 0),
        ({}, None, 0),
        ({"tenant": "red", "secret": "one"}, "mine", 0),
    ):
        node = start(**extra, save="nothing")
        assert node.serve(Request(list(ids), cache_salt=salt))["loaded"] == loaded, (extra, salt)


def test_what_does_not_follow_from_token_ids_is_left_alone(start: Start, store: Store) -> None:
    node = start()
    for given in ({"lora_request": object()}, {"mm_features": [object()]}, {"prompt_embeds": object()}):
        request = Request(prompt(200), **given)  # type: ignore[arg-type]
        assert node.scheduler.find(request, 0) == 0
        assert node.scheduler.finished(request) is None
    assert list(store.entries()) == []


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_a_damaged_segment_is_computed_again_and_replaced(
    start: Start, store: Store, tmp_path: Path, harm: str
) -> None:
    ids = prompt(600)
    start().serve(Request(list(ids), {"avp": {"wait": True}}))
    file = next(path for path in segments(tmp_path) if store_start(store, path) == 256)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    if harm == "delete":
        file.unlink()
    else:
        file.write_bytes(data if harm == "flip" else data[:-100])
    node = start()
    request = Request(list(ids), {"avp": {"wait": True}})
    said = node.serve(request)
    assert (said["loaded"], said["computed"]) == (256, 344)
    assert node.holds(request, 600)
    assert list(store.verify()) == []
    assert start().serve(Request(list(ids)))["loaded"] == 576


def test_kv_of_another_engine_is_taken_only_if_that_is_accepted(start: Start, store: Store) -> None:
    ids = prompt(100)
    put_of_transformers(store, ids)
    assert start(save="nothing").serve(Request(list(ids)))["loaded"] == 0
    node = start(accept="bounded")
    request = Request(list(ids), {"avp": {"wait": True}})
    said = node.serve(request, new=60)
    assert (said["loaded"], said["exactness"]) == (96, "bounded")
    assert node.holds(request, 96)
    ours = [each for each in store.entries() if each.engine == "vllm"]
    assert {(each.start, each.exactness) for each in ours} == {(96, Exactness.BOUNDED), (128, Exactness.BOUNDED)}


def test_what_lies_in_vllms_own_cache_behind_such_kv_stays_bounded(start: Start, store: Store) -> None:
    ids = prompt(100)
    put_of_transformers(store, ids)
    node = start(accept="bounded")
    node.serve(Request(list(ids)))
    longer = [*ids[:96], *prompt(100, seed=5)]
    said = node.serve(Request(longer, {"avp": {"wait": True}}), local=96)
    assert (said["local"], said["exactness"]) == (96, "bounded")
    assert {each.exactness for each in store.entries() if each.engine == "vllm"} == {Exactness.BOUNDED}
    assert start().serve(Request([*longer, 1]))["loaded"] == 0


def put_of_transformers(store: Store, ids: list[int]) -> None:
    run = tuple(ids[:96])
    root = root_page(MODEL)
    layers = [tuple(Buffer("float32", kv(run, layer, part)) for part in (0, 1)) for layer in range(3)]
    whole = Segment(0, run, root, page_ids(root, run), "float32", "transformers", Exactness.EXACT, Copied(layers))  # type: ignore[arg-type]
    store.put(seal(MODEL, whole), tenant="")


def store_start(store: Store, path: Path) -> int:
    from avp.bundle import Limits, peek

    assert store
    return peek(path.read_bytes(), limits=Limits()).segments[0].start


def test_a_store_that_cannot_be_reached_is_left_alone_for_a_while() -> None:
    now = [0.0]
    node = Node("redis://127.0.0.1:1", clock=lambda: now[0])
    first, second, third = (Request(prompt(100)) for _ in range(3))
    with pytest.raises(StoreFailed):
        node.scheduler.find(first, 0)
    assert node.scheduler.find(second, 0) == 0  # nothing is asked
    now[0] += 31
    with pytest.raises(StoreFailed):
        node.scheduler.find(third, 0)
    assert node.serve(Request(prompt(100)))["computed"] == 100
    node.close()


def test_more_than_may_wait_for_a_slow_store_is_not_saved(start: Start, store: Store) -> None:
    page = 32 * MODEL.layout.bytes_per_token("float32")
    said = start(ahead=page).serve(Request(prompt(100), {"avp": {"wait": True}}))
    assert said["computed"] == 100
    assert list(store.entries()) == []
    start(ahead=8 * page).serve(Request(prompt(100), {"avp": {"wait": True}}))
    assert sum(each.count for each in store.entries()) == 96
