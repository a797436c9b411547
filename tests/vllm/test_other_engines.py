"""KV of one checkpoint between transformers and vLLM; and tenants, which share nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import avp
from avp.connectors.chat import Plan
from avp.connectors.vllm_shelf import Shelf
from avp.context import Turn
from avp.delta import store_new
from avp.protocols import Store
from avp.security import Tenant
from avp.segment import Exactness
from avp.stores import open_store

from .conftest import Plain
from .engines import ANSWER, POSITIONS, PROMPT, Process, offline

pytestmark = pytest.mark.real
BLUE = Tenant.named("blue", secret=b"two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blue")


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[Store]:
    opened = open_store(f"disk:{folder}/store")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def made(transformer: avp.HuggingFaceConnector, prose: tuple[int, ...], store: Store) -> avp.Context:
    """A context of transformers, in the store of two tenants."""
    context = transformer.prefill(list(prose[PROMPT]))
    store_new(store, context, BLUE)
    store_new(store, context, Tenant.named("green", secret=b"three"))
    return context


@pytest.fixture(scope="module")
def engine(made: avp.Context, vllm_python: str, model: Path, folder: Path) -> Iterator[Process]:
    extra = {"store": f"disk:{folder}/store", "tenant": "blue", "secret": "two", "accept": "bounded"}
    with offline(vllm_python, model, extra, folder / "log") as opened:
        yield opened


def test_vllm_goes_on_from_kv_of_transformers(
    engine: Process, made: avp.Context, prose: tuple[int, ...], plain: Plain
) -> None:
    said = engine.generate(prose[PROMPT], count=ANSWER, params={"wait": True})[0]
    assert said.avp is not None
    assert (said.avp["loaded"], said.avp["exactness"]) == (992, "bounded")
    engine.generate(prose[: POSITIONS.stop])
    following = [each.ids[0] for each in engine.generate(*(prose[:end] for end in POSITIONS))]
    agreed = sum(one == other for one, other in zip(following, plain.following, strict=True))
    assert agreed >= 0.99 * len(POSITIONS)


def test_what_vllm_computes_behind_kv_of_another_engine_is_bounded_too(
    engine: Process, prose: tuple[int, ...], store: Store
) -> None:
    engine.generate(prose[: POSITIONS.stop], params={"wait": True})
    ours = [each for each in store.entries(tenant="blue") if each.engine == "vllm"]
    assert {each.exactness for each in ours} == {Exactness.BOUNDED}
    assert min(each.start for each in ours) == 992


def test_tenants_share_nothing(
    engine: Process, transformer: avp.HuggingFaceConnector, prose: tuple[int, ...], store: Store
) -> None:
    """KV of another tenant, and of one that only bears the same name, lies in the very store of this engine."""
    ids = prose[200:700]
    context = transformer.prefill(list(ids))
    for other in (Tenant.named("green", secret=b"three"), Tenant.named("blue", secret=b"guessed"), Tenant("blue")):
        store_new(store, context, other)
    said = engine.generate(ids, params={"wait": True})[0]
    assert said.avp is not None
    assert (said.avp["loaded"], said.avp["computed"]) == (0, 500)
    plan = Plan(ids, 0, (Turn({"role": "raw", "content": ""}, (0, 500)),), {})
    for tenant, held in ((BLUE, "vllm"), (Tenant.named("blue", secret=b"guessed"), "transformers")):
        found = Shelf(store, tenant, transformer.identity, "float32").context(plan, 480, only_full=True)
        assert {segment.engine for segment in found.segments} == {held}


def test_a_cache_salt_of_a_request_divides_a_tenant_further(engine: Process, prose: tuple[int, ...]) -> None:
    engine.reset()
    salted = engine.generate(prose[PROMPT], salt="mine")[0]
    assert salted.avp is not None
    assert salted.avp["loaded"] == 0
    plain = engine.generate(prose[PROMPT])[0]
    assert plain.avp is not None
    assert plain.avp["loaded"] == 992


def test_transformers_goes_on_from_kv_of_vllm(
    engine: Process, transformer: avp.HuggingFaceConnector, prose: tuple[int, ...], store: Store
) -> None:
    """The pages that vLLM computed itself, under a prompt that transformers never saw."""
    ids = prose[900:1500]
    engine.generate(ids, params={"wait": True, "tail": True})
    shelf = Shelf(store, BLUE, transformer.identity, "float32")
    context = shelf.context(Plan(ids, 0, (Turn({"role": "raw", "content": ""}, (0, 600)),), {}), 600)
    assert len(context) == 600
    assert {segment.engine for segment in context.segments} == {"vllm"}
    following = list(prose[1500:1700])
    theirs = transformer.score(following, context=context)
    own = transformer.score(following, context=transformer.prefill(list(ids)))
    assert float((theirs - own).abs().max()) < 1e-2
    generation = transformer.generate(following[:8], context=context, max_new_tokens=4)
    assert generation.receipt.exactness is Exactness.BOUNDED
    assert generation.receipt.tokens_reused == 600
