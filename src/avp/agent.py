"""Agent: a connector, a store and an endpoint under one name; hands contexts over, and takes them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from avp import network
from avp.context import Context
from avp.direct import DirectChannel
from avp.endpoint import AgentEndpoint, Rules
from avp.errors import UsageError
from avp.handle import Handle
from avp.handshake import CodecOffer, Floor, Hello
from avp.manifest import Limits
from avp.network import AsyncServer, Remote, Server, connect_async
from avp.portal import PORTAL
from avp.protocols import Connector, Prompt, Store, TextStream
from avp.receipt import Generation
from avp.remote import LONG, AsyncRemote, Own
from avp.security import Caller, Security, Tenant
from avp.segment import Exactness
from avp.session import Quota
from avp.stores import open_store
from avp.stores.memory import MemoryStore


class Agent:
    """See the module. `store` is a Store, a URL of one ("disk:", "redis://…"), or None: memory, 4 GiB.

    accept is the worst class of exactness that it puts up with, whichever side it is on. Without a connector it keeps
    and gives contexts, but generates nothing. Threads may use one agent at once. codecs: what is known of some codecs,
    above all the records of lossy ones; floor: what such a record must reach before the agent takes KV in that codec.
    """

    def __init__(
        self,
        connector: Connector | None = None,
        *,
        name: str = "agent",
        store: Store | str | None = None,
        limits: Limits | None = None,
        accept: str = "exact",
        quota: Quota | None = None,
        security: Security | None = None,
        tenant: Tenant | None = None,
        peers: Sequence[str] = (),
        codecs: Sequence[CodecOffer] = (),
        floor: Floor | None = None,
    ) -> None:
        self.name = name
        self.connector = connector
        self.store: Store = open_store(store) if isinstance(store, str) else MemoryStore() if store is None else store
        self.security = Security.from_environment() if security is None else security
        least, limits, floor, known = Exactness.parse(accept), limits or Limits(), floor or Floor(), tuple(codecs)
        self.own = Own(name, connector, self.store, tenant or Tenant(), limits, least, known, floor)
        rules = Rules(limits, least, quota or Quota(), self.security, tuple(peers), known, floor)
        self.endpoint = AgentEndpoint(connector, name=name, store=self.store, rules=rules, pull=self._pull)
        self._remotes: dict[str, Remote] = {}
        self._lock = threading.Lock()
        self._serial = secrets.token_hex(4)  # agents of one name are told apart by it

    def __repr__(self) -> str:
        return f"<Agent {self.name}, {self.connector.identity.describe() if self.connector else 'no model'}>"

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        """End its connections and let go of its store."""
        for remote in self._remotes.values():
            remote.close()
        self._remotes.clear()
        self.endpoint.close()
        self.store.close()

    def hello(self) -> Hello:
        """What it says of itself."""
        return self.endpoint.hello()

    # --- the engine's verbs

    def prefill(self, prompt: Prompt, *, context: Context | Handle | None = None) -> Context:
        """See the connector's."""
        with ExitStack() as stack:
            return self._engine().prefill(prompt, context=self._resolve(context, stack))

    def think(self, prompt: Prompt, *, steps: int = 20, context: Context | Handle | None = None) -> Context:
        """See the connector's."""
        with ExitStack() as stack:
            return self._engine().think(prompt, steps=steps, context=self._resolve(context, stack))

    def generate(
        self,
        prompt: Prompt = "",
        *,
        context: Context | Handle | None = None,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> Generation:
        """Text after a context, or after what a handle of this agent stands for; see the connector's."""
        with ExitStack() as stack:
            stream: TextStream = self._engine().stream(
                prompt,
                context=self._resolve(context, stack),
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                temperature=temperature,
                top_p=top_p,
                stop=stop,
                seed=seed,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                accept=self.own.accept.label,
            )
            return stream.result

    # --- hand-over

    def hand_over(
        self,
        context: Context | Prompt,
        *,
        to: Agent | Remote | str,
        accept: str | None = None,
        policy: str = "best",
        codec: str | None = None,
        timeout: float | None = LONG,
    ) -> Handle:
        """Give another agent a context, or a prompt that is computed here and travels while it is computed.

        Returns a handle of the other agent, with the receipt of what was done.

        Raises:
            NoAgreement: nothing that both accept; the message has a reason for each mode.
            Else as `AsyncRemote.hand_over`.
        """
        remote = self._remote(to)
        return PORTAL.run(remote.hand_over(context, accept=accept, policy=policy, codec=codec, timeout=timeout))

    async def hand_over_async(
        self,
        context: Context | Prompt,
        *,
        to: Agent | AsyncRemote | str,
        accept: str | None = None,
        policy: str = "best",
        codec: str | None = None,
        timeout: float | None = LONG,
    ) -> Handle:
        """As `hand_over`, in the caller's event loop."""
        if isinstance(to, AsyncRemote):
            remote = to.on_behalf_of(self.own)
            return await remote.hand_over(context, accept=accept, policy=policy, codec=codec, timeout=timeout)
        async with self.connect_async(to) as remote:
            return await remote.hand_over(context, accept=accept, policy=policy, codec=codec, timeout=timeout)

    def connect(self, to: Agent | str) -> Remote:
        """Another agent, as this one sees it: fetches go into this one's store."""
        return Remote(self.connect_async(to))

    def connect_async(self, to: Agent | str) -> AsyncRemote:
        """As `connect`, for use in one event loop."""
        if isinstance(to, Agent):
            channel = DirectChannel(to.endpoint, caller=Caller(self.own.tenant))
            return AsyncRemote(channel, to.url, own=self.own)
        return connect_async(to, own=self.own, security=self.security)

    @property
    def url(self) -> str:
        """How handles call it that were given without a network."""
        return f"agent:{self.name}#{self._serial}"

    def _remote(self, to: Agent | Remote | str) -> AsyncRemote:
        if isinstance(to, Remote):
            return to.on_behalf_of(self.own)
        key = to if isinstance(to, str) else to.url
        with self._lock:
            if key not in self._remotes:
                self._remotes[key] = self.connect(to)
            return self._remotes[key].on_behalf_of(self.own)

    async def _pull(self, url: str, handle: str, tenant: Tenant) -> Context:
        """Fetch what a caller's handle stands for from the agent that keeps it, into the caller's part of the store.

        The caller chose the URL: our token and certificate are shown there only if it is one of our peers.
        """
        own = replace(self.own, tenant=tenant)
        named = self.endpoint.desk.rules.is_peer(url)
        security = self.security if named else replace(self.security, token=None, cert=None, key=None)
        async with connect_async(url, own=own, security=security) as remote:
            return await remote.fetch(handle)

    def _engine(self) -> Connector:
        if self.connector is None:
            raise UsageError(f"{self.name} has no model. Fix: make it with a connector.")
        return self.connector

    def _resolve(self, context: Context | Handle | None, stack: ExitStack) -> Context | None:
        if isinstance(context, Handle):
            return stack.enter_context(self.endpoint.desk.handles.use(context.id, self.own.tenant))
        return context


def serve(agent: Agent, *urls: str, trust_model_hash: Sequence[str] = ()) -> Server:
    """Answer for an agent at these URLs (`http://127.0.0.1:0`, `unix:/run/a.sock`, …), in the background.

    trust_model_hash: what peers of AVP 0.4, which prove no weights, call the model whose weights run here.

    Raises:
        UsageError: an address that is not ours to listen at, or open to all without authentication; no model hash.
    """
    return network.serve(agent.endpoint, *urls, trust_model_hash=trust_model_hash)


async def serve_async(agent: Agent, *urls: str, trust_model_hash: Sequence[str] = ()) -> AsyncServer:
    """As `serve`, in the caller's event loop."""
    return await network.serve_async(agent.endpoint, *urls, trust_model_hash=trust_model_hash)
