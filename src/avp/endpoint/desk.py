"""What all verbs of an endpoint share: the model, the store, the handles, and what the agent says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from avp import registry
from avp.context import Context
from avp.errors import BundleError, TimedOut, UsageError
from avp.handshake import CodecOffer, Floor, Hello, offers
from avp.manifest import Limits
from avp.protocols import Connector, Event, Item, Store
from avp.security import Caller, Security, Tenant
from avp.segment import Exactness
from avp.session import Handles, Quota, Session
from avp.vocabulary import vocabulary_digest

Pull = Callable[[str, str, Tenant], Awaitable[Context]]  # (url, handle, for whom) -> the context that is there


@dataclass(frozen=True, slots=True)
class Rules:
    """What an endpoint takes and keeps, from whom, and from where it fetches itself.

    peers: URLs of agents whose handles a caller may name. Callers of this machine may name those of this machine.
    codecs: what is known of codecs, above all their records. floor: what a lossy codec's record must reach.
    """

    limits: Limits = field(default_factory=Limits)
    accept: Exactness = Exactness.EXACT
    quota: Quota = field(default_factory=Quota)
    security: Security = field(default_factory=Security)
    peers: tuple[str, ...] = ()
    codecs: tuple[CodecOffer, ...] = ()
    floor: Floor = field(default_factory=Floor)

    def is_peer(self, url: str) -> bool:
        """Whether the URL is a peer's, or below one."""
        return any(url == peer or url.startswith(peer.rstrip("/") + "/") for peer in self.peers)


class Desk:
    """See the module."""

    def __init__(self, connector: Connector | None, *, name: str, store: Store, rules: Rules, pull: Pull) -> None:
        self.connector = connector
        self.name = name
        self.store = store
        self.rules = rules
        self.pull = pull
        self.handles = Handles(rules.quota)
        self.prefill: float | None = None  # positions a second, measured on what callers asked for

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The model's tokens by id."""
        return () if self.connector is None else tuple(self.connector.vocabulary())

    @cached_property
    def _about(self) -> Hello:
        hello = Hello(
            self.name,
            codecs=offers(self.rules.codecs),
            transports=registry.names("avp.transports"),
            limits=self.rules.limits,
            accept=self.rules.accept,
            floor=self.rules.floor,
        )
        connector = self.connector
        if connector is None:
            return hello
        return replace(
            hello,
            model=connector.identity,
            engine=connector.engine,
            dtype=connector.dtype,
            vocabulary=vocabulary_digest(self.vocabulary),
        )

    def hello(self) -> Hello:
        """What the agent says of itself."""
        return replace(self._about, prefill=self.prefill)

    def session(self, event: Event, caller: Caller) -> Session:
        """The session that an event names, or that of callers that name none. Raises HandleExpired."""
        if event.get("session") is None:
            return self.handles.unnamed(caller.tenant)
        return self.handles.session(text(event, "session"), caller.tenant)

    def keep(self, context: Context, session: Session) -> Mapping[str, object]:
        """A handle for a context, as it is told to a caller."""
        name, ttl = self.handles.keep(context, session)
        return {"handle": name, "ttl": ttl, "length": len(context), "exactness": context.exactness.label}


async def timely(items: AsyncIterator[Item], *, seconds: float) -> AsyncIterator[Item]:
    """The items; raises as `in_time`."""
    while (item := await in_time(items, seconds=seconds)) is not None:
        yield item


async def in_time(items: AsyncIterator[Item], *, seconds: float) -> Item | None:
    """The next item, if it is whole in so many seconds; None after the last. A caller that sends a byte now and then
    holds nothing for long.

    Raises:
        TimedOut: it was not.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await anext(items, None)
    except TimeoutError as error:
        if isinstance(error, TimedOut) or not limit.expired():
            raise
        raise TimedOut(
            f"no whole event or segment came within {seconds:g} s. Fix: send without such pauses, and smaller segments "
            "over a slow line."
        ) from error


async def first_event(items: AsyncIterator[Item]) -> Event:
    """The event that a call begins with; raises as `as_event`."""
    return as_event(await anext(items, None))


def as_event(item: Item | None) -> Event:
    """The item, which must be an event.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(item, Mapping):
        raise UsageError("a call begins with an event, a JSON object. Fix: see docs/spec/protocol.md.")
    return item


def text(event: Event, name: str) -> str:
    """A string of an event.

    Raises:
        UsageError: it is missing or none.
    """
    value = event.get(name)
    if not isinstance(value, str):
        raise UsageError(f"the call lacks {name}, or it is no string. Fix: see docs/spec/protocol.md.")
    return value


def blob_expected(item: Item) -> BundleError:
    """What to raise where a segment was due."""
    return BundleError(f"a {type(item).__name__} came where a segment was due. Fix: see docs/spec/protocol.md.")
