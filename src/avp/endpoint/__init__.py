"""The endpoint of an agent: what it answers, whatever the transport. The verbs are those of docs/spec/protocol.md."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import replace

from avp.direct import ended
from avp.endpoint.desk import Desk, Pull, Rules, first_event, text, timely
from avp.endpoint.generating import Generating
from avp.endpoint.giving import Giving, without_salt
from avp.endpoint.receiving import Receiving
from avp.errors import AccessDenied, AVPError, Busy, UsageError
from avp.greeting import hello_from_json, hello_to_json
from avp.handshake import Hello
from avp.manifest import Limits
from avp.protocols import Connector, Item, Store
from avp.security import Caller

__all__ = ["AgentEndpoint", "Rules", "without_salt"]
_log = logging.getLogger("avp")
_SMALL = 1 << 24  # bytes of an item that any endpoint takes: a probe has 8 MiB


class AgentEndpoint:
    """Answers for an agent. Threads and event loops may use it at once."""

    def __init__(self, connector: Connector | None, *, name: str, store: Store, rules: Rules, pull: Pull) -> None:
        self.desk = Desk(connector, name=name, store=store, rules=rules, pull=pull)
        self._giving = Giving(self.desk)
        self._generating = Generating(self.desk)
        receiving = Receiving(self.desk)
        self._verbs = {
            "hello": self._hello,
            "have": receiving.have,
            "receive": receiving.receive,
            "generate": self._generating.generate,
            "fetch": self._giving.fetch,
            "renew": self._renew,
            "revoke": self._revoke,
            "vocabulary": self._vocabulary,
            "probe": self._probe,
        }

    @property
    def limits(self) -> Limits:
        """What may be read from a caller: no item larger than all that is kept here, whatever it is."""
        limits, quota = self.desk.rules.limits, self.desk.rules.quota
        return replace(limits, bytes=min(limits.bytes, max(quota.memory, _SMALL)))

    def admit(self, token: str | None, *, address: str) -> Caller:
        """Who calls; raises AccessDenied."""
        try:
            return Caller(self.desk.rules.security.tenant(token), address)
        except AccessDenied:
            _log.warning("a caller at %s was refused: AccessDenied", address)
            raise

    def hello(self) -> Hello:
        """What the agent says of itself."""
        return self.desk.hello()

    def answer(self, verb: str, items: AsyncIterator[Item], *, caller: Caller) -> AsyncIterator[Item]:
        """Carry out a verb; raises UsageError for one that there is not, and what the verb raises."""
        if verb not in self._verbs:
            raise UsageError(f"there is no verb {verb[:40]!r}. Fix: use one of {', '.join(self._verbs)}.")
        if verb != "receive":  # which knows how long its segments may take
            items = timely(items, seconds=self.desk.rules.quota.idle)
        return self._noted(verb, items, caller)

    async def _noted(self, verb: str, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        """The answer; of a refusal the log has a line, without the message, which may quote what was sent."""
        try:
            async with ended(items) as given, ended(self._verbs[verb](given, caller)) as answer:
                async for item in answer:
                    yield item
        except AVPError as error:
            level = logging.INFO if isinstance(error, Busy) else logging.WARNING  # else a crowd would fill the log
            who = f"tenant {caller.tenant.name!r} at {caller.address}"
            _log.log(level, "%s by %s was refused: %s", verb, who, type(error).__name__)
            raise

    async def bundle(self, handle: str, *, caller: Caller) -> tuple[bytes | memoryview, ...]:
        """The context of a handle as a bundle, in runs; the same bytes each time. Raises HandleExpired."""
        return self._giving.bundle(handle, caller)

    def close(self) -> None:
        """Take nothing more."""
        self._generating.close()

    async def _hello(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        event = await first_event(items)
        own = self.hello()
        if event.get("hello") is None:
            yield {"hello": hello_to_json(own)}
            return
        theirs = hello_from_json(event["hello"], limits=self.limits)
        session = self.desk.handles.open(caller.tenant, hello=theirs, own=own)
        salt = caller.tenant.salt.hex()
        yield {"hello": hello_to_json(own), "session": session.id, "ttl": self.desk.rules.quota.ttl, "salt": salt}

    async def _renew(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        yield {"ttl": self.desk.handles.renew(text(await first_event(items), "handle"), caller.tenant)}

    async def _revoke(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        self.desk.handles.revoke(text(await first_event(items), "handle"), caller.tenant)
        yield {}

    async def _vocabulary(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        wanted = text(await first_event(items), "digest")
        if wanted != self.hello().vocabulary:
            raise UsageError(f"the vocabulary {wanted[:8]}… is not this model's. Fix: take the digest from its hello.")
        yield {"vocabulary": list(self.desk.vocabulary)}

    async def _probe(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        """Read all that comes and throw it away: how the near end measures bandwidth."""
        count = 0
        async for _ in items:
            count += 1
        yield {"items": count}
