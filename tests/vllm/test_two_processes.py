"""One vLLM computes, another answers from the store, by token prefix: SmolLM2 in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from avp.segment import Exactness
from avp.stores import open_store

from .conftest import Plain
from .engines import ANSWER, PROMPT, Process, Said, offline

pytestmark = pytest.mark.real
TENANT = {"tenant": "red", "secret": "one"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("red")


@pytest.fixture(scope="module")
def first(vllm_python: str, model: Path, prose: tuple[int, ...], folder: Path) -> Said:
    """A process that computes the prompt, and ends."""
    with offline(vllm_python, model, {"store": f"disk:{folder}/store", **TENANT}, folder / "first.log") as engine:
        return engine.generate(prose[PROMPT], count=ANSWER)[0]


@pytest.fixture(scope="module")
def second(first: Said, vllm_python: str, model: Path, folder: Path) -> Iterator[Process]:
    with offline(vllm_python, model, {"store": f"disk:{folder}/store", **TENANT}, folder / "second.log") as engine:
        yield engine


def test_with_the_plug_in_and_an_empty_store_vllm_computes_and_answers_as_without(first: Said, plain: Plain) -> None:
    assert first.ids == plain.answer
    assert first.avp is not None
    assert (first.avp["loaded"], first.avp["local"], first.avp["computed"]) == (0, 0, 1000 + ANSWER - 1)
    assert (first.avp["tokens"], first.avp["exactness"], first.avp["reasons"]) == (992, "exact", [])


def test_what_was_computed_is_in_the_store_as_exact_segments_of_this_engine(first: Said, folder: Path) -> None:
    store = open_store(f"disk:{folder}/store")
    held = list(store.entries())
    assert sum(each.count for each in held) == 992
    assert {(each.tenant, each.engine, each.dtype, each.exactness) for each in held} == {
        ("red", "vllm", "float32", Exactness.EXACT)
    }
    assert first.avp is not None
    assert first.avp["handle"] in {each.page for each in held}
    assert list(store.verify()) == []
    store.close()


def test_another_process_loads_all_full_blocks_and_answers_the_same(
    second: Process, first: Said, plain: Plain, prose: tuple[int, ...]
) -> None:
    before = second.hits()
    said = second.generate(prose[PROMPT], count=ANSWER)[0]
    assert said.ids == plain.answer
    assert said.avp is not None
    assert (said.avp["loaded"], said.avp["local"], said.avp["computed"]) == (992, 0, 8 + ANSWER - 1)
    assert second.hits() - before == said.cached == 992
    assert said.avp["handle"] == first.avp["handle"] if first.avp else False


def test_a_handle_says_how_far_to_load(second: Process, first: Said, prose: tuple[int, ...], folder: Path) -> None:
    store = open_store(f"disk:{folder}/store")
    early = next(each for each in store.entries() if each.start == 256).page  # positions up to 512
    store.close()
    for params, loaded in (
        ({"handle": early}, 512),
        ({"pages": [early]}, 0),  # not its beginning
        ({"handle": "0" * 64}, 0),
        ({}, 992),
    ):
        second.reset()
        said = second.generate(prose[PROMPT], params=params)[0]
        assert said.avp is not None
        assert said.avp["loaded"] == loaded, params


def test_a_request_that_asks_nonsense_is_answered_and_told(
    second: Process, prose: tuple[int, ...], plain: Plain
) -> None:
    said = second.generate(prose[PROMPT], params={"handel": "x"})[0]
    assert said.ids == plain.answer[:1]
    assert said.avp is not None
    assert "may hold handle, pages, wait and tail" in said.avp["reasons"][0]


def test_a_corrupted_segment_is_computed_again_and_repaired(
    second: Process, plain: Plain, prose: tuple[int, ...], folder: Path
) -> None:
    store = open_store(f"disk:{folder}/store")
    second.reset()
    file = next(path for path in (folder / "store" / "segments").glob("*/*.avp") if _starts_at(path, 512))
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    assert len(list(store.verify())) == 1
    said = second.generate(prose[PROMPT], count=ANSWER, params={"wait": True})[0]
    assert said.ids == plain.answer
    assert said.avp is not None
    assert (said.avp["loaded"], said.avp["computed"]) == (512, 488 + ANSWER - 1)
    assert list(store.verify()) == []
    second.reset()
    again = second.generate(prose[PROMPT], count=ANSWER)[0]
    assert again.ids == plain.answer
    assert again.avp is not None
    assert again.avp["loaded"] == 992
    store.close()


def test_a_page_that_the_store_lost_is_computed_and_put_again(
    second: Process, plain: Plain, prose: tuple[int, ...], folder: Path
) -> None:
    store = open_store(f"disk:{folder}/store")
    lost = next(each for each in store.entries() if each.start == 256).page
    assert store.remove(lost, tenant="red") == 1
    second.reset()
    said = second.generate(prose[PROMPT], count=ANSWER, params={"wait": True})[0]
    assert said.ids == plain.answer
    assert said.avp is not None
    assert said.avp["loaded"] == 256
    assert sum(each.count for each in store.entries()) == 992
    store.close()


def test_eight_requests_at_once_load_and_answer_as_one(second: Process, plain: Plain, prose: tuple[int, ...]) -> None:
    second.reset()
    said = second.generate(*[prose[PROMPT]] * 8)
    assert {each.ids for each in said} == {plain.answer[:1]}
    assert {each.cached for each in said} == {992}


def _starts_at(path: Path, position: int) -> bool:
    from avp.bundle import Limits, peek

    return peek(path.read_bytes(), limits=Limits()).segments[0].start == position
