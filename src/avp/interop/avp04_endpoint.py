"""The endpoint of an agent that also answers peers of AVP 0.4: what each of their routes does, without HTTP.

A frame goes into the agent by the road of every hand-over: the same negotiation, quota, store and table of handles. A
peer is given our model's hash only if it named one that the operator trusts: it would take equal shapes for equal
weights, and send, or inject, KV of others.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator, Collection, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from avp.context import Context, text_context
from avp.direct import DirectChannel
from avp.endpoint import AgentEndpoint
from avp.errors import (
    BundleError,
    IdentityMismatch,
    LimitExceeded,
    TimedOut,
    TruncatedBundle,
    UnsupportedBundle,
    UnsupportedCache,
    UsageError,
)
from avp.identity import ModelIdentity
from avp.interop.avp04 import Frame, expanded_size, peek_frame, read_frame
from avp.interop.avp04_context import (
    check_trust,
    context_from_frame,
    context_from_message,
    read_message,
    trust_reason,
)
from avp.interop.avp04_kv import copied, one_layer
from avp.interop.avp04_proto import Metadata, Mode
from avp.manifest import Limits, parse_json
from avp.protocols import Event, Item
from avp.receipt import Receipt, receipt_to_json
from avp.remote import AsyncRemote, Own
from avp.security import Caller, Security, Tenant
from avp.segment import Exactness

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

SPEC = "0.4"
LOG = logging.getLogger("avp")
_HASH = re.compile("[0-9a-f]{64}")
_HELLO_BYTES = 1 << 16  # of a handshake: the SDK's takes some 500
_PATIENCE = 60.0  # seconds in which a frame must be whole, besides those for its bytes
_SLOWEST = 1 << 16  # bytes a second: a line that carries less counts as none
_PEER = "a peer of AVP 0.4"


class Endpoint04:
    """Answers as `endpoint` does; `routes` are those of AVP 0.4, for the HTTP transport. Used in one event loop.

    trust: model hashes of peers whose weights the operator knows to be those that run here.
    """

    def __init__(self, endpoint: AgentEndpoint, *, trust: Collection[str] = ()) -> None:
        self._endpoint, self._desk = endpoint, endpoint.desk
        self._trust = check_hashes(trust)
        self._hashes: OrderedDict[str, str] = OrderedDict()  # what a session's peer calls its model; last used last
        self._remotes: dict[Tenant, AsyncRemote] = {}

    @property
    def limits(self) -> Limits:
        """What may be read from a caller."""
        return self._endpoint.limits

    def admit(self, token: str | None, *, address: str) -> Caller:
        """Who calls; raises AccessDenied."""
        return self._endpoint.admit(token, address=address)

    def answer(self, verb: str, items: AsyncIterator[Item], *, caller: Caller) -> AsyncIterator[Item]:
        """Carry out a verb of our own."""
        return self._endpoint.answer(verb, items, caller=caller)

    async def bundle(self, handle: str, *, caller: Caller) -> tuple[bytes | memoryview, ...]:
        """The context of a handle as a bundle."""
        return await self._endpoint.bundle(handle, caller=caller)

    def routes(self, *, security: Security, idle: float) -> list[BaseRoute]:
        """What the HTTP transport serves besides our own verbs."""
        from avp.interop.avp04_http import routes

        return routes(self, security=security, idle=idle)

    # --- the routes of 0.4

    async def handshake(self, body: AsyncIterable[bytes], caller: Caller) -> Event:
        """Open a session; say which model runs here, and how the peer can hand over."""
        claimed = _claimed(await self._whole(body, _HELLO_BYTES), self.limits)
        refused = self._why_no_kv(claimed)
        session = self._desk.handles.open(caller.tenant)
        self._hashes[session.id] = claimed
        while len(self._hashes) > self._desk.rules.quota.sessions:
            self._hashes.popitem(last=False)
        LOG.info("handshake of AVP 0.4: model hash %s, %s", claimed or "none", "json" if refused else "latent")
        return {
            "success": True,
            "agent_id": self._desk.name,
            "avp_version": SPEC,
            "capabilities": {},
            "session_id": session.id,
            "identity": self._identity("" if refused else claimed),
            "mode": "json" if refused else "latent",
            "reasons": [refused] if refused else [],
        }

    async def transmit(self, body: AsyncIterable[bytes], caller: Caller) -> Event:
        """A handle for what a frame holds: KV of trusted weights, or text."""
        context, metadata, size = await self._take(body, caller)
        if context.kind == "text":
            return self._keep_text(context, metadata.session_id, size, caller)
        handle = await self._remote(caller).hand_over(context)
        done = handle.receipt or Receipt("kv", context.exactness)
        # All of it travelled, also what was here already.
        done = replace(done, bytes_sent=size, bytes_reused=0, reasons=(*done.reasons, trust_reason(metadata)))
        about = {"ttl": handle.ttl, "length": len(handle), "exactness": handle.exactness.label}
        return {"success": True, "handle": handle.id, **about, "receipt": receipt_to_json(done)}

    async def text(self, body: AsyncIterable[bytes], caller: Caller) -> Event:
        """A handle for a message."""
        data = await self._whole(body, self.limits.header)
        content, session = read_message(data, limits=self.limits)
        return self._keep_text(text_context(content), session, len(data), caller)

    # --- inside

    def _why_no_kv(self, claimed: str) -> str:
        """Why a peer must not send KV; "" if it may."""
        connector = self._desk.connector
        if connector is None:
            return f"{self._desk.name} has no model"
        if claimed not in self._trust:
            return (
                f"the model hash {claimed or '(none)'} is not trusted here to stand for {connector.identity.describe()}"
            )
        try:
            one_layer(connector.identity.layout, connector.identity.describe())
        except UnsupportedCache as error:
            return str(error)
        return ""

    def _identity(self, trusted: str) -> Mapping[str, object]:
        """Our model as 0.4 names it. Without trust no figure that a peer would compare: equal shapes, and an equal
        tokenizer, are enough for it to send KV or projected states.
        """
        connector = self._desk.connector
        if connector is None:
            return {}
        model = connector.identity
        named = {"model_family": model.family, "model_id": model.id}
        if not trusted:
            return named
        layer = one_layer(model.layout, model.describe())
        shape = {"num_layers": len(model.layout.layers), "num_kv_heads": layer.kv_heads, "head_dim": layer.head_dim}
        return {**named, "model_hash": trusted, **shape}

    async def _whole(self, body: AsyncIterable[bytes], most: int) -> bytes:
        """A body of JSON.

        Raises:
            LimitExceeded: more than so many bytes. TimedOut: it was not whole in time.
        """
        data = bytearray()
        async with _in_time(self._desk.rules.quota.idle):
            async for chunk in body:
                if len(data) + len(chunk) > most:
                    raise LimitExceeded(
                        f"the body has more than {most} bytes, the most that is read here. Fix: send less."
                    )
                data += chunk
        return bytes(data)

    async def _take(self, body: AsyncIterable[bytes], caller: Caller) -> tuple[Context, Metadata, int]:
        """What a frame holds, its metadata, and its bytes; nothing else is left of it."""
        with ExitStack() as room:
            data, metadata = await self._receive(body, caller, room)
            expanded = expanded_size(data, limits=self.limits)
            room.callback(self._desk.handles.reserve(caller.tenant, expanded).release)
            return await asyncio.to_thread(self._open, data, metadata), metadata, len(data)

    async def _receive(self, body: AsyncIterable[bytes], caller: Caller, room: ExitStack) -> tuple[bytearray, Metadata]:
        """The bytes of a frame, and its metadata as of `_admit`. Before more than they is waited for, what they say is
        admitted, and there is room for all.
        """
        data, size, metadata = bytearray(), 0, None
        async with _in_time(self._desk.rules.quota.idle) as limit:
            async for chunk in body:
                data += chunk
                if metadata is None and (start := peek_frame(data, limits=self.limits)) is not None:
                    size, metadata = start[0], self._admit(start[1], caller)
                    room.callback(self._desk.handles.reserve(caller.tenant, size).release)
                    limit.reschedule(asyncio.get_running_loop().time() + _PATIENCE + size / _SLOWEST)
                if metadata is not None and len(data) > size:
                    break  # the reader says so
        if metadata is None:
            raise TruncatedBundle(f"the frame ended after {len(data)} bytes. Fix: send the whole frame.")
        return data, metadata

    def _admit(self, metadata: Metadata, caller: Caller) -> Metadata:
        """The metadata with the model hash of the session where they name none.

        Raises:
            HandleExpired: no such session. IdentityMismatch: state of weights that are not trusted to run here.
        """
        name = metadata.session_id
        if name:
            self._desk.handles.session(name, caller.tenant)
            known = self._hashes.get(name, "")
            if known and not metadata.extra.get("model_hash"):
                metadata = replace(metadata, extra=MappingProxyType({**metadata.extra, "model_hash": known}))
            if name in self._hashes:
                self._hashes.move_to_end(name)
        if metadata.mode is not Mode.JSON:
            check_trust(metadata, self._model(), self._trusted(metadata))
        return metadata

    def _trusted(self, metadata: Metadata) -> str:
        """The hash that the metadata name, if it is one of the operator's."""
        claimed = metadata.extra.get("model_hash", "")
        return claimed if claimed in self._trust else ""

    def _model(self) -> ModelIdentity:
        connector = self._desk.connector
        if connector is None:
            raise IdentityMismatch(
                f"{self._desk.name} has no model, and a frame of AVP 0.4 does not say of which weights its KV is. "
                "Fix: send text, or send it to an agent that has the model."
            )
        return connector.identity

    def _open(self, data: bytearray, metadata: Metadata) -> Context:
        """The text of a frame, or its KV in memory of its own."""
        frame = Frame(metadata, read_frame(data, limits=self.limits).payload)
        if metadata.mode is Mode.JSON:
            return context_from_message(frame.payload, limits=self.limits)
        model, trusted = self._model(), self._trusted(metadata)
        context = context_from_frame(frame, model=model, trust_model_hash=trusted, limits=self.limits)
        if context.kind != "kv":
            raise UnsupportedBundle(
                "hidden states came, from which nobody can go on without the KV before them. Fix: send KV, or text."
            )
        return copied(context, len(model.layout.layers))

    def _remote(self, caller: Caller) -> AsyncRemote:
        """This agent, as peers of that tenant reach it."""
        if caller.tenant not in self._remotes:
            own = Own(_PEER, tenant=caller.tenant, limits=self.limits, accept=Exactness.TEXT)
            channel = DirectChannel(self._endpoint, caller=Caller(caller.tenant))
            self._remotes[caller.tenant] = AsyncRemote(channel, f"agent:{self._desk.name}", own=own)
        return self._remotes[caller.tenant]

    def _keep_text(self, context: Context, name: str, size: int, caller: Caller) -> Event:
        """Text that was text from the beginning is no fallback: it is taken whatever the agent accepts."""
        handles = self._desk.handles
        session = handles.session(name, caller.tenant) if name else handles.unnamed(caller.tenant)
        receipt = Receipt("text", Exactness.TEXT, bytes_sent=size, reasons=("the peer sent text",))
        kept = self._desk.keep(context, session)
        return {"success": True, **kept, "receipt": receipt_to_json(receipt)}


