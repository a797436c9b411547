"""The one renderer: a conversation, by the model's chat template, as token ids that continue a context.

A continuation is rendered as the whole conversation is; what of it the context holds already is found by comparing ids.
So `prefill` then `generate` computes exactly the ids that one call with all messages would, and a template that
rewrites
history (drops reasoning, trims) costs a recomputation from the first id that differs, and a reason on the receipt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from avp.context import LATENT, Context, Turn
from avp.errors import UsageError
from avp.protocols import Message, Prompt

# Stands in the rendered text for positions that no text stands for; private-use characters, so no tokenizer merges it.
_MARK = "\ue0a5avp-opaque\ue0a5"
_PROBE = Turn({"role": "user", "content": "x"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compute: `ids` of the whole conversation, of which the first `reuse` positions are in the context."""

    ids: tuple[int, ...]
    reuse: int
    turns: tuple[Turn, ...]
    template: Mapping[str, object]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def extend(self, context: Context | None, prompt: Prompt, *, template: Mapping[str, object], reply: bool) -> Plan:
        """The plan for `prompt` after `context`; `reply`: an assistant turn follows.

        Without `reply` only those ids are taken that hold whoever speaks next: a user turn closes when that is known.

        Raises:
            UsageError: the prompt is no string, messages or ids; the template refuses the conversation; or what would
            be
                recomputed holds latent positions.
        """
        before = context.turns if context is not None else ()
        template = template or (context.template if context is not None else {})
        ids = raw_ids(prompt)
        if ids is not None:
            held = context.tokens if context is not None else ()
            whole = (*held, *ids)
            raw = Turn({"role": "raw", "content": ""}, (0, len(whole)))
            return Plan(whole, len(context) if context is not None else 0, (raw,), template)
        turns = (*before, *messages(prompt))
        if not turns:
            raise UsageError("there is nothing to compute. Fix: pass a prompt, or a context that holds something.")
        open_turn = not reply or turns[-1].role in ("assistant", "raw")
        if context is not None and open_turn and not messages(prompt):
            return Plan(context.tokens, len(context), turns, template)
        held = context.tokens if context is not None else ()
        settle = self._reply_ids if reply else self._settled_ids
        rendered = settle(turns, held, template)
        return _compare(context, rendered, turns, template)

    def _reply_ids(
        self, turns: tuple[Turn, ...], held: tuple[int, ...], template: Mapping[str, object]
    ) -> tuple[int, ...]:
        return self._ids(turns, held, template, "reply")

    def _settled_ids(
        self, turns: tuple[Turn, ...], held: tuple[int, ...], template: Mapping[str, object]
    ) -> tuple[int, ...]:
        """The ids that hold whatever follows: the common beginning of all continuations that the template allows."""
        found: list[tuple[int, ...]] = []
        problem: UsageError | None = None
        for tail, more in (("", ()), ("reply", ()), ("reply", (_PROBE,))):
            try:
                found.append(self._ids((*turns, *more), held, template, tail))
            except UsageError as error:
                problem = error
        if not found:
            raise problem or UsageError("the conversation is empty. Fix: pass at least one message.")
        return found[0][: min(common(found[0], other) for other in found)]

    def _ids(
        self, turns: Sequence[Turn], held: tuple[int, ...], template: Mapping[str, object], tail: str
    ) -> tuple[int, ...]:
        raw = turns[0].opaque if turns and turns[0].role == "raw" else None
        prefix = held[: raw[1]] if raw else ()
        rest = turns[1:] if raw else turns
        if not rest:
            return prefix
        pieces = self.text(rest, template=template, reply=tail == "reply").split(_MARK)
        runs = [turn.opaque for turn in rest if turn.opaque]
        if len(pieces) != len(runs) + 1:
            raise UsageError(
                "the chat template drops or repeats a turn of latent steps. Fix: hand over text, or use another "
                "template."
            )
        ids = [*prefix, *self._encode(pieces[0], first=not prefix)]
        for run, piece in zip(runs, pieces[1:], strict=True):
            ids.extend(held[run[0] : run[1]])
            ids.extend(self._encode(piece, first=False))
        return tuple(ids)

    def _encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of a piece of rendered text; a template writes its own BOS, plain text gets the tokenizer's."""
        special = first and not self.tokenizer.chat_template
        return cast(
            list[int], self.tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        )

    def text(self, turns: Sequence[Turn], *, template: Mapping[str, object], reply: bool) -> str:
        """The conversation as text; latent positions show as a mark.

        Consecutive turns of one role are merged, and a system turn joins the first user turn, only if the template
        refuses them as they are.
        """
        shown = [
            {**turn.message, "content": _MARK + turn.content} if turn.opaque else dict(turn.message) for turn in turns
        ]
        if not self.tokenizer.chat_template:
            return "".join(str(message.get("content") or "") for message in shown)
        problem: TemplateError | None = None
        for candidate in (shown, _merged(shown), _merged(_without_system(shown))):
            try:
                return self._apply(candidate, template, reply)
            except TemplateError as error:
                problem = problem or error
        raise UsageError(
            f"the chat template refuses the conversation: {problem}. Fix: order the messages as the model expects."
        ) from problem

    def _apply(self, shown: list[dict[str, object]], template: Mapping[str, object], reply: bool) -> str:
        extra = template.get("chat_template_kwargs")
        rendered = self.tokenizer.apply_chat_template(
            shown,
            tools=template.get("tools"),
            add_generation_prompt=reply,
            tokenize=False,
            **(cast(dict[str, object], extra) if isinstance(extra, dict) else {}),
        )
        return cast(str, rendered)


