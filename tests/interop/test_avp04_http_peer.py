"""The peer's own HTTP client against our server: its contexts become handles, and go on here as they do there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import pytest
import trustme

import avp
from avp import Agent, Exactness, Security, serve
from avp.handle import Handle
from avp.security import Tenant

from .peer import Both

PLAN = "The planner plans 12 apples and 7 pears."
ASK = "How many pears does the critic read in the plan?"
NEW = 40


@pytest.fixture
def agent(both: Both) -> Iterator[Agent]:
    with Agent(both.ours, name="ours") as agent:
        yield agent


def go_on(url: str, name: str, *, token: str | None = None) -> tuple[int, ...]:
    """The tokens after a handle, asked for by our own protocol."""
    handle = Handle(name, url, 0, Exactness.EXACT, 0.0)
    with avp.connect(url, security=Security(token=token)) as remote:
        return remote.generate(ASK, context=handle, max_new_tokens=NEW).tokens


def test_a_trusted_peer_learns_that_it_may_send_kv(both: Both, agent: Agent) -> None:
    with serve(agent, "http://127.0.0.1:0", trust_model_hash=[both.hash]) as server:
        found = both.theirs.handshake(server.url)
    layer = both.ours.identity.layout.layers[0]
    assert (found["mode"], found["path"]) == ("LATENT", "hash_match")
    assert found["remote"] == {
        "model_family": both.ours.identity.family,
        "model_id": both.ours.identity.id,
        "model_hash": both.hash,
        "hidden_dim": 0,
        "num_layers": 4,
        "num_kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
    }


@pytest.mark.parametrize("trusted", [(), ("ab" * 32,)])
def test_a_peer_that_is_not_trusted_decides_for_text(both: Both, agent: Agent, trusted: tuple[str, ...]) -> None:
    with serve(agent, "http://127.0.0.1:0", trust_model_hash=trusted) as server:
        found = both.theirs.handshake(server.url)
        assert (found["mode"], found["path"]) == ("JSON", "json_fallback")
        sent = both.theirs.send_text(server.url, PLAN, session=found["session_id"])
        with avp.connect(server.url) as remote:
            handle = Handle(sent["handle"], server.url, 0, Exactness.TEXT, 0.0)
            text = remote.generate(ASK, context=handle, max_new_tokens=NEW)
    assert (sent["receipt"]["mode"], sent["exactness"]) == ("text", "text")
    user = {"role": "user", "content": PLAN}
    assert text.tokens == both.ours.generate([user, {"role": "user", "content": ASK}], max_new_tokens=NEW).tokens


@pytest.mark.parametrize(("named", "level"), [(True, "NONE"), (False, "NONE"), (True, "BALANCED")])
@pytest.mark.parametrize("steps", [0, 5])
def test_a_transmitted_context_goes_on_here_as_it_does_there(
    both: Both, agent: Agent, steps: int, named: bool, level: str
) -> None:
    data = both.theirs.think(PLAN, steps=steps)
    _, theirs = both.theirs.generate(ASK, data=data, tokens=NEW)
    with serve(agent, "http://127.0.0.1:0", trust_model_hash=[both.hash]) as server:
        session = both.theirs.handshake(server.url)["session_id"]
        sent = both.theirs.transmit(server.url, data, session=session, named=named, level=level)
        tokens = go_on(server.url, sent["handle"])
        again = go_on(server.url, sent["handle"])
    assert len(theirs) >= 8
    assert tokens == again == theirs
    assert tokens != both.theirs.generate(ASK, data=None, tokens=NEW)[1]
    receipt = sent["receipt"]
    assert (receipt["mode"], receipt["exactness"], receipt["tokens_reused"]) == ("kv", "approximate", sent["length"])
    assert any("trusted, not proven" in reason and both.hash[:16] in reason for reason in receipt["reasons"])


def test_kv_of_a_peer_that_is_not_trusted_is_refused_and_nothing_is_kept(both: Both, agent: Agent) -> None:
    data = both.theirs.think(PLAN, steps=0)
    with serve(agent, "http://127.0.0.1:0") as server:
        session = both.theirs.handshake(server.url)["session_id"]
        for named in (True, False):
            sent = both.theirs.transmit(server.url, data, session=session, named=named)
            assert sent["error"] == "TransportError"
            assert "409" in sent["said"]
            assert "IdentityMismatch" in sent["said"]
            assert "trust_model_hash" in sent["said"]
    assert len(agent.endpoint.desk.handles) == 0
    assert list(agent.store.entries()) == []


def test_a_peer_without_the_right_token_is_refused_everywhere(both: Both) -> None:
    tokens = {"right": Tenant.named("a"), "other": Tenant.named("b")}
    security = Security(tokens=MappingProxyType(tokens))
    data = both.theirs.think(PLAN, steps=0)
    with (
        Agent(both.ours, security=security) as agent,
        serve(agent, "http://127.0.0.1:0", trust_model_hash=[both.hash]) as server,
    ):
        for token in ("wrong", None):
            shaken = both.theirs.handshake(server.url, token=token)
            sent = both.theirs.transmit(server.url, data, token=token)
            told = both.theirs.send_text(server.url, PLAN, token=token)
            for answer in (shaken, sent, told):
                assert "401" in answer["said"]
                assert "AccessDenied" in answer["said"]
        session = both.theirs.handshake(server.url, token="right")["session_id"]
        assert "404" in both.theirs.transmit(server.url, data, session=session, token="other")["said"]
        sent = both.theirs.transmit(server.url, data, session=session, token="right")
        assert go_on(server.url, sent["handle"], token="right") == both.theirs.generate(ASK, data=data, tokens=NEW)[1]
        with pytest.raises(avp.HandleExpired, match="another tenant's"):
            go_on(server.url, sent["handle"], token="other")


def test_over_tls_the_peer_speaks_http2(both: Both, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    pem = tmp_path / "server.pem"
    security = Security(cert=pem, key=pem, tokens=MappingProxyType({"right": Tenant()}), http2=True)
    both.theirs.call("authority", file=str(tmp_path / "ca.pem"))
    data = both.theirs.think(PLAN * 20, steps=0)
    with (
        Agent(both.ours, security=security) as agent,
        serve(agent, "https://127.0.0.1:0", trust_model_hash=[both.hash]) as server,
    ):
        session = both.theirs.handshake(server.url, token="right")["session_id"]
        sent = both.theirs.transmit(server.url, data, session=session, token="right")
        handle = Handle(sent["handle"], server.url, 0, Exactness.EXACT, 0.0)
        tokens = agent.generate(ASK, context=handle, max_new_tokens=NEW).tokens
        assert "401" in both.theirs.transmit(server.url, data, token="wrong")["said"]
    assert sent["http"] == "HTTP/2"
    assert tokens == both.theirs.generate(ASK, data=data, tokens=NEW)[1]
