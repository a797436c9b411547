"""Frames and contexts to try things on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from avp.context import Context
from avp.errors import AVPError
from avp.identity import CacheLayout, LayerLayout, ModelIdentity
from avp.interop.avp04 import Frame, read_frame
from avp.interop.avp04_context import context_from_frame, frame_from_context
from avp.testing import synthetic_context

HASH = "ab" * 32
T = TypeVar("T")


def kv_context(**shape: object) -> Context:
    """Random KV that a transformers engine could have computed."""
    context = synthetic_context(**shape)  # type: ignore[arg-type]
    segments = tuple(replace(segment, engine="transformers") for segment in context.segments)
    return replace(context, segments=segments)


def kv_frame(**shape: object) -> bytes:
    """The frame of such a context."""
    return frame_from_context(kv_context(**shape), model_hash=HASH)


def take(frame: bytes | Frame, model: ModelIdentity, **how: object) -> Context:
    """The context in a frame of the peer that is trusted here."""
    frame = read_frame(frame) if isinstance(frame, bytes) else frame
    return context_from_frame(frame, model=model, trust_model_hash=HASH, **how)  # type: ignore[arg-type]


def model(*layers: LayerLayout) -> ModelIdentity:
    """A model of that cache."""
    return ModelIdentity("a/model", "none", "0" * 64, "1" * 64, CacheLayout(layers))


def with_fields(frame: bytes, **fields: object) -> Frame:
    """The frame with other metadata."""
    read = read_frame(frame)
    return Frame(replace(read.metadata, **fields), read.payload)  # type: ignore[arg-type]


def attempt(call: Callable[[], T]) -> T | AVPError:
    """What a call returns, or the error that it raises on purpose; any other is a fault."""
    try:
        return call()
    except AVPError as error:
        return error