def raw_ids(prompt: Prompt) -> tuple[int, ...] | None:
    """The token ids, if the prompt is a list of them."""
    if (
        not isinstance(prompt, Sequence)
        or isinstance(prompt, str)
        or not prompt
        or not all(isinstance(item, int) for item in prompt)
    ):
        return None
    return tuple(int(cast(int, item)) for item in prompt)


def messages(prompt: Prompt) -> tuple[Turn, ...]:
    """The turns of a prompt: a string is a user turn; an empty one is none.

    Raises:
        UsageError: neither a string nor messages.
    """
    if isinstance(prompt, str):
        return (Turn({"role": "user", "content": prompt}),) if prompt else ()
    if not isinstance(prompt, Sequence) or not all(isinstance(item, Mapping) and "role" in item for item in prompt):
        raise UsageError(
            'a prompt is a string, a list of messages {"role": …, "content": …}, or a list of token ids. '
            "Fix: pass one of these."
        )
    return tuple(Turn(dict(cast(Message, item))) for item in prompt)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


def _compare(
    context: Context | None, ids: tuple[int, ...], turns: tuple[Turn, ...], template: Mapping[str, object]
) -> Plan:
    if context is None:
        return Plan(ids, 0, turns, template)
    same = common(ids, context.tokens)
    reuse = min(same, len(context))
    if LATENT in ids[reuse:]:
        raise UsageError(
            f"the conversation renders differently from position {same} on, before latent positions, which "
            f"cannot be computed again. "
            "Fix: keep tools, template arguments and earlier messages as they were when the context was made."
        )
    reasons: tuple[str, ...] = ()
    if reuse < len(context):
        reasons = (
            f"re-rendered, the conversation differs from the context at position {same} (the template rewrites "
            f"history, or the text "
            f"of a turn tokenizes differently): {reuse} of {len(context)} positions are reused",
        )
    return Plan(ids, reuse, turns, template, reasons)


def _merged(shown: list[dict[str, object]]) -> list[dict[str, object]]:
    """Consecutive messages of one role as one, two line breaks between."""
    merged: list[dict[str, object]] = []
    for message in shown:
        if (
            merged
            and merged[-1].get("role") == message.get("role")
            and message.get("role") in ("user", "assistant", "system")
        ):
            content = f"{merged[-1].get('content') or ''}\n\n{message.get('content') or ''}"
            merged[-1] = {**merged[-1], "content": content}
        else:
            merged.append(message)
    return merged


def _without_system(shown: list[dict[str, object]]) -> list[dict[str, object]]:
    """System messages as user messages, for templates that know no system role."""
    return [{**message, "role": "user"} if message.get("role") == "system" else message for message in shown]


def with_work(plan: Plan) -> Plan:
    """A plan that computes at least the last position: the state after it is needed to go on."""
    return replace(plan, reuse=min(plan.reuse, len(plan.ids) - 1))


def with_reply(plan: Plan, text: str, positions: int) -> tuple[Turn, ...]:
    """The turns with the model's text: a new assistant turn, or more of the one that was open."""
    last = plan.turns[-1]
    if last.role == "raw":
        return (*plan.turns[:-1], Turn(last.message, (0, positions)))
    if last.role == "assistant":
        return (*plan.turns[:-1], Turn({**last.message, "content": last.content + text}, last.opaque))
    return (*plan.turns, Turn({"role": "assistant", "content": text}))
