"""The routes of AVP 0.4 beside our own verbs: what they answer, and that a frame goes in as any hand-over does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from avp import Agent, HandleExpired
from avp.context import text_context
from avp.errors import UsageError
from avp.interop.avp04 import write_frame
from avp.interop.avp04_context import frame_from_context, message_from_context
from avp.interop.avp04_proto import Metadata
from avp.security import Tenant
from avp.session import Quota
from avp.testing.tiny import tiny_connector

from ..cli.serving import avp, checkpoint
from ..cli.serving import serving as command
from ..samples import hidden_context, kv_bytes
from .server import PLAN, Served, connector, frame_of, post, prefilled, request, serving
from .wire import HASH, kv_frame

ASK = "How many pears?"
OTHER = "cd" * 32


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(Agent(connector(), name="ours")) as served:
        yield served


# --- handshake


def test_without_trust_nothing_is_told_that_a_peer_would_take_for_equal_weights(served: Served) -> None:
    mine = connector().identity
    told = [served.shake(), served.shake(model_hash=OTHER, model_family=mine.family, num_layers=4, hidden_dim=64)]
    for answer in told:
        assert answer["success"] is True
        assert answer["identity"] == {"model_family": mine.family, "model_id": mine.id}
        assert answer["mode"] == "json"
        assert "is not trusted here" in str(answer["reasons"])
    assert told[0]["session_id"] != told[1]["session_id"]


def test_with_trust_our_own_identity_is_told_and_nothing_of_the_caller(served: Served) -> None:
    answer = served.shake(model_hash=HASH, model_id="theirs", num_layers=99, hidden_dim=7)
    found = answer["identity"]
    assert (found["model_hash"], found["model_id"], found["num_layers"]) == (HASH, connector().identity.id, 4)
    assert (answer["agent_id"], answer["mode"], answer["reasons"]) == ("ours", "latent", [])
    assert "theirs" not in json.dumps(answer)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_model_whose_kv_no_frame_holds_is_talked_to_in_text(family: str) -> None:
    with serving(Agent(tiny_connector(family))) as served:
        answer = served.shake(model_hash=HASH)
    assert answer["mode"] == "json"
    assert "sliding-window layers" in str(answer["reasons"])
    assert "model_hash" not in answer["identity"]


def test_an_agent_without_a_model_takes_text_and_no_frame() -> None:
    with serving(Agent(name="keeper")) as keeper:
        answer = keeper.shake(model_hash=HASH)
        assert (answer["mode"], answer["identity"], answer["reasons"]) == ("json", {}, ["keeper has no model"])
        refused = keeper.post("transmit", kv_frame(tokens=3))
        assert (refused.status, refused.error) == (409, "IdentityMismatch")
        told = keeper.post("text", message_from_context(text_context(PLAN)))
        assert keeper.agent.endpoint.desk.handles.memory() == len(PLAN)
        assert told.json["exactness"] == "text"


def test_sessions_are_bounded() -> None:
    with serving(Agent(connector(), quota=Quota(sessions=3))) as served:
        told = [served.post("handshake", b"{}") for _ in range(4)]
    assert [each.status for each in told] == [200, 200, 200, 503]
    assert (told[3].error, told[3].fields["retry-after"]) == ("Busy", "1")


# --- transmit


@pytest.mark.parametrize("compression", ["", "zstd"])
def test_a_frame_becomes_a_handle_from_which_only_what_is_new_is_computed(served: Served, compression: str) -> None:
    context = prefilled(PLAN * 30)
    data = frame_of(context, compression=compression)
    told = served.post("transmit", data)
    assert (told.status, told.fields["cache-control"]) == (200, "no-store")
    receipt = told.json["receipt"]
    assert (receipt["mode"], receipt["bytes_sent"], receipt["bytes_reused"]) == ("kv", len(data), 0)
    assert told.json["length"] == receipt["tokens_reused"] == len(context)
    found = served.generate(ASK, told.json["handle"], tokens=12)
    own = connector().generate(ASK, context=context, max_new_tokens=12)
    assert found.tokens == own.tokens
    assert found.usage.cached_tokens == len(context)
    assert found.receipt.positions_computed == own.receipt.positions_computed
    assert kv_bytes(served.fetch(told.json["handle"])) == kv_bytes(context)


def test_kv_that_comes_again_is_kept_once(served: Served) -> None:
    handles = served.agent.endpoint.desk.handles
    context = prefilled(PLAN * 20)
    grown = connector().prefill(list(range(5, 25)), context=context)
    data, longer = frame_of(context), frame_of(grown)
    first = served.post("transmit", data).json
    once, stored = handles.memory(), len(list(served.agent.store.entries()))
    second = served.post("transmit", data).json
    assert first["handle"] != second["handle"]
    assert (handles.memory(), len(list(served.agent.store.entries()))) == (once, stored)
    served.post("transmit", longer)
    assert once < handles.memory() < once + len(longer) / 2


def test_what_is_kept_of_a_frame_does_not_hold_the_whole_frame(served: Served) -> None:
    data = frame_of(prefilled(PLAN * 60))
    name = served.post("transmit", data).json["handle"]
    with served.agent.endpoint.desk.handles.use(name, Tenant()) as context:
        kept = {memory_of(segment.read(0, "k").array) for segment in context.segments}
    assert len(kept) == len(context.segments) > 2
    assert all(size <= len(data) / 2 for _, size in kept)


def memory_of(array: npt.NDArray[np.generic]) -> tuple[int, int]:
    """Which memory an array is a view of in the end, and its bytes."""
    found: object = array
    while (under := found.obj if isinstance(found, memoryview) else getattr(found, "base", None)) is not None:
        found = under
    return id(found), memoryview(found).nbytes  # type: ignore[arg-type]


def test_a_frame_without_a_hash_has_that_of_its_session(served: Served) -> None:
    context = prefilled()
    assert served.post("transmit", frame_of(context, model_hash="")).error == "IdentityMismatch"
    trusted, other = (served.shake(model_hash=each)["session_id"] for each in (HASH, OTHER))
    told = served.post("transmit", frame_of(context, model_hash="", session=trusted))
    assert any(HASH[:16] in reason for reason in told.json["receipt"]["reasons"])
    for data in (frame_of(context, model_hash="", session=other), frame_of(context, model_hash=OTHER, session=trusted)):
        refused = served.post("transmit", data)
        assert (refused.status, refused.error) == (409, "IdentityMismatch")
        assert "trust_model_hash" in refused.message


def test_kv_of_another_dtype_is_taken_only_where_less_than_exact_will_do() -> None:
    data = frame_of(tiny_connector(seed=3, dtype=torch.bfloat16).prefill([5, 6, 7, 8]))
    with serving(Agent(connector())) as strict:
        refused = strict.post("transmit", data)
        assert (refused.status, refused.error) == (409, "NoAgreement")
        assert "transformers in bfloat16 is bounded to transformers in float32" in refused.message
        assert strict.keeps_nothing()
    with serving(Agent(connector(), accept="bounded")) as lenient:
        told = lenient.post("transmit", data)
    assert (told.status, told.json["receipt"]["mode"]) == (200, "kv")


def test_a_context_that_is_longer_than_the_model_is_refused(served: Served) -> None:
    layer = connector().identity.layout.layers[0]
    data = kv_frame(layers=4, kv_heads=layer.kv_heads, head_dim=layer.head_dim, tokens=1025, dtype="float32")
    refused = served.post("transmit", data)
    assert (refused.status, refused.error) == (413, "ContextTooLong")
    assert served.keeps_nothing()


def test_hidden_states_and_kv_of_another_shape_are_refused(served: Served) -> None:
    hidden = served.post("transmit", frame_from_context(hidden_context(2, "float32"), model_hash=HASH))
    assert (hidden.status, hidden.error) == (400, "UnsupportedBundle")
    other = served.post("transmit", kv_frame(layers=3, tokens=3))
    assert (other.status, other.error) == (409, "IdentityMismatch")
    assert served.keeps_nothing()


# --- text


def test_text_is_taken_from_anybody_as_a_message_and_as_a_frame(served: Served) -> None:
    session = served.shake()["session_id"]
    message = message_from_context(text_context(PLAN), session_id=session)
    frame = frame_of(text_context(PLAN), model_hash="", session=session)
    expected = connector().generate([{"role": "user", "content": each} for each in (PLAN, ASK)], max_new_tokens=8)
    for route, data in (("text", message), ("transmit", frame)):
        told = served.post(route, data)
        receipt = told.json["receipt"]
        assert (receipt["mode"], receipt["exactness"], receipt["bytes_sent"]) == ("text", "text", len(data))
        assert receipt["tokens_reused"] == 0
        assert served.generate(ASK, told.json["handle"], tokens=8).tokens == expected.tokens


# --- beside our own


def test_the_routes_lie_under_the_path_of_the_url() -> None:
    with serving(Agent(connector(), name="ours"), path="/agents/ours") as served:
        assert served.url.endswith("/agents/ours")
        assert served.shake(model_hash=HASH)["mode"] == "latent"
        name = served.post("transmit", frame_of(prefilled())).json["handle"]
        assert len(served.generate(ASK, name, tokens=3).tokens) == 3


def test_health_says_only_that_it_lives(served: Served) -> None:
    answer = request("GET", f"{served.url}/health")
    assert (answer.status, answer.json) == (200, {"status": "ok"})


def test_a_handle_of_a_frame_can_be_revoked(served: Served) -> None:
    name = served.post("transmit", frame_of(prefilled())).json["handle"]
    with served.agent.connect(served.url) as remote:
        remote.revoke(name)
    with pytest.raises(HandleExpired):
        served.fetch(name)
    assert served.agent.endpoint.desk.handles.memory() == 0


@pytest.mark.parametrize("trust", ["", "ab", "AB" * 32, "xy" * 32])
def test_what_is_no_model_hash_cannot_be_trusted(trust: str) -> None:
    with pytest.raises(UsageError, match=r"no model hash of AVP 0\.4"), serving(Agent(), trust=(trust,)):
        pass


def test_an_empty_frame_is_no_trusted_one(served: Served) -> None:
    refused = served.post("transmit", write_frame(Metadata(), b""))
    assert (refused.status, refused.error) == (409, "IdentityMismatch")


def test_the_command_trusts_the_hashes_that_it_is_given(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", seed=3)
    given = ("--listen", "http://127.0.0.1:0", "--model", model, "--dtype", "float32", "--trust-model-hash", HASH)
    with command(*given, "--trust-model-hash", OTHER) as server:
        for claimed, mode in ((HASH, "latent"), (OTHER, "latent"), ("ef" * 32, "json")):
            body = json.dumps({"identity": {"model_hash": claimed}}).encode()
            assert post(server.urls[0], "handshake", body).json["mode"] == mode
        told = post(server.urls[0], "transmit", frame_of(prefilled())).json
    assert told["receipt"]["mode"] == "kv"


def test_the_command_refuses_what_is_no_hash_before_it_loads_a_model() -> None:
    done = avp("serve", "--listen", "http://127.0.0.1:0", "--model", "nowhere", "--trust-model-hash", "ab", ends=2)
    assert "no model hash of AVP 0.4" in done.stderr
