"""Stores: where segments are kept between runs. One file each, registered under the entry points `avp.stores`."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from avp import registry
from avp.errors import UsageError
from avp.protocols import Store

__all__ = ["open_store"]


def open_store(url: str) -> Store:
    """The store at `url`: `memory:`, `disk:`, `redis://…`, `rediss://…`, `s3://…`, or a scheme that a plug-in brings.

    Raises:
        UsageError: no such scheme, or a setting that the store does not know. MissingExtra: its library is not
        installed. StoreFailed: it cannot be opened.
    """
    scheme, colon, _ = url.partition(":")
    if not colon:
        known = ", ".join(registry.names("avp.stores"))
        raise UsageError(f"{url!r} is no URL of a store. Fix: begin it with a scheme and a colon; known are {known}.")
    opener = cast("Callable[[str], Store]", registry.load("avp.stores", scheme.lower()))
    return opener(url)
