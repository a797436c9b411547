"""What both ends of HTTP share."""

from __future__ import annotations

import re
import socket
import ssl

from avp.errors import UsageError
from avp.security import Security

BASE = "/avp/v1"
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
VERB = re.compile(r"[a-z][a-z0-9-]{0,63}")


def client_context(security: Security) -> ssl.SSLContext:
    """TLS of a client: whom it trusts, who it is.

    Raises:
        UsageError: a file cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=security.ca)
        if security.cert is not None:
            context.load_cert_chain(security.cert, security.key)
    except (OSError, ssl.SSLError) as error:
        raise unreadable(error, security) from error
    return context


def unreadable(error: OSError, security: Security) -> UsageError:
    """The error of a certificate file that cannot be used."""
    files = ", ".join(str(path) for path in (security.ca, security.cert, security.key) if path)
    return UsageError(
        f"a certificate cannot be used ({error.strerror or error}): {files}. Fix: give PEM files; key belongs to cert."
    )


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel ask, after half a minute of silence, whether the other end still exists."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        option = vars(socket).get(name)  # not on every system
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def spare_mmap() -> None:
    """Have glibc keep freed blocks of up to 8 MiB, as it does once it has seen one.

    Otherwise each chunk of 128 KiB and more is mapped and unmapped: 0.7 instead of 1.9 GB/s on loopback.
    """
    bytearray(8 << 20).clear()
