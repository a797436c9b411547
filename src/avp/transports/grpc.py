"""gRPC: `grpc://host:port`, and `grpcs://host:port` with TLS (docs/spec/avp.proto, docs/guides/transport-grpc.md).

gRPC does not show its socket: what the meter counts is the bytes of the messages, serialised, without the headers of
HTTP/2 and TLS (some 0.1 or 0.2 % more).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import grpc
import grpc.aio

from avp import wire
from avp.errors import AccessDenied, AVPError, Busy, ConnectionFailed, TimedOut, UsageError
from avp.manifest import Limits
from avp.protocols import Channel, Endpoint, Item, Listener, Meter
from avp.security import Security
from avp.transports import grpc_piece
from avp.transports.address import authority, host_and_port, is_loopback, refuse_open
from avp.transports.grpc_server import listen

_Rpc: TypeAlias = grpc.aio.StreamStreamCall[bytes, bytes]
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # connections of its own: closing the channel ends them
    ("grpc.max_receive_message_length", grpc_piece.MESSAGE_LIMIT),
    ("grpc.max_send_message_length", grpc_piece.MESSAGE_LIMIT),
    *grpc_piece.WINDOW,
    ("grpc.enable_retries", 0),  # a call is not repeated behind the caller's back
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(slots=True)
class GrpcChannel:
    """The near end of calls to one server, over one connection."""

    target: str
    credentials: grpc.ChannelCredentials | None
    token: str | None = field(repr=False)
    options: tuple[tuple[str, int], ...]
    _channel: grpc.aio.Channel | None = None
    _calls: set[_Rpc] = field(default_factory=set)

    @asynccontextmanager
    async def call(self, verb: str, items: AsyncIterable[Item], *, meter: Meter) -> AsyncIterator[AsyncIterator[Item]]:
        """Send the verb and the items; what the far end answers. Leaving the block early cancels the call.

        Raises:
            AVPError: what the far end raised. ConnectionFailed: it could not be reached or broke off.
        """
        metadata = [(grpc_piece.VERB, verb)]
        if self.token:
            metadata.append((grpc_piece.AUTHORIZATION, f"Bearer {self.token}"))
        rpc: _Rpc = self._open().stream_stream(f"/{grpc_piece.SERVICE}/{grpc_piece.METHOD}")(metadata=metadata)
        self._calls.add(rpc)
        sender = asyncio.create_task(_send(rpc, items, meter))
        try:
            async with aclosing(_receive(rpc, sender, meter)) as answer:
                yield answer
        finally:
            self._calls.discard(rpc)
            rpc.cancel()
            sender.cancel()
            await asyncio.wait([sender])
            if not sender.cancelled():
                sender.exception()  # whoever reads the answer has it already

    async def close(self) -> None:
        """End all calls and the connection."""
        for rpc in tuple(self._calls):
            rpc.cancel()
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:  # only now: grpc.aio binds it to the running loop
            if self.credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, options=self.options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self.credentials, options=self.options)
        return self._channel


async def _send(rpc: _Rpc, items: AsyncIterable[Item], meter: Meter) -> None:
    """Send the stream as fast as the far end takes it; stops when the call has ended."""
    try:
        async with aclosing(grpc_piece.request(items)) as messages:
            async for message in messages:
                try:
                    await rpc.write(message)
                except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
                    return  # the answer says why
                meter.sent += len(message)
        await rpc.done_writing()
    except Exception:
        rpc.cancel()  # a fault of the items, which whoever reads the answer gets
        raise


async def _receive(rpc: _Rpc, sender: asyncio.Task[None], meter: Meter) -> AsyncGenerator[Item]:
    decoder = wire.Decoder(Limits())
    try:
        async for message in rpc:
            meter.received += len(message)
            for item in decoder.feed(grpc_piece.read_piece(message)):
                yield item
    except grpc.aio.AioRpcError as error:
        if not decoder.ended:  # else all is here; grpc.aio reports a fault of its own where the far end stops reading
            raise _translated(error) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        if sender.done() and not sender.cancelled() and (fault := sender.exception()):
            raise fault from None
        raise ConnectionFailed("the call was ended by closing its channel. Fix: connect again.") from None
    decoder.finish()


def _translated(error: grpc.aio.AioRpcError) -> AVPError:
    """One of our errors for a status that came without one in the stream."""
    details, code = error.details() or "", error.code()
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return AccessDenied(
            f"the server's certificate is not trusted ({details}). Fix: give the authority that signed it as ca, and "
            "connect to a name that stands in it."
        )
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return AccessDenied(f"the server does not let us in ({details}). Fix: connect with token=…, or set AVP_TOKEN.")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "limit exceeded" in details:
        return Busy(f"the server carries out too many calls ({details}). Fix: try again later.")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOut(f"the server did not answer in time ({details}). Fix: give it more time.")
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details:
        return ConnectionFailed(
            f"the server cannot be reached ({details}). Fix: check that it runs, and that the URL has its port, "
            "grpc:// without TLS and grpcs:// with it. A server that demands client certificates closes without a "
            "word: give cert and key."
        )
    return ConnectionFailed(f"the call broke off ({code.name}: {details}). Fix: call again; look at the server's log.")


@dataclass(frozen=True, slots=True)
class GrpcTransport:
    """The transport of one of the two schemes."""

    scheme: str
    secure: bool

    def connect(self, url: str, *, security: Security) -> Channel:
        """The near end; nothing is sent before the first call.

        Raises:
            UsageError: the URL is none of this scheme, a file of `security` cannot be read, or the token is no text
                that a header can hold.
        """
        host, port = self._address(url)
        if security.token and not (security.token.isascii() and security.token.isprintable()):
            raise UsageError("the token holds characters that no header can. Fix: use printable ASCII.")
        return GrpcChannel(
            authority(host, port),
            _client_credentials(security) if self.secure else None,
            security.token,
            (*_OPTIONS, ("grpc.enable_http_proxy", 0)) if is_loopback(host) else _OPTIONS,
        )

    async def serve(self, endpoint: Endpoint, url: str, *, security: Security) -> Listener:
        """Listen at the URL.

        Raises:
            UsageError: not an address of this machine, beyond loopback without authentication, or certificates that
                are missing or have no use.
        """
        host, port = self._address(url)
        if not self.secure and (security.ca or security.cert or security.key):
            raise UsageError("grpc:// knows no certificates. Fix: serve at grpcs://, or leave them out.")
        refuse_open(url, security=security)
        credentials = _server_credentials(security) if self.secure else None
        return await listen(endpoint, self.scheme, host, port, credentials=credentials)

    def _address(self, url: str) -> tuple[str, int]:
        if urlsplit(url).scheme != self.scheme:
            raise UsageError(f"{url!r} is no address of this transport. Fix: write it as {self.scheme}://host:port.")
        return host_and_port(url)


def _client_credentials(security: Security) -> grpc.ChannelCredentials:
    """Trusts `ca`, or the system's authorities (gRPC would bring its own); shows a certificate if there is one."""
    system = ssl.get_default_verify_paths().cafile
    ca = security.ca or (Path(system) if system else None)
    key, cert = _certificate(security) if security.cert or security.key else (None, None)
    return grpc.ssl_channel_credentials(_authorities(ca) if ca else None, key, cert)


def _server_credentials(security: Security) -> grpc.ServerCredentials:
    ca = _authorities(security.ca) if security.ca else None
    return grpc.ssl_server_credentials([_certificate(security)], ca, require_client_auth=ca is not None)


def _authorities(ca: Path) -> bytes:
    """Certificates, PEM; read by Python first, since gRPC says of bad ones only that it cannot listen or connect."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
        return ca.read_bytes()
    except OSError as error:
        raise UsageError(f"{ca} holds no authorities ({error}). Fix: give as ca a PEM file of certificates.") from error


def _certificate(security: Security) -> tuple[bytes, bytes]:
    """Key and certificate chain, PEM."""
    if security.cert is None or security.key is None:
        raise UsageError("a certificate and its key are needed. Fix: give cert and key, two PEM files.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(security.cert, security.key, password="")
        return security.key.read_bytes(), security.cert.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{security.cert} and {security.key} are no certificate and its key ({error}). "
            "Fix: give cert and key, two PEM files, the key without a password."
        ) from error


TRANSPORT = GrpcTransport("grpc", secure=False)
SECURE = GrpcTransport("grpcs", secure=True)
