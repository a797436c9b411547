"""docs/security.md: what it says of the log, of files and of what a caller is told."""

from __future__ import annotations

import logging
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest

import avp
from avp.agent import Agent
from avp.errors import AVPError
from avp.security import Security, Tenant
from avp.telemetry import listening, log_spans
from avp.testing.tiny import tiny_connector

PROMPT = "The parcel weighs twelve kilograms."
TOKEN, WRONG = "sesame-opens-the-door", "let-me-in-let-me-in"


@pytest.mark.parametrize("url", ["http://127.0.0.1:0", "grpc://127.0.0.1:0", "unix:{}/a.sock", "mem:logged"])
def test_no_prompt_no_text_no_token_and_no_handle_is_in_the_log(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="avp")
    secure = Security(token=TOKEN, tokens={TOKEN: Tenant.named("anna")})
    connector = tiny_connector()
    with (
        Agent(connector, name="a", security=secure) as agent,
        avp.serve(agent, url.format(tmp_path)) as server,
        listening(log_spans),
        agent.connect(server.url) as remote,
    ):
        handle = remote.hand_over(PROMPT)
        answer = remote.generate("Say it again.", context=handle, max_new_tokens=8)
        ids = remote.fetch(answer.context).tokens
        remote.revoke(handle)
        with pytest.raises(AVPError):
            remote.generate(PROMPT, context=handle)
        with avp.connect(server.url, security=Security(token=WRONG)) as stranger, pytest.raises(AVPError):
            stranger.hello()
    said = "\n".join(record.getMessage() for record in caplog.records if record.name == "avp")
    assert "generate by tenant 'anna'" in said
    assert "hand_over" in said
    for secret in (PROMPT, "Say it again", TOKEN, WRONG, str(handle), str(answer.context), str(list(ids[:4]))[1:-1]):
        assert secret not in said
    assert str(answer).strip() not in said


def test_whatever_is_written_is_its_owners_alone(tmp_path: Path) -> None:
    context = tiny_connector().prefill(PROMPT)
    context.save(tmp_path / "a.avp")
    with Agent(tiny_connector(), name="a", store=f"disk:{tmp_path}/store") as agent:
        agent.hand_over(context, to=f"file:{tmp_path}/b.avp")
        agent.hand_over(context, to=agent)
    found = [path for path in tmp_path.rglob("*") if path.suffix == ".avp" or path.is_relative_to(tmp_path / "store")]
    assert {path.suffix for path in found} >= {".avp"}
    assert len([path for path in found if path.suffix == ".avp"]) > 2
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_secrets_are_in_no_repr() -> None:
    tenant = replace(Tenant.named("anna", secret=b"pepper"))
    secure = Security(token=TOKEN, tokens={WRONG: tenant})
    assert not re.search(f"{TOKEN}|{WRONG}|salt", repr(secure) + repr(tenant))
    assert Tenant.named("anna", secret=b"pepper").salt != Tenant.named("anna").salt != Tenant.named("bert").salt


def test_an_unknown_handle_and_another_tenants_are_refused_alike() -> None:
    tokens = {"a": Tenant.named("anna"), "b": Tenant.named("bert")}
    with (
        Agent(tiny_connector(), name="agent", security=Security(tokens=tokens)) as agent,
        avp.serve(agent, "mem:alike") as server,
        avp.connect(server.url, security=Security(token="a")) as anna,
        avp.connect(server.url, security=Security(token="b")) as bert,
    ):
        handle = anna.hand_over(tiny_connector().prefill(PROMPT))
        said = []
        for each in (str(handle), "0" * 64):
            with pytest.raises(avp.HandleExpired) as caught:
                bert.renew(each)
            said.append(str(caught.value))
        assert said[0] == said[1]
