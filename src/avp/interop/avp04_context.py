"""Between frames of AVP 0.4 and contexts.

A 0.4 peer names its model by a hash of the config, which proves nothing about weights. So KV, and hidden states, are
taken only where the operator has named the peer's hash as that of the weights that run here (`trust_model_hash`).

A frame holds no token ids. Unless the caller knows which ids the KV stands for, its positions count as latent, and the
context as approximate. A frame holds no `pending` ids either, and one shape for all layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from operator import index
from types import MappingProxyType
from typing import TYPE_CHECKING

from avp.buffers import from_memory, itemsize
from avp.context import Context, Turn, text_context
from avp.errors import BundleError, IdentityMismatch, LimitExceeded, UnsupportedBundle, UsageError
from avp.identity import ModelIdentity
from avp.interop.avp04 import Frame, write_frame
from avp.interop.avp04_kv import KV_DTYPES, Rows, Shape, kv_payload, one_layer, read_shape
from avp.interop.avp04_proto import DataType, Metadata, Mode, PayloadType
from avp.manifest import Limits
from avp.segment import LATENT, Exactness, cut_segments, worst

if TYPE_CHECKING:
    from avp.protocols import Tensors

ENGINE = "transformers"  # what computes the KV of a 0.4 peer
_ASK = "Fix: ask the sender for a valid frame."


# --- a frame as a context


def context_from_frame(
    frame: Frame,
    *,
    model: ModelIdentity,
    trust_model_hash: str,
    tokens: Sequence[int] | None = None,
    limits: Limits | None = None,
) -> Context:
    """What the frame holds: KV, hidden states, or text (mode JSON). The KV stays where it is, in the frame's payload.

    model: of the local connector. trust_model_hash: the `model_hash` of a peer whose weights the operator knows to be
    the same; text needs no trust. tokens: the ids that the KV stands for, LATENT where there is none; without them
    every position is latent.

    Raises:
        IdentityMismatch: a peer that is not trusted, another shape of cache, or state projected for another model.
        UnsupportedCache: the local model has sliding windows, or layers of different shapes.
        UsageError: `tokens` do not fit the KV. BundleError and its children: the payload is not what it says.
    """
    limits = limits or Limits()
    if frame.metadata.mode is Mode.JSON:
        return context_from_message(frame.payload, limits=limits)
    check_trust(frame.metadata, model, trust_model_hash)
    if frame.metadata.payload_type is PayloadType.HIDDEN_STATE:
        return _hidden_context(frame, model, limits)
    return _kv_context(frame, model, tokens, limits)


def trust_reason(metadata: Metadata) -> str:
    """What a receipt must say of state that was taken on `trust_model_hash`."""
    return (
        f"the weights of the sender are trusted, not proven: AVP 0.4 names them by a hash of the config only "
        f"({metadata.extra.get('model_hash', '')[:16]}…)"
    )


def check_trust(metadata: Metadata, model: ModelIdentity, trusted: str) -> None:
    """Whether state with such metadata may be taken for the model's; raises IdentityMismatch."""
    claimed = metadata.extra.get("model_hash", "")
    if not claimed or claimed != trusted:
        raise IdentityMismatch(
            f"the frame names the model hash {claimed[:64] or '(none)'!r}, and {trusted[:64] or '(none)'!r} is the one "
            f"trusted to stand for {model.describe()}. AVP 0.4 proves no weights, and KV is valid only for the weights "
            "that made it. Fix: if the peer runs these weights, pass its hash as trust_model_hash; else ask for text."
        )
    if metadata.avp_map_id:
        raise IdentityMismatch(
            f"the frame's state was made for a projection ({metadata.avp_map_id[:64]!r}), so by another model than "
            f"{model.describe()}. Fix: ask the sender for text."
        )


