"""HTTP and HTTPS: `POST {url}/avp/v1/{verb}`, a stream of `avp.wire` both ways. docs/spec/protocol.md."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from avp.errors import UsageError
from avp.protocols import Endpoint, Listener
from avp.security import Security
from avp.transports.http_client import HttpChannel
from avp.transports.http_ends import client_context, spare_mmap


@dataclass(frozen=True, slots=True)
class HttpTransport:
    """HTTP at a URL of its scheme. What a server allows:

    head: seconds until a request's head is complete. idle: seconds without a byte of a body that is waited for.
    grace: seconds that calls under way get when a listener is closed. connections: at once. header: bytes of a head.
    """

    scheme: str = "http"
    head: float = 10.0
    idle: float = 30.0
    grace: float = 5.0
    connections: int = 512
    header: int = 1 << 15

    def connect(self, url: str, *, security: Security) -> HttpChannel:
        """The near end of calls to the endpoint at `url`, which may have a path; sends nothing yet.

        Raises:
            UsageError: the URL is none of this scheme, or a certificate cannot be read.
        """
        self._check(url)
        spare_mmap()
        tls = client_context(security) if self.scheme == "https" else None
        return HttpChannel(url, security=security, tls=tls)

    async def serve(self, endpoint: Endpoint, url: str, *, security: Security) -> Listener:
        """Serve the endpoint in the running event loop.

        Raises:
            UsageError: not an address of this machine, beyond loopback without authentication, or a certificate is
                missing or cannot be read.
        """
        from avp.transports.http_listener import listen  # a client needs no server

        self._check(url)
        spare_mmap()
        return await listen(endpoint, url, security=security, rules=self)

    def _check(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != self.scheme or parts.query or parts.fragment or parts.username:
            raise UsageError(
                f"{url!r} is no address of an endpoint. Fix: write it as {self.scheme}://host:port, maybe with a path."
            )


TRANSPORT = HttpTransport()
SECURE = HttpTransport("https")
