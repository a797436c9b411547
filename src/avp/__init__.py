"""AVP, the Agent Vector Protocol: LLM agents hand over their KV-cache instead of text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from avp.agent import Message, clear_cache, generate, pack, think, unpack
from avp.bundle import Limits, Manifest, peek
from avp.context import Context, Turn
from avp.errors import (
    AVPError,
    BundleError,
    ContextTooLong,
    DigestMismatch,
    IdentityMismatch,
    LimitExceeded,
    MissingExtra,
    ModelNotFound,
    TruncatedBundle,
    UnsupportedBundle,
    UnsupportedCache,
    UsageError,
)
from avp.identity import CacheLayout, LayerLayout, ModelIdentity
from avp.receipt import Generation, Receipt, Usage
from avp.segment import Exactness, Segment

if TYPE_CHECKING:
    from avp.connectors.huggingface import HuggingFaceConnector

__version__ = "0.1.0"

__all__ = [
    "AVPError",
    "BundleError",
    "CacheLayout",
    "Context",
    "ContextTooLong",
    "DigestMismatch",
    "Exactness",
    "Generation",
    "HuggingFaceConnector",
    "IdentityMismatch",
    "LayerLayout",
    "LimitExceeded",
    "Limits",
    "Manifest",
    "Message",
    "MissingExtra",
    "ModelIdentity",
    "ModelNotFound",
    "Receipt",
    "Segment",
    "TruncatedBundle",
    "Turn",
    "UnsupportedBundle",
    "UnsupportedCache",
    "Usage",
    "UsageError",
    "clear_cache",
    "generate",
    "pack",
    "peek",
    "think",
    "unpack",
]


def __getattr__(name: str) -> object:
    """Connectors and `avp.testing` are imported at their first use: `import avp` needs no torch."""
    if name == "HuggingFaceConnector":
        from avp import registry

        return registry.load("avp.connectors", "huggingface")
    if name == "testing":
        return importlib.import_module("avp.testing")
    raise AttributeError(f"module 'avp' has no attribute {name!r}")
