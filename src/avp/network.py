"""connect and serve: agents at a distance, with and without `async`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

from avp import transports
from avp.context import Context
from avp.endpoint import AgentEndpoint
from avp.handle import Handle, RemoteGeneration
from avp.handshake import Hello
from avp.interop.avp04_endpoint import Endpoint04
from avp.portal import PORTAL
from avp.protocols import Listener, Prompt
from avp.receipt import Receipt
from avp.remote import LONG, SHORT, AsyncRemote, Own
from avp.remote_stream import RemoteStream
from avp.security import Security


def connect_async(url: str, *, own: Own | None = None, security: Security | None = None) -> AsyncRemote:
    """The agent at `url`, for use in one event loop; nothing is sent before the first call.

    Without `security` the bearer token is the environment's AVP_TOKEN.

    Raises:
        UsageError: no transport takes that URL. MissingExtra: its library is not installed.
    """
    security = Security.from_environment() if security is None else security
    return AsyncRemote(transports.find(url).connect(url, security=security), url, own=own)


class Remote:
    """Another agent; every call waits for its answer. Made by `connect`. Threads may use it at once."""

    def __init__(self, remote: AsyncRemote) -> None:
        self._remote = remote
        self.url = remote.url

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connections; handles live on."""
        PORTAL.run(self._remote.close())

    def on_behalf_of(self, own: Own) -> AsyncRemote:
        """See `AsyncRemote.on_behalf_of`."""
        return self._remote.on_behalf_of(own)

    def hello(self, *, timeout: float | None = SHORT) -> Hello:
        """See `AsyncRemote.hello`."""
        return PORTAL.run(self._remote.hello(timeout=timeout))

    def measure(self, *, timeout: float | None = SHORT) -> float:
        """See `AsyncRemote.measure`."""
        return PORTAL.run(self._remote.measure(timeout=timeout))

    def vocabulary(self, *, timeout: float | None = SHORT) -> tuple[str, ...]:
        """See `AsyncRemote.vocabulary`."""
        return PORTAL.run(self._remote.vocabulary(timeout=timeout))

    def hand_over(
        self,
        context: Context | Prompt,
        *,
        accept: str | None = None,
        policy: str = "best",
        codec: str | None = None,
        timeout: float | None = LONG,
    ) -> Handle:
        """See `AsyncRemote.hand_over`."""
        work = self._remote.hand_over(context, accept=accept, policy=policy, codec=codec, timeout=timeout)
        return PORTAL.run(work)

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
    ) -> BlockingStream:
        """See `AsyncRemote.stream`: iterate over it for the pieces, then take its `result`."""
        return BlockingStream(
            self._remote.stream(
                prompt,
                context=context,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                temperature=temperature,
                top_p=top_p,
                stop=stop,
                seed=seed,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                timeout=timeout,
            )
        )

    def generate(
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
    ) -> RemoteGeneration:
        """Text after `context` and `prompt`, made by the other agent; its `.context` is a handle there."""
        return self.stream(
            prompt,
            context=context,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
            seed=seed,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            timeout=timeout,
        ).result

    def fetch(self, handle: Handle | str, *, accept: str | None = None, timeout: float | None = LONG) -> Context:
        """See `AsyncRemote.fetch`."""
        return PORTAL.run(self._remote.fetch(handle, accept=accept, timeout=timeout))

    def receive(
        self, handle: Handle | str, *, accept: str | None = None, timeout: float | None = LONG
    ) -> tuple[Context, Receipt]:
        """See `AsyncRemote.receive`."""
        return PORTAL.run(self._remote.receive(handle, accept=accept, timeout=timeout))

    def renew(self, handle: Handle | str, *, timeout: float | None = SHORT) -> float:
        """See `AsyncRemote.renew`."""
        return PORTAL.run(self._remote.renew(handle, timeout=timeout))

    def revoke(self, handle: Handle | str, *, timeout: float | None = SHORT) -> None:
        """See `AsyncRemote.revoke`."""
        PORTAL.run(self._remote.revoke(handle, timeout=timeout))


class BlockingStream:
    """The pieces of text as they come; `result` is the whole, after the last. Close it to end the run early."""

    def __init__(self, stream: RemoteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        return PORTAL.iterate(aiter(self._stream))

    @property
    def result(self) -> RemoteGeneration:
        """The whole generation; waits for its end. Raises what the other agent raised."""
        return PORTAL.run(self._stream.result())

    def close(self) -> None:
        """End the run, here and there."""
        PORTAL.run(self._stream.aclose())


def connect(url: str, *, own: Own | None = None, security: Security | None = None) -> Remote:
    """The agent at `url`; raises as `connect_async`."""
    return Remote(connect_async(url, own=own, security=security))


class AsyncServer:
    """An endpoint at one or more URLs. Close it, or use it with `async with`."""

    def __init__(self, listeners: list[Listener]) -> None:
        self._listeners = listeners
        self.urls = tuple(listener.url for listener in listeners)
        self.url = self.urls[0]

    async def __aenter__(self) -> AsyncServer:
        return self

    async def __aexit__(self, *problem: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Take no more calls; let those under way end for a few seconds."""
        await asyncio.gather(*(listener.close() for listener in self._listeners))


async def serve_async(endpoint: AgentEndpoint, *urls: str, trust_model_hash: Sequence[str] = ()) -> AsyncServer:
    """Answer for an agent at these URLs, in this event loop; by HTTP also to peers of AVP 0.4.

    trust_model_hash: what peers of AVP 0.4 call the model whose weights run here; they prove nothing.

    Raises:
        UsageError: an address that is not ours to listen at, or open to all without authentication; no model hash.
    """
    both = Endpoint04(endpoint, trust=trust_model_hash)
    listeners: list[Listener] = []
    try:
        for url in urls:
            listeners.append(await transports.find(url).serve(both, url, security=endpoint.desk.rules.security))
    except BaseException:
        for listener in listeners:
            await listener.close()
        raise
    return AsyncServer(listeners)


class Server:
    """An agent at one or more URLs, served in the background. Close it, or use it with `with`."""

    def __init__(self, server: AsyncServer) -> None:
        self._server = server
        self.urls = server.urls
        self.url = server.url

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take no more calls; let those under way end for a few seconds."""
        PORTAL.run(self._server.close())


def serve(endpoint: AgentEndpoint, *urls: str, trust_model_hash: Sequence[str] = ()) -> Server:
    """As `serve_async`, in the background."""
    return Server(PORTAL.run(serve_async(endpoint, *urls, trust_model_hash=trust_model_hash)))