def check_hashes(trust: Collection[str]) -> frozenset[str]:
    """The model hashes, if they are such.

    Raises:
        UsageError: one is not 64 hex digits.
    """
    for each in [trust] if isinstance(trust, str) else trust:
        if not _HASH.fullmatch(each):
            raise UsageError(
                f"trust_model_hash is {each[:80]!r}, no model hash of AVP 0.4. "
                "Fix: give the 64 hex digits of the peer's get_model_identity().model_hash."
            )
    return frozenset([trust] if isinstance(trust, str) else trust)


def _claimed(body: bytes, limits: Limits) -> str:
    """The model hash that the peer of a handshake names; "" if it names none.

    Raises:
        BundleError: it is no handshake.
    """
    try:
        identity = parse_json(body, limits).get("identity", {})
        claimed = identity.get("model_hash", "") if isinstance(identity, Mapping) else None
    except BundleError as error:
        raise BundleError(f"the handshake is no JSON object: {error}") from error
    if not isinstance(claimed, str) or (claimed and not _HASH.fullmatch(claimed)):
        raise BundleError(
            "the handshake's identity is no object, or its model_hash not 64 hex digits. "
            "Fix: send what get_model_identity().to_dict() gives, or leave the identity out."
        )
    return claimed


@asynccontextmanager
async def _in_time(seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """A body that is whole in so many seconds: one that drips would hold its room for ever. Raises TimedOut."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield limit
    except TimeoutError as error:
        if isinstance(error, TimedOut) or not limit.expired():
            raise
        raise TimedOut("the request's body was not whole in time. Fix: send it faster, or less of it.") from error
