"""Who may talk to an endpoint, and how an endpoint is trusted: tokens, certificates, tenants."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from blake3 import blake3

from avp.errors import AccessDenied


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose state it is. Tenants never see each other's: `salt` is in the chain of every page id of theirs."""

    name: str = ""
    salt: bytes = field(default=b"", repr=False)

    @classmethod
    def named(cls, name: str, *, secret: bytes = b"") -> Tenant:
        """The tenant of that name, with a salt from name and secret: equal on every machine that knows both."""
        salt = blake3(name.encode(), key=blake3(secret).digest()).digest() if name else b""
        return cls(name, salt)


@dataclass(frozen=True, slots=True)
class Caller:
    """The other end of a call, as an endpoint sees it."""

    tenant: Tenant = Tenant()
    address: str = "in-process"


@dataclass(frozen=True, slots=True)
class Security:
    """What one end brings to a connection.

    token: sent by a client. tokens: token -> tenant, checked by a server; empty: everybody is the nameless tenant.
    ca: file of the authorities that sign the other end (None: the system's; a server with `ca` demands client
    certificates). cert, key: PEM files of one's own certificate. insecure: a server may listen beyond loopback without
    tokens or client certificates. http2: HTTP/2 as well as HTTP/1.1; over plain http a client then speaks nothing else.
    """

    token: str | None = field(default=None, repr=False)
    tokens: Mapping[str, Tenant] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    insecure: bool = False
    http2: bool = False

    @classmethod
    def from_environment(cls) -> Security:
        """Nothing but the bearer token in AVP_TOKEN, if there is one."""
        return cls(token=os.environ.get("AVP_TOKEN") or None)

    @property
    def authenticates(self) -> bool:
        """Whether a server with it knows who calls."""
        return bool(self.tokens) or self.ca is not None

    def tenant(self, token: str | None) -> Tenant:
        """The tenant of a caller that sent `token`.

        Raises:
            AccessDenied: tokens are required, and it is none of them.
        """
        if not self.tokens:
            return Tenant()
        given = _bytes(token or "")
        found = [tenant for known, tenant in self.tokens.items() if known and hmac.compare_digest(_bytes(known), given)]
        if not found:
            raise AccessDenied(
                f"the endpoint wants a bearer token and {'this one is not known' if token else 'none came'}. "
                "Fix: connect with token=…, or set AVP_TOKEN."
            )
        return found[0]


def _bytes(token: str) -> bytes:
    return token.encode(errors="surrogatepass")
