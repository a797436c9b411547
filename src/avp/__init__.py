"""AVP, the Agent Vector Protocol: LLM agents hand over their KV-cache instead of text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from avp.agent import Agent, serve, serve_async
from avp.bundle import Limits, Manifest, peek
from avp.context import Context, Turn
from avp.errors import (
    AccessDenied,
    AVPError,
    BundleError,
    Busy,
    ConnectionFailed,
    ContextTooLong,
    DigestMismatch,
    HandleExpired,
    IdentityMismatch,
    LimitExceeded,
    MissingExtra,
    ModelNotFound,
    NoAgreement,
    SegmentMissing,
    StoreFailed,
    TimedOut,
    TruncatedBundle,
    UnsupportedBundle,
    UnsupportedCache,
    UsageError,
)
from avp.handle import Handle
from avp.handshake import Agreement, Hello, negotiate
from avp.identity import CacheLayout, LayerLayout, ModelIdentity
from avp.network import Remote, connect, connect_async
from avp.oneline import Message, clear_cache, generate, pack, think, unpack
from avp.receipt import Generation, Receipt, Usage
from avp.remote import AsyncRemote, Own
from avp.security import Security, Tenant
from avp.segment import Exactness, Segment
from avp.session import Quota
from avp.stores import open_store

if TYPE_CHECKING:
    from avp.connectors.huggingface import HuggingFaceConnector
    from avp.connectors.llamacpp import LlamaCppConnector
    from avp.connectors.vllm import VLLMConnector

__version__ = "0.1.0"

__all__ = [
    "AVPError",
    "AccessDenied",
    "Agent",
    "Agreement",
    "AsyncRemote",
    "BundleError",
    "Busy",
    "CacheLayout",
    "ConnectionFailed",
    "Context",
    "ContextTooLong",
    "DigestMismatch",
    "Exactness",
    "Generation",
    "Handle",
    "HandleExpired",
    "Hello",
    "HuggingFaceConnector",
    "IdentityMismatch",
    "LayerLayout",
    "LimitExceeded",
    "Limits",
    "LlamaCppConnector",
    "Manifest",
    "Message",
    "MissingExtra",
    "ModelIdentity",
    "ModelNotFound",
    "NoAgreement",
    "Own",
    "Quota",
    "Receipt",
    "Remote",
    "Security",
    "Segment",
    "SegmentMissing",
    "StoreFailed",
    "Tenant",
    "TimedOut",
    "TruncatedBundle",
    "Turn",
    "UnsupportedBundle",
    "UnsupportedCache",
    "Usage",
    "UsageError",
    "VLLMConnector",
    "clear_cache",
    "connect",
    "connect_async",
    "generate",
    "negotiate",
    "open_store",
    "pack",
    "peek",
    "serve",
    "serve_async",
    "think",
    "unpack",
]

_CONNECTORS = {"HuggingFaceConnector": "huggingface", "LlamaCppConnector": "llamacpp", "VLLMConnector": "vllm"}


def __getattr__(name: str) -> object:
    """Connectors and `avp.testing` are imported at their first use: `import avp` needs no torch."""
    if name in _CONNECTORS:
        from avp import registry

        return registry.load("avp.connectors", _CONNECTORS[name])
    if name == "testing":
        return importlib.import_module("avp.testing")
    raise AttributeError(f"module 'avp' has no attribute {name!r}")
