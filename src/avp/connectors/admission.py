"""Which contexts a model may go on from, and as what. KV moves only between equal weights."""

from __future__ import annotations

from dataclasses import replace

from avp.context import Context, Turn
from avp.errors import IdentityMismatch, UsageError
from avp.identity import ModelIdentity
from avp.segment import LATENT, Exactness


def admit(
    context: Context | None, identity: ModelIdentity, *, accept: str
) -> tuple[Context | None, str, tuple[str, ...]]:
    """The context as the model can use it, the mode of the hand-over ("kv", "tokens", "text"), and the reasons for a
    fallback.

    Raises:
        IdentityMismatch: other weights and `accept` is above "text", or nothing that the model could read.
        UsageError: `accept` is no class of exactness, or the context holds hidden states only.
    """
    floor = Exactness.parse(accept)
    if context is not None and not isinstance(context, Context):
        raise UsageError(f"context is a {type(context).__name__}, not a Context. Fix: pass a generation's .context.")
    if context is None or context.model is None or context.kind == "text":
        return context, "text", ()
    if context.kind == "kv" and context.model.same_weights(identity):
        return context, "kv", ()
    if context.kind == "hidden" and floor is not Exactness.TEXT:
        raise UsageError(
            f"a context of kind hidden holds no KV to go on from ({context.model.describe()}). "
            'Fix: prefill it again, or pass accept="text" to go on from its text.'
        )
    if context.kind != "tokens" and floor is not Exactness.TEXT:
        raise IdentityMismatch(
            f"this context was made by {context.model.describe()} but the connector runs {identity.describe()}. "
            "A KV-cache is valid only for the weights and the cache layout that made it. "
            'Fix: load those weights, or go on from its text with generate(…, accept="text").'
        )
    why = f"no KV was used: the context is of kind {context.kind}, made by {context.model.describe()}"
    if context.model.same_tokenizer(identity) and context.tokens and LATENT not in context.tokens:
        return replace(context, kind="tokens", length=0, segments=(), hidden=None), "tokens", (why,)
    turns = tuple(Turn(turn.message) for turn in context.turns if turn.content)
    if not turns:
        raise IdentityMismatch(f"{why}, and it holds no text to fall back to. Fix: hand over the text itself.")
    return Context("text", turns=turns, template=context.template, exactness=Exactness.TEXT), "text", (why,)


def refuse_source(source: object | None) -> None:
    """`source`, the connector that made a context of other weights, is for projections between models.

    Raises:
        UsageError: one was given; there is no such projection yet.
    """
    if source is not None:
        raise UsageError(
            "a context cannot be projected from one model to another yet, so `source` has no use. "
            'Fix: leave it out and pass accept="text" to go on from the context\'s text.'
        )
