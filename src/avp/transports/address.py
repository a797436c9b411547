"""Host, port and path out of a URL, and who may listen where."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from avp.errors import UsageError
from avp.security import Security


def host_and_port(url: str, *, default: int | None = None) -> tuple[str, int]:
    """The host (an IPv6 address without its brackets) and the port of a URL; `default` where it names no port.

    Raises:
        UsageError: no host, or no port.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is no address: {error}. Fix: write it as scheme://host:port.") from error
    if not host:
        raise UsageError(f"{url!r} names no host. Fix: write it as scheme://host:port, as in http://127.0.0.1:8420.")
    found = default if port is None else port
    if found is None:
        raise UsageError(f"{url!r} names no port. Fix: write it as scheme://host:port, with port 0 for any free one.")
    return host, found


def authority(host: str, port: int) -> str:
    """`host:port` as it stands in a URL; an IPv6 address gets its brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host; a name that is not "localhost" is not believed to."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def refuse_open(url: str, *, security: Security) -> None:
    """Nothing, unless a server at that URL would answer strangers.

    Raises:
        UsageError: the address is beyond loopback, and callers show neither a token nor a certificate.
    """
    host, _ = host_and_port(url, default=0)
    if is_loopback(host) or security.authenticates or security.insecure:
        return
    raise UsageError(
        f"{url} can be reached from other machines, and nobody would have to show a token or a certificate: "
        "whoever reaches it could read contexts and use the model. "
        "Fix: listen at 127.0.0.1, give tokens (--token), demand client certificates (--ca), "
        "or say that it is wanted (--insecure)."
    )