def _kv_context(frame: Frame, model: ModelIdentity, tokens: Sequence[int] | None, limits: Limits) -> Context:
    shape = read_shape(frame, limits)
    layer = one_layer(model.layout, model.describe())
    expected = (len(model.layout.layers), layer.kv_heads, layer.head_dim)
    if (shape.layers, shape.kv_heads, shape.head_dim) != expected:
        raise IdentityMismatch(
            f"the frame's KV has {shape.layers} layers of {shape.kv_heads} heads of {shape.head_dim}, and "
            f"{model.describe()} has {expected[0]} of {expected[1]} of {expected[2]}. A KV-cache is valid only for the "
            "weights that made it. Fix: trust only peers that run the same model, or ask for text."
        )
    ids = _ids(frame.metadata, tokens, shape.positions)
    latent = next((i for i, token in enumerate(ids) if token == LATENT), len(ids))
    floor = _exactness(frame.metadata)

    def tensors(start: int, stop: int) -> Tensors:
        return Rows(frame.payload, shape, start, stop)

    def grade(stop: int) -> Exactness:
        return worst([floor, Exactness.APPROXIMATE if latent < stop else Exactness.EXACT])

    segments = cut_segments(model, ids, dtype=shape.dtype, engine=ENGINE, tensors=tensors, grade=grade)
    turns = (Turn({"role": "raw", "content": ""}, (0, len(ids))),) if ids else ()
    return Context("kv", model, ids, len(ids), turns, segments=segments, exactness=grade(len(ids)))


def _ids(metadata: Metadata, tokens: Sequence[int] | None, positions: int) -> tuple[int, ...]:
    if tokens is None:
        return (LATENT,) * positions
    if len(tokens) != positions:
        raise UsageError(
            f"{len(tokens)} token ids were given for KV of {positions} positions. Fix: pass one for each, LATENT (-1) "
            "where there is none."
        )
    if any(not LATENT <= token < 2**31 for token in tokens):
        raise UsageError("the token ids are not all from -1 to 2^31-1. Fix: pass ids of the model's own tokenizer.")
    steps = metadata.extra.get("num_steps", "0")
    if not (steps.isascii() and steps.isdecimal() and len(steps) < 10):
        raise BundleError(f"the frame's num_steps is {steps[:40]!r}, no number of latent steps. {_ASK}")
    named = sum(token == LATENT for token in tokens)
    if named < int(steps):
        raise UsageError(
            f"the frame says that {int(steps)} of its positions are latent steps; the token ids leave {named} open. "
            "Fix: pass LATENT (-1) for the positions that no token stands for."
        )
    return tuple(map(index, tokens))


def _exactness(metadata: Metadata) -> Exactness:
    """The class that our own writer notes where it is not exact; the SDK writes none."""
    label = metadata.extra.get("exactness", "exact")
    for each in Exactness:
        if each.label == label:
            return each
    raise UnsupportedBundle(f"the frame's exactness is {label[:40]!r}. Fix: upgrade avp, or ask for text.")


def _hidden_context(frame: Frame, model: ModelIdentity, limits: Limits) -> Context:
    metadata = frame.metadata
    if metadata.dtype is DataType.INT8:
        raise UnsupportedBundle(f"hidden states of int8 come without their scales. {_ASK}")
    width = metadata.hidden_dim or (metadata.tensor_shape[-1] if metadata.tensor_shape else 0)
    row = width * itemsize(metadata.dtype.label)
    rows = len(frame.payload) // row if row else 0
    if not rows or rows * row != len(frame.payload):
        raise BundleError(f"{len(frame.payload)} bytes are no hidden states of {width} {metadata.dtype.label}. {_ASK}")
    shape = metadata.tensor_shape
    if shape and (shape[-1] != width or prod(shape) != rows * width):
        raise BundleError(
            f"{len(frame.payload)} bytes of {metadata.dtype.label} are no hidden states of shape {list(shape)}. {_ASK}"
        )
    if rows > limits.tokens:
        raise LimitExceeded(
            f"the frame holds {rows} hidden states; at most {limits.tokens} are allowed. Fix: raise Limits.tokens."
        )
    hidden = from_memory(frame.payload, dtype=metadata.dtype.label, shape=(rows, width))
    return Context("hidden", model, hidden=hidden, exactness=Exactness.APPROXIMATE)


# --- a context as a frame


