"""Transports: each puts an endpoint at a distance, and is found by the scheme of its URLs."""

from __future__ import annotations

from typing import cast
from urllib.parse import urlsplit

from avp import registry
from avp.errors import UsageError
from avp.protocols import Transport


def find(url: str) -> Transport:
    """The transport of that URL's scheme.

    Raises:
        UsageError: no transport has that scheme. MissingExtra: its library is not installed.
    """
    scheme = urlsplit(url).scheme
    if not scheme or scheme not in registry.names("avp.transports"):
        known = ", ".join(registry.names("avp.transports"))
        raise UsageError(f"{url!r} begins with none of the known schemes. Fix: use one of {known}.")
    return cast(Transport, registry.load("avp.transports", scheme))
