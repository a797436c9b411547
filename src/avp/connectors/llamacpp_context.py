"""What a run of llama.cpp left, as a Context."""

from __future__ import annotations

from avp.buffers import Buffer
from avp.connectors.chat import Plan
from avp.connectors.llamacpp_memory import Held, HeldTensors, Memory
from avp.context import Context
from avp.errors import UsageError
from avp.identity import ModelIdentity
from avp.segment import LATENT, Exactness, Want, cut_segments, worst

ENGINE = "llamacpp"


def make_context(
    identity: ModelIdentity, held: Held, plan: Plan, base: Context | None, *, hidden: Buffer | None = None
) -> Context:
    """The context of what a run computed: `plan.ids`, of which `held` has the KV."""
    shape, length = held.memory.shape, held.length
    latent = next((i for i, token in enumerate(plan.ids) if token == LATENT), len(plan.ids))
    old = base.segments if base is not None and plan.reuse else ()
    want = Want(ENGINE, shape.dtype)
    own = Exactness.BOUNDED if shape.cache == "q8_0" else Exactness.EXACT

    def grade(stop: int) -> Exactness:
        """That of the base where it was reused, and no better behind latent positions or for a quantised cache."""
        parts = [want.grade(segment) for segment in old if segment.start < min(stop, plan.reuse)]
        return worst([*parts, own, Exactness.APPROXIMATE if latent < stop else Exactness.EXACT])

    segments = cut_segments(
        identity,
        plan.ids[:length],
        dtype=shape.dtype,
        engine=ENGINE,
        tensors=lambda start, stop: HeldTensors(held, start, stop),
        grade=grade,
    )
    exactness = worst(segment.exactness for segment in segments)
    return Context("kv", identity, plan.ids, length, plan.turns, plan.template, segments, hidden, exactness)


def held_by(context: Context, memory: Memory) -> Held | None:
    """The sequence over which all segments of a context lie, if there is one: a store or a tenant makes other contexts
    of the same segments.
    """
    for segment in context.segments:
        tensors = segment.tensors
        if not isinstance(tensors, HeldTensors) or tensors.held.memory is not memory:
            return None
        held = tensors.held
        if held.length != len(context) or (tensors.start, tensors.stop) != (segment.start, segment.stop):
            return None
    return held if context.segments else None


def covered(context: Context) -> None:
    """Check that a context's segments hold all its positions.

    Raises:
        UsageError: some are missing.
    """
    at = 0
    for segment in context.segments:
        if segment.start != at:
            break
        at = segment.stop
    if at != len(context):
        raise UsageError(f"the context lacks the KV from position {at} on. Fix: fetch the missing segments first.")
