"""The verb `generate`: text after a handle and a prompt, streamed; then the handle of what is there now."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from urllib.parse import urlsplit

from avp.context import Context
from avp.delta import store_new
from avp.endpoint.desk import Desk, first_event
from avp.errors import AccessDenied, Busy, ConnectionFailed, UsageError
from avp.protocols import Connector, Event, Item, Prompt, TextStream
from avp.receipt import Generation, receipt_to_json
from avp.security import Caller
from avp.telemetry import span

OPTIONS: Mapping[str, type | tuple[type, ...]] = {
    "max_new_tokens": int,
    "min_new_tokens": int,
    "temperature": (int, float),
    "top_p": (int, float),
    "stop": (str, list),
    "seed": (int, type(None)),
    "tools": (list, type(None)),
    "chat_template_kwargs": (dict, type(None)),
}
_MEASURED = 32  # positions that a prefill must have for its rate to say something
_LOCAL = ("127.", "localhost", "::1", "[::1]", "in-process", "unix")
_NETWORKS = ("http", "https", "grpc", "grpcs")  # not files: those are the server's user's, not the caller's
_END = object()


class Generating:
    """See the module."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        quota = desk.rules.quota
        self._pool = ThreadPoolExecutor(quota.running, thread_name_prefix="avp-generate")
        self._most = quota.running + quota.waiting
        self._lock = threading.Lock()
        self._count = 0  # generations under way or waiting

    async def generate(self, items: AsyncIterator[Item], caller: Caller) -> AsyncIterator[Item]:
        """Events {"text": …}, then {"result": …} with the new handle."""
        event = await first_event(items)
        connector = self._desk.connector
        if connector is None:
            raise UsageError(f"{self._desk.name} has no model and cannot generate. Fix: ask an agent that has one.")
        prompt, options = _prompt(event.get("prompt", "")), _options(event.get("options", {}))
        session = self._desk.session(event, caller)
        with ExitStack() as stack:
            context = await self._context(event, caller, stack)
            self._enter()
            stack.callback(self._leave)
            run = _Run(connector, prompt, context, options, asyncio.get_running_loop())
            self._submit(run)
            try:
                async for piece in run.pieces():
                    yield {"text": piece}
            finally:
                run.cancel()
            result = run.result()
            await asyncio.to_thread(store_new, self._desk.store, result.context, caller.tenant)
        self._measure(result)
        yield {"result": generation_to_json(result), **self._desk.keep(result.context, session)}

    async def _context(self, event: Event, caller: Caller, stack: ExitStack) -> Context | None:
        """The context of the handle that the event names; one of another agent is fetched from there."""
        handle, url = event.get("handle"), event.get("url")
        if handle is None:
            return None
        if not isinstance(handle, str) or not isinstance(url, str | None):
            raise UsageError("handle or url is no string. Fix: see docs/spec/protocol.md.")
        if url is None:
            return stack.enter_context(self._desk.handles.use(handle, caller.tenant))
        if not self._may_fetch(url, caller):
            raise AccessDenied(
                f"{self._desk.name} does not fetch contexts from {url}. "
                "Fix: name that URL among its peers (Agent(peers=…), avp serve --peer URL)."
            )
        with span("pull", url=url):
            return await self._desk.pull(url, handle, caller.tenant)

    def _may_fetch(self, url: str, caller: Caller) -> bool:
        if self._desk.rules.is_peer(url):
            return True
        try:
            scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
        except ValueError:  # no URL at all
            return False
        near = scheme in ("mem", "unix") or (scheme in _NETWORKS and host in ("localhost", "127.0.0.1", "::1"))
        return near and caller.address.startswith(_LOCAL)

    def _enter(self) -> None:
        with self._lock:
            if self._count >= self._most:
                raise Busy(
                    f"{self._count} generations are under way or waiting, as many as {self._desk.name} takes. "
                    "Fix: try again a little later.",
                    retry_after=2.0,
                )
            self._count += 1

    def _submit(self, run: _Run) -> None:
        try:
            self._pool.submit(run.work).add_done_callback(run.settle)
        except RuntimeError as error:  # the pool is shut down
            raise _closed() from error

    def _leave(self) -> None:
        with self._lock:
            self._count -= 1

    def _measure(self, result: Generation) -> None:
        """Note how fast the model computes a prompt, for the cost line of handshakes."""
        positions = result.usage.prompt_tokens - result.usage.cached_tokens
        seconds = result.receipt.seconds.get("ttft", 0.0)
        if positions >= _MEASURED and seconds > 0:
            self._desk.prefill = positions / seconds

    def close(self) -> None:
        """Let what is under way end; take nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Run:
    """One generation in a thread of the pool, read in the event loop."""

    def __init__(
        self,
        connector: Connector,
        prompt: Prompt,
        context: Context | None,
        options: Mapping[str, object],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._call: Callable[[], TextStream] = partial(connector.stream, prompt, context=context, **options)  # type: ignore[arg-type]
        self._loop = loop
        self._pieces: asyncio.Queue[object] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._done: Generation | None = None

    def work(self) -> None:
        """What the thread does."""
        try:
            if self._cancelled.is_set():  # while it waited
                return
            stream: TextStream = self._call()
            try:
                for piece in stream:
                    if self._cancelled.is_set():
                        return
                    self._tell(piece)
                self._done = stream.result
            finally:
                stream.close()
            self._tell(_END)
        except BaseException as error:  # noqa: BLE001 - told to the caller, in the loop
            self._tell(error)

    def settle(self, work: Future[None]) -> None:
        """Called when the thread is done with it, or the pool closed before it began."""
        if work.cancelled():
            self._tell(_closed())

    def _tell(self, what: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, what)

    async def pieces(self) -> AsyncIterator[str]:
        """The pieces of text; raises what the connector raised."""
        while (piece := await self._pieces.get()) is not _END:
            if isinstance(piece, BaseException):
                raise piece
            yield str(piece)

    def cancel(self) -> None:
        """End the run at its next token."""
        self._cancelled.set()

    def result(self) -> Generation:
        """The whole, after the last piece."""
        if self._done is None:
            raise UsageError("the generation ended without a result. Fix: read all of it.")
        return self._done


def _closed() -> ConnectionFailed:
    return ConnectionFailed("the endpoint was closed before the generation began. Fix: ask again when it is back.")


def generation_to_json(result: Generation) -> dict[str, object]:
    """A generation as it travels, without its context."""
    return {
        "text": str(result),
        "tokens": list(result.tokens),
        "finish_reason": result.finish_reason,
        "usage": asdict(result.usage),
        "receipt": receipt_to_json(result.receipt),
    }


def _prompt(value: object) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(type(item) is int for item in value):
        return [item for item in value if isinstance(item, int)]
    if isinstance(value, Sequence) and all(isinstance(item, Mapping) for item in value):
        return [item for item in value if isinstance(item, Mapping)]
    raise UsageError("the prompt is no text, no list of messages and no list of token ids. Fix: pass one of these.")


def _sane(given: object) -> bool:
    """Whether a number is of a size that engines bear, and a list one of strings or of objects."""
    if isinstance(given, int | float):
        return abs(given) < 2**63
    kinds = {type(each) for each in given} if isinstance(given, list) else set()
    return kinds <= {str} or kinds <= {dict}


def _options(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or set(value) - set(OPTIONS):
        raise UsageError(f"unknown options {str(value)[:80]}. Fix: use some of {', '.join(OPTIONS)}.")
    for name, given in value.items():
        if not isinstance(given, OPTIONS[name]) or isinstance(given, bool) or not _sane(given):
            raise UsageError(f"option {name} is {str(given)[:80]!r}. Fix: see docs/spec/protocol.md.")
    return value
