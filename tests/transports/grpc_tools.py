"""What tests of gRPC share: a loop that ends, a served endpoint and a channel to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

from avp.protocols import Channel, Listener
from avp.security import Security
from avp.testing.echo import EchoEndpoint
from avp.transports.grpc import TRANSPORT, GrpcTransport

NOBODY = Security()


def run(scenario: Callable[[], Coroutine[object, object, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


@asynccontextmanager
async def opened(
    server: Security = NOBODY, client: Security = NOBODY, *, transport: GrpcTransport = TRANSPORT
) -> AsyncIterator[tuple[EchoEndpoint, Channel, Listener]]:
    endpoint = EchoEndpoint(security=server)
    listener = await transport.serve(endpoint, f"{transport.scheme}://127.0.0.1:0", security=server)
    channel = transport.connect(listener.url, security=client)
    try:
        yield endpoint, channel, listener
    finally:
        await channel.close()
        await listener.close()
