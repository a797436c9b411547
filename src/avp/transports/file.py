"""file: a hand-over to a file, and a fetch from one. The file is a bundle, as `Context.save` writes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from avp.context import Context
from avp.direct import DirectChannel, ended
from avp.endpoint import AgentEndpoint, Rules, without_salt
from avp.endpoint.desk import first_event
from avp.errors import AccessDenied, HandleExpired, StoreFailed, UsageError
from avp.manifest import Limits
from avp.protocols import Channel, Endpoint, Event, Item, Listener
from avp.security import Caller, Security, Tenant
from avp.segment import Exactness
from avp.stores.memory import MemoryStore

_FOREVER = 1e9  # seconds that a file is said to live


class FileTransport:
    """See the module. What is handed over to `file:/a/b.avp` is in that file; its handle is the path."""

    def connect(self, url: str, *, security: Security) -> Channel:
        """A channel to the file; raises UsageError where the URL names none."""
        return DirectChannel(_FileEndpoint(_path(url)))

    async def serve(self, endpoint: Endpoint, url: str, *, security: Security) -> Listener:
        """A file answers by itself: raises UsageError."""
        raise UsageError(
            f"nothing listens at {url}. Fix: hand over to the file by its URL, and fetch from it by the same."
        )


class _FileEndpoint:
    """Keeps what it receives in memory until it is whole, then writes it; reads the file for a fetch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        rules = Rules(accept=Exactness.TEXT)
        self._inner = AgentEndpoint(None, name=f"file:{path}", store=MemoryStore(), rules=rules, pull=_pull)

    @property
    def limits(self) -> Limits:
        """Those of a bundle."""
        return self._inner.limits

    def admit(self, token: str | None, *, address: str) -> Caller:
        """Whoever may write the file."""
        return Caller()

    def answer(self, verb: str, items: AsyncIterator[Item], *, caller: Caller) -> AsyncIterator[Item]:
        """The verbs of a hand-over and of a fetch."""
        if verb in ("have", "receive"):
            return self._write(self._inner.answer(verb, items, caller=caller), caller)
        if verb == "fetch":
            return self._give(items, caller)
        return self._inner.answer(verb, items, caller=caller)

    async def _write(self, answer: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        async with ended(answer) as made:
            async for item in made:
                if not isinstance(item, Mapping) or "handle" not in item:
                    yield item
                    continue
                handles, name = self._inner.desk.handles, str(item["handle"])
                with handles.use(name, caller.tenant) as context:
                    await asyncio.to_thread(self._save, without_salt(context))
                handles.revoke(name, caller.tenant)  # the file is what is kept
                yield {**item, "handle": str(self._path), "ttl": _FOREVER}

    async def _give(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        """The same call, with the file's context under a handle of ours, as long as it takes."""
        event, desk = await first_event(items), self._inner.desk
        context = await asyncio.to_thread(self._load)
        kept = desk.keep(context, desk.session(event, caller))
        try:
            async with ended(
                self._inner.answer("fetch", _only({**event, "handle": kept["handle"]}), caller=caller)
            ) as made:
                async for item in made:
                    yield item
        finally:
            desk.handles.revoke(str(kept["handle"]), caller.tenant)

    def _load(self) -> Context:
        try:
            return Context.load(self._path, limits=self.limits)
        except FileNotFoundError as error:
            raise HandleExpired(f"there is no file {self._path}. Fix: hand a context over to it first.") from error
        except OSError as error:
            raise StoreFailed(f"{self._path} cannot be read: {error}. Fix: see that it is a file of yours.") from error

    def _save(self, context: Context) -> None:
        try:
            context.save(self._path)
        except OSError as error:
            raise StoreFailed(
                f"{self._path} cannot be written: {error}. Fix: see that its folder is there, writable and not full."
            ) from error


async def _only(event: Event) -> AsyncIterator[Item]:
    yield event


async def _pull(url: str, handle: str, tenant: Tenant) -> Context:
    raise AccessDenied("a file fetches nothing. Fix: ask an agent.")


def _path(url: str) -> Path:
    parts = urlsplit(url)
    path = unquote(parts.path)
    odd = parts.query or parts.fragment or "\0" in path
    if parts.netloc not in ("", "localhost") or not path or path.endswith("/") or odd:
        raise UsageError(
            f"{url!r} names no file of this machine. Fix: write file:/folder/name.avp, with %3F for ? and %23 for #."
        )
    return Path(path)


TRANSPORT = FileTransport()