def frame_from_context(
    context: Context,
    *,
    model_hash: str,
    session_id: str = "",
    source_agent_id: str = "",
    target_agent_id: str = "",
    hidden_dim: int = 0,
    compression: str = "",
) -> bytes:
    """The frame that a 0.4 peer takes for its own; the KV is copied once, into the result.

    model_hash: of the peer, which refuses any other. hidden_dim: of the model; hidden states tell it themselves.
    A class of exactness below exact is noted in the metadata's `extra`, which the SDK ignores.

    Raises:
        UnsupportedCache: the model has sliding windows, or layers of different shapes.
        UsageError: ids are pending, segments are missing or of different dtypes, a kind or size that no frame holds.
    """
    if context.kind == "text":
        body = message_from_context(
            context, session_id=session_id, source_agent_id=source_agent_id, target_agent_id=target_agent_id
        )
        names = Metadata(session_id, source_agent_id, target_agent_id, mode=Mode.JSON)
        return write_frame(names, body, compression=compression)
    if context.model is None or context.kind not in ("kv", "hidden"):
        raise UsageError(
            f"a context of kind {context.kind} is neither KV, hidden states nor text, and a frame of AVP 0.4 holds no "
            "token ids. Fix: prefill it, or hand over text_context(context.text)."
        )
    kv = context.kind == "kv"
    shape, runs = kv_payload(context, context.model) if kv else _hidden_payload(context)
    extra = {
        "model_hash": model_hash,
        "model_family": context.model.family,
        "num_steps": str(context.tokens.count(LATENT)),
    }
    exactness = worst(
        [context.exactness, *(Exactness.BOUNDED for segment in context.segments if segment.engine != ENGINE)]
    )
    if kv and exactness is not Exactness.EXACT:
        extra["exactness"] = exactness.label
    metadata = Metadata(
        session_id=session_id,
        source_agent_id=source_agent_id,
        target_agent_id=target_agent_id,
        model_id=context.model.id,
        hidden_dim=hidden_dim if kv else shape.head_dim,
        num_layers=len(context.model.layout.layers),
        payload_type=PayloadType.KV_CACHE if kv else PayloadType.HIDDEN_STATE,
        dtype=KV_DTYPES[shape.dtype],
        tensor_shape=() if kv else (shape.positions, shape.head_dim),
        extra=MappingProxyType(extra),
    )
    return write_frame(metadata, runs, compression=compression)


def _hidden_payload(context: Context) -> tuple[Shape, list[memoryview]]:
    hidden = context.hidden
    if hidden is None or hidden.dtype not in KV_DTYPES:
        raise UsageError(
            f"the context's hidden states are {hidden.dtype if hidden else 'missing'}, and a frame of AVP 0.4 holds "
            f"{', '.join(KV_DTYPES)}. Fix: pass hidden states in one of them."
        )
    rows, width = hidden.shape
    return Shape(0, 1, width, rows, hidden.dtype), list(hidden.runs())


# --- text: the body of POST /avp/v2/text, and the payload of a frame of mode JSON (0.4 itself does not say which)


def context_from_message(body: bytes | bytearray | memoryview, *, limits: Limits | None = None) -> Context:
    """The `content` of a JSON message, as a user's turn. Raises as `read_message`."""
    return text_context(read_message(body, limits=limits)[0])


def read_message(body: bytes | bytearray | memoryview, *, limits: Limits | None = None) -> tuple[str, str]:
    """The `content` of a JSON message, and its `session_id`, "" where it names none.

    Raises:
        LimitExceeded: more bytes than `limits.header`. BundleError: no JSON object with such strings.
    """
    limits = limits or Limits()
    if len(body) > limits.header:
        raise LimitExceeded(
            f"the message has {len(body)} bytes; at most {limits.header} are allowed. Fix: raise Limits.header."
        )
    try:
        value = json.loads(bytes(body))
        content, session = (value["content"], value.get("session_id", "")) if isinstance(value, Mapping) else (None, "")
        if not isinstance(content, str) or not isinstance(session, str):
            raise ValueError("it is no object of strings")
        content.encode()
    except (ValueError, KeyError, RecursionError) as error:
        raise BundleError(
            'the message is no JSON object with a string as its "content". Fix: ask the sender for a valid message.'
        ) from error
    return content, session


def message_from_context(
    context: Context, *, session_id: str = "", source_agent_id: str = "", target_agent_id: str = ""
) -> bytes:
    """The JSON message of a context's text."""
    message = {
        "avp_version": "0.4",
        "session_id": session_id,
        "source_agent_id": source_agent_id,
        "target_agent_id": target_agent_id,
        "content": context.text,
    }
    return json.dumps(message).encode()
