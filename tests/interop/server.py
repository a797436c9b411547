"""An agent that peers of AVP 0.4 reach over HTTP, and a client for single requests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from avp import Agent, Context, Handle, HuggingFaceConnector, connect, serve
from avp.handle import RemoteGeneration
from avp.interop.avp04_context import frame_from_context
from avp.segment import Exactness
from avp.testing.tiny import tiny_connector

from .wire import HASH

KINDS = {"handshake": "application/json", "transmit": "application/avp+binary", "text": "application/json"}
PLAN = "The planner plans 12 apples and 7 pears."


@cache
def connector() -> HuggingFaceConnector:
    return tiny_connector(seed=3)


def prefilled(prompt: str = PLAN) -> Context:
    return connector().prefill(list(connector().tokenize(prompt)))


def frame_of(context: Context, *, model_hash: str = HASH, session: str = "", compression: str = "") -> bytes:
    return frame_from_context(context, model_hash=model_hash, session_id=session, compression=compression)


@dataclass(frozen=True)
class Answer:
    status: int
    fields: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """Class of the error that it is."""
        assert "Fix: " in self.message
        return str(self.json["error"]["type"])

    @property
    def message(self) -> str:
        return str(self.json["error"]["message"])


def request(method: str, url: str, body: bytes | None = None, fields: Mapping[str, str] | None = None) -> Answer:
    """One request on a connection of its own."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        connection.request(method, parts.path, body, dict(fields or {}))
        answer = connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def post(url: str, route: str, body: bytes, **changed: str | None) -> Answer:
    """A request as a 0.4 peer makes it, but for the fields that are changed; None leaves one out."""
    fields = {"content_type": KINDS[route], "avp_version": "0.4", "avp_agent_id": "theirs", **changed}
    given = {name.replace("_", "-"): value for name, value in fields.items() if value is not None}
    return request("POST", f"{url}/avp/v2/{route}", body, given)


@dataclass(frozen=True)
class Served:
    agent: Agent
    url: str

    def post(self, route: str, body: bytes, **changed: str | None) -> Answer:
        return post(self.url, route, body, **changed)

    def shake(self, **identity: object) -> Any:
        """The answer to a handshake."""
        return self.post("handshake", json.dumps({"agent_id": "theirs", "identity": identity}).encode()).json

    def generate(self, prompt: str, name: str, *, tokens: int) -> RemoteGeneration:
        """What the agent says after a handle, asked by our own protocol."""
        with connect(self.url) as remote:
            return remote.generate(prompt, context=self.handle(name), max_new_tokens=tokens)

    def fetch(self, name: str) -> Context:
        with connect(self.url) as remote:
            return remote.fetch(self.handle(name), accept="text")

    def handle(self, name: str) -> Handle:
        return Handle(name, self.url, 0, Exactness.EXACT, 0.0)

    def keeps_nothing(self) -> bool:
        handles = self.agent.endpoint.desk.handles
        return not len(handles) and not handles.memory() and not list(self.agent.store.entries())


@contextmanager
def serving(agent: Agent, *, trust: tuple[str, ...] = (HASH,), path: str = "") -> Iterator[Served]:
    with agent, serve(agent, f"http://127.0.0.1:0{path}", trust_model_hash=trust) as server:
        yield Served(agent, server.url)
