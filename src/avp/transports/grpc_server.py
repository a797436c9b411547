"""The far end of a gRPC call: an endpoint as the service `avp.v1.Agent`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import unquote

import grpc
import grpc.aio

from avp import wire
from avp.errors import AVPError, ConnectionFailed, UsageError
from avp.protocols import Endpoint, Item
from avp.transports import grpc_piece
from avp.transports.address import authority
from avp.transports.answers import answers

GRACE = 3.0  # seconds that calls under way get when the listener closes
CALLS = 1024  # at once; more are refused as Busy
OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not shared
    *grpc_piece.WINDOW,
    ("grpc.max_concurrent_streams", 128),  # of one connection; more wait at the client
    ("grpc.max_receive_message_length", grpc_piece.MESSAGE_LIMIT),
    ("grpc.max_send_message_length", grpc_piece.MESSAGE_LIMIT),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # what the keepalive of our clients needs
    ("grpc.keepalive_time_ms", 60_000),  # a client that vanished does not hold its call for ever
    ("grpc.keepalive_timeout_ms", 20_000),
)
_Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]


@dataclass(frozen=True, slots=True)
class GrpcListener:
    """A running gRPC server."""

    url: str
    server: grpc.aio.Server

    async def close(self) -> None:
        """Take no more calls; those under way end within `GRACE` seconds or are cancelled."""
        await self.server.stop(GRACE)


async def listen(
    endpoint: Endpoint, scheme: str, host: str, port: int, *, credentials: grpc.ServerCredentials | None
) -> GrpcListener:
    """Serve the endpoint at an address of this machine, with TLS where there are credentials.

    Raises:
        UsageError: the address is none of this machine's, or is taken.
    """
    server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=CALLS)
    method: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(_Service(endpoint).call)
    handlers = grpc.method_handlers_generic_handler(grpc_piece.SERVICE, {grpc_piece.METHOD: method})
    server.add_generic_rpc_handlers((handlers,))
    try:
        if credentials is None:
            found = server.add_insecure_port(authority(host, port))
        else:
            found = server.add_secure_port(authority(host, port), credentials)
    except RuntimeError as error:
        raise UsageError(
            f"{scheme}://{authority(host, port)} is no address of this machine, or another program listens there. "
            "Fix: use port 0 for any free one."
        ) from error
    await server.start()
    return GrpcListener(f"{scheme}://{authority(host, found)}", server)


@dataclass(slots=True)
class _Requests:
    """What the caller sends; read message by message, as fast as it is used."""

    endpoint: Endpoint
    context: _Context
    error: Exception | None = None  # what was wrong with it

    async def items(self) -> AsyncGenerator[Item]:
        async with aclosing(self._data()) as data:
            try:
                async for item in wire.decode(data, limits=self.endpoint.limits):
                    yield item
            except AVPError as error:
                self.error = error
                raise

    async def _data(self) -> AsyncGenerator[memoryview]:
        while True:
            try:
                message: object = await self.context.read()
            except grpc.aio.BaseError as error:
                raise ConnectionFailed("the call broke off in the middle. Fix: call again.") from error
            if not isinstance(message, bytes):  # grpc.aio.EOF
                return
            yield grpc_piece.read_piece(message)


@dataclass(frozen=True, slots=True)
class _Service:
    endpoint: Endpoint

    async def call(self, _: object, context: _Context) -> None:
        """Answer one call; an error ends the stream, and is the status."""
        requests = _Requests(self.endpoint, context)
        try:
            await self._answer(requests, context)
            return
        except AVPError as caught:
            error = caught
        code = grpc.StatusCode.INVALID_ARGUMENT if error is requests.error else grpc_piece.status_of(error)
        await context.write(grpc_piece.error_piece(error))
        await context.abort(code, grpc_piece.details_of(error), grpc_piece.trailer_of(error))

    async def _answer(self, requests: _Requests, context: _Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        kind, _, token = str(metadata.get(grpc_piece.AUTHORIZATION, "")).partition(" ")
        given = token if kind.lower() == "bearer" else None
        caller = self.endpoint.admit(given, address=unquote(context.peer().partition(":")[2]))
        verb = metadata.get(grpc_piece.VERB)
        if verb is None:
            raise UsageError(f"the call has no verb. Fix: send it as metadata {grpc_piece.VERB!r}.")
        async with (
            aclosing(requests.items()) as items,
            aclosing(answers(self.endpoint, str(verb), items, caller=caller)) as answer,
            aclosing(grpc_piece.pieces(answer)) as messages,
        ):
            async for message in messages:
                await context.write(message)
