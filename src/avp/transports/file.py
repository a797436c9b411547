"""file: a hand-over to a file, and a fetch from one. The file is a bundle, as `Context.save` writes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from avp.context import Context
from avp.direct import DirectChannel
from avp.endpoint import AgentEndpoint, Rules, without_salt
from avp.errors import AccessDenied, HandleExpired, UsageError
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
            return self._inner.answer(verb, self._read(items, caller), caller=caller)
        return self._inner.answer(verb, items, caller=caller)

    async def _write(self, answer: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        async for item in answer:
            if not isinstance(item, Mapping) or "handle" not in item:
                yield item
                continue
            with self._inner.desk.handles.use(str(item["handle"]), caller.tenant) as context:
                await asyncio.to_thread(without_salt(context).save, self._path)
            yield {**item, "handle": str(self._path), "ttl": _FOREVER}

    async def _read(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        """The same call, with the file's context under a handle of ours."""
        async for item in items:
            if not isinstance(item, Mapping):
                yield item
                continue
            context = await asyncio.to_thread(self._load)
            session = self._inner.desk.session(item, caller)
            yield {**item, **_only_handle(self._inner.desk.keep(context, session))}

    def _load(self) -> Context:
        try:
            return Context.load(self._path, limits=self.limits)
        except FileNotFoundError as error:
            raise HandleExpired(f"there is no file {self._path}. Fix: hand a context over to it first.") from error


def _only_handle(kept: Event) -> Event:
    return {"handle": kept["handle"]}


async def _pull(url: str, handle: str, tenant: Tenant) -> Context:
    raise AccessDenied("a file fetches nothing. Fix: ask an agent.")


def _path(url: str) -> Path:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path or path.endswith("/"):
        raise UsageError(f"{url!r} names no file of this machine. Fix: write file:/folder/name.avp.")
    return Path(path)


TRANSPORT = FileTransport()
