"""Another agent, at whatever distance: what can be asked of it, in an event loop. `avp.blocking` waits for the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np

from avp import registry
from avp.blob import Blob
from avp.buffers import Buffer
from avp.context import Context
from avp.delta import origin, sendable, store_new
from avp.errors import ConnectionFailed, HandleExpired, UsageError
from avp.fetching import Fetch
from avp.folders import cache_dir
from avp.greeting import hello_from_json, hello_to_json
from avp.handle import Handle
from avp.handshake import Agreement, CodecOffer, Floor, Hello, negotiate, offers
from avp.identity import CacheLayout, LayerLayout, ModelIdentity
from avp.manifest import Limits
from avp.portal import within
from avp.protocols import Channel, Connector, Event, Meter, Prompt, Store
from avp.receipt import Receipt
from avp.remote_stream import RemoteStream
from avp.security import Tenant
from avp.segment import Exactness
from avp.telemetry import span
from avp.transfer import Link, Tally, ask, receipt, send, send_growing
from avp.vocabulary import VocabularyCache, check_vocabulary

_PROBE = 8 << 20  # bytes that are sent to measure bandwidth
SHORT = 30.0  # seconds for a call without KV
LONG = 600.0  # seconds for a hand-over, a fetch or a generation, where the caller does not say
_LONGEST = 1e18  # seconds that a handle may be said to live
_WORTH = 1 << 20  # bytes from which on a hand-over tells the bandwidth


@dataclass(frozen=True, slots=True)
class Own:
    """What this side brings: who it is, what it runs, where it keeps segments, what it accepts."""

    name: str = "client"
    connector: Connector | None = None
    store: Store | None = None
    tenant: Tenant = field(default_factory=Tenant)
    limits: Limits = field(default_factory=Limits)
    accept: Exactness = Exactness.EXACT
    codecs: tuple[CodecOffer, ...] = ()  # what is known of codecs, above all their records
    floor: Floor = field(default_factory=Floor)


class AsyncRemote:
    """See the module. Used in one event loop; calls may run side by side. Close it, or use it with `async with`."""

    def __init__(self, channel: Channel, url: str, *, own: Own | None = None) -> None:
        self.url = url
        self.own = own or Own()
        self.bandwidth: float | None = None  # bytes a second, of the last probe or large hand-over
        self._channel = channel
        self._links: dict[Hello, Link] = {}
        self._others: dict[Own, AsyncRemote] = {}

    async def __aenter__(self) -> AsyncRemote:
        return self

    async def __aexit__(self, *problem: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connections; handles live on."""
        await self._channel.close()

    def on_behalf_of(self, own: Own) -> AsyncRemote:
        """The same connection, used by another side."""
        if own == self.own:
            return self
        if own not in self._others:
            self._others[own] = AsyncRemote(self._channel, self.url, own=own)
        return self._others[own]

    # --- what it is

    async def hello(self, *, timeout: float | None = SHORT) -> Hello:
        """What the other agent says of itself.

        Raises:
            ConnectionFailed, TimedOut, AccessDenied: as every call here.
        """
        event = await within(ask(self._channel, "hello", [{}], Meter()), timeout, "hello")
        return hello_from_json(event.get("hello"), limits=self.own.limits)

    async def measure(self, *, timeout: float | None = SHORT) -> float:
        """Bytes a second to the other agent, measured with 8 MiB."""
        started = perf_counter()
        await within(ask(self._channel, "probe", [_probe()], Meter()), timeout, "the probe")
        self.bandwidth = _PROBE / (perf_counter() - started)
        return self.bandwidth

    async def vocabulary(self, *, timeout: float | None = SHORT) -> tuple[str, ...]:
        """The tokens of the other agent's model, by id; asked for once, then taken from the user's cache."""
        digest = (await self.hello(timeout=timeout)).vocabulary
        if not digest:
            return ()
        cache = VocabularyCache(cache_dir() / "vocabularies")
        known = await asyncio.to_thread(cache.get, digest)
        if known is not None:
            return known
        event = await within(ask(self._channel, "vocabulary", [{"digest": digest}], Meter()), timeout, "vocabulary")
        tokens = check_vocabulary(event.get("vocabulary"), digest)
        await asyncio.to_thread(cache.put, digest, tokens)
        return tokens

    # --- hand-over

    async def hand_over(
        self,
        context: Context | Prompt,
        *,
        accept: str | None = None,
        policy: str = "best",
        codec: str | None = None,
        timeout: float | None = LONG,
    ) -> Handle:
        """Give the other agent a context, or a prompt that is computed here and travels while it is computed.

        accept: the worst class of exactness that will do; policy: "best", or "fastest" by the measured bandwidth.

        Raises:
            NoAgreement: nothing that both accept. Busy: no room there; try again after `retry_after` seconds.
            ContextTooLong, BundleError, ConnectionFailed, TimedOut: nothing is kept of it there but whole segments.
        """
        if policy == "fastest" and self.bandwidth is None:
            await self.measure(timeout=timeout)
        work = self._hand_over(context, accept=accept, policy=policy, codec=codec)
        return await within(work, timeout, "the hand-over")

    async def _hand_over(
        self, context: Context | Prompt, *, accept: str | None, policy: str, codec: str | None
    ) -> Handle:
        started = perf_counter()
        steps = None
        if not isinstance(context, Context):
            connector = self._connector()
            steps = connector.prefill_steps(context)
            context = await asyncio.to_thread(next, steps)
        tally = Tally()
        hello = self._sender(context, accept=accept, policy=policy, codec=codec)
        try:
            event, context, agreement = await self._send(hello, context, steps, tally)
        except HandleExpired:  # the session's time was over
            self._links.pop(hello, None)
            event, context, agreement = await self._send(hello, context, steps, tally)
        tally.add("total", started)
        if tally.meter.sent > _WORTH and tally.seconds.get("send"):
            self.bandwidth = tally.meter.sent / tally.seconds["send"]
        return self._handle(event, receipt(agreement, context, tally))

    async def _send(
        self, hello: Hello, context: Context, steps: Iterator[Context] | None, tally: Tally
    ) -> tuple[Event, Context, Agreement]:
        link = await self._link(hello, tally)
        agreement = negotiate(hello, link.theirs, tokens=len(context.tokens))
        with span("hand_over", mode=agreement.mode, tokens=len(context.tokens)):
            if steps is not None and agreement.mode == "kv":
                connector = self._connector()
                made = (connector.engine, connector.dtype)
                event, context = await send_growing(link, context, steps, made, agreement, tally)
                await self._store(context)
                return event, context, agreement
            same = link.salt == self.own.tenant.salt
            event = await send(link, context, agreement, tally, keep=self._keep if same else None)
            if not same:
                await self._store(context)
            return event, context, agreement

    def _keep(self, blob: Blob) -> None:
        if self.own.store is not None:
            self.own.store.put(blob, tenant=self.own.tenant.name)

    async def _store(self, context: Context) -> None:
        """Keep what was sent, so that it need not come back."""
        if self.own.store is not None:
            await asyncio.to_thread(store_new, self.own.store, context, self.own.tenant)

    # --- generation

    def stream(
        self,
        prompt: Prompt = "",
        *,
        context: Handle | Context | None = None,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        timeout: float | None = LONG,
    ) -> RemoteStream:
        """Text after `context` and `prompt`, made there: iterate over it, then `await` its `result()`.

        A context is handed over first. A handle of a third agent is fetched from there by this one. Leaving early
        (`aclose`) ends the run there.
        """
        options: dict[str, object] = {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop": stop if isinstance(stop, str) else list(stop),
            "seed": seed,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "chat_template_kwargs": None if chat_template_kwargs is None else dict(chat_template_kwargs),
        }

        async def start() -> Event:
            handle = await self.hand_over(context, timeout=timeout) if isinstance(context, Context) else context
            where = (
                {} if handle is None else {"handle": handle.id, "url": None if handle.url == self.url else handle.url}
            )
            return {"prompt": prompt if isinstance(prompt, str) else list(prompt), "options": options, **where}

        return RemoteStream(self._channel, start, self._handle, timeout=timeout)

    # --- handles

    async def receive(
        self, handle: Handle | str, *, accept: str | None = None, timeout: float | None = LONG
    ) -> tuple[Context, Receipt]:
        """The context of a handle, of which only what `own.store` lacks travels, and the receipt of that.

        Raises:
            HandleExpired: see there. Else as `hand_over`.
        """
        hello = self._receiver(accept)
        tally = Tally()

        async def attempt() -> tuple[Context, Receipt]:
            fetch = Fetch(await self._link(hello, tally), str(handle), self.own.store, self.own.tenant, tally)
            return await fetch.run()

        async def work() -> tuple[Context, Receipt]:
            known = self._links.get(hello)
            try:
                return await attempt()
            except HandleExpired:
                if known is None:
                    raise
                self._links.pop(hello, None)  # it may have been the session
                return await attempt()

        return await within(work(), timeout, "the fetch")

    async def fetch(self, handle: Handle | str, *, accept: str | None = None, timeout: float | None = LONG) -> Context:
        """As `receive`, without the receipt."""
        return (await self.receive(handle, accept=accept, timeout=timeout))[0]

    async def renew(self, handle: Handle | str, *, timeout: float | None = SHORT) -> float:
        """Begin the handle's time again; the seconds it lives now. Raises HandleExpired."""
        event = await within(ask(self._channel, "renew", [{"handle": str(handle)}], Meter()), timeout, "renew")
        ttl = event.get("ttl")
        if not _is_seconds(ttl):
            raise ConnectionFailed("a renewal was answered without its time. Fix: run the same version of avp at both.")
        return float(str(ttl))

    async def revoke(self, handle: Handle | str, *, timeout: float | None = SHORT) -> None:
        """End a handle; the KV stays in the store, where only the tenant finds it. Raises HandleExpired."""
        await within(ask(self._channel, "revoke", [{"handle": str(handle)}], Meter()), timeout, "revoke")

    # --- inside

    async def _link(self, hello: Hello, tally: Tally) -> Link:
        """The session for that hello, opened at its first use."""
        if hello not in self._links:
            started = perf_counter()
            event = await ask(self._channel, "hello", [{"hello": hello_to_json(hello)}], tally.meter)
            theirs = hello_from_json(event.get("hello"), limits=self.own.limits)
            session, salt = event.get("session"), event.get("salt")
            if not isinstance(session, str) or not isinstance(salt, str) or not _is_hex(salt):
                raise ConnectionFailed("the handshake was answered without a session. Fix: upgrade the other end.")
            self._links[hello] = Link(self._channel, session, bytes.fromhex(salt), hello, theirs)
            tally.add("hello", started)
        return self._links[hello]

    def _sender(self, context: Context, *, accept: str | None, policy: str, codec: str | None) -> Hello:
        """What is said of this side when it hands over that context."""
        engine, dtype = origin(context)
        connector = self.own.connector
        if context.kind == "kv" and not engine and connector is not None:
            engine, dtype = connector.engine, connector.dtype
        return Hello(
            self.own.name,
            context.model,
            engine,
            dtype,
            modes=sendable(context),
            codecs=_offers(codec, self.own.codecs),
            limits=self.own.limits,
            bandwidth=_rounded(self.bandwidth) if policy == "fastest" else None,
            accept=self.own.accept if accept is None else Exactness.parse(accept),
            policy=policy,
        )

    def _receiver(self, accept: str | None) -> Hello:
        connector = self.own.connector
        floor = self.own.accept if accept is None else Exactness.parse(accept)
        hello = Hello(self.own.name, codecs=offers(self.own.codecs), limits=self.own.limits, accept=floor)
        hello = replace(hello, floor=self.own.floor)
        if connector is None:
            return hello
        return replace(hello, model=connector.identity, engine=connector.engine, dtype=connector.dtype)

    def _connector(self) -> Connector:
        if self.own.connector is None:
            raise UsageError("a prompt can be handed over only by an agent that has a model. Fix: pass a context.")
        return self.own.connector

    def _handle(self, event: Event, done: Receipt | None) -> Handle:
        name, length, ttl = event.get("handle"), event.get("length"), event.get("ttl")
        if not isinstance(name, str) or type(length) is not int or not 0 <= length < 2**31 or not _is_seconds(ttl):
            raise ConnectionFailed("no handle came where one was due. Fix: run the same version of avp at both ends.")
        return Handle(name, self.url, length, Exactness.parse(str(event.get("exactness"))), float(str(ttl)), done)


def _is_hex(value: str) -> bool:
    return len(value) <= 128 and len(value) % 2 == 0 and set(value) <= set("0123456789abcdef")


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LONGEST


def _rounded(rate: float | None) -> float | None:
    """To one digit: every other hello opens another session."""
    return None if rate is None else float(f"{rate:.0e}")


def _offers(codec: str | None, known: Sequence[CodecOffer]) -> tuple[CodecOffer, ...]:
    """The named codec; or all that lose nothing, raw first, then those that have a record."""
    if codec is not None:
        registry.codec(codec)  # raises what there is to choose from
        return tuple(offer for offer in offers(known) if offer.name == codec)
    return tuple(offer for offer in offers(known) if offer.exactness is Exactness.EXACT or offer.records)


def _probe() -> Context:
    """8 MiB that are no KV."""
    model = ModelIdentity("probe", "probe", "0" * 64, "0" * 64, CacheLayout((LayerLayout(1, 1),)))
    hidden = Buffer("uint8", np.zeros((_PROBE >> 12, 1 << 12), np.uint8))
    return Context("hidden", model, hidden=hidden, exactness=Exactness.APPROXIMATE)
