"""The one renderer: a conversation, by the model's chat template, as token ids that continue a context.

A continuation is rendered as the whole conversation is; what of it the context holds already is found by comparing ids.
So `prefill` then `generate` computes exactly the ids that one call with all messages would, and a template that
rewrites
history (drops reasoning, trims) costs a recomputation from the first id that differs, and a reason on the receipt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol, cast

from jinja2.exceptions import TemplateError

from avp.context import Context, Turn
from avp.errors import UsageError
from avp.protocols import Message, Prompt
from avp.segment import LATENT

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
    open: bool = False  # what follows belongs to the last turn: an assistant's that has not ended, or raw ids


class ChatText(Protocol):
    """What the renderer asks of a tokenizer, whichever engine it comes from."""

    @property
    def has_template(self) -> bool:
        """Whether conversations are rendered by a template; else messages are joined as they are."""
        ...

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text in which special tokens may be spelled out; `special`: with those that begin a sequence."""
        ...

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None,
        reply: bool,
        variables: Mapping[str, object],
    ) -> str:
        """The conversation by the template; `reply`: and the beginning of an assistant's turn.

        Raises:
            TemplateError, TypeError, ValueError: the template refuses it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders for one tokenizer and a model of `vocabulary` ids."""

    tokenizer: ChatText
    vocabulary: int

    def extend(self, context: Context | None, prompt: Prompt, *, template: Mapping[str, object], reply: bool) -> Plan:
        """The plan for `prompt` after `context`; `reply`: an assistant turn follows.

        Without `reply` only those ids are taken that hold whoever speaks next: a user turn closes when that is known.

        Raises:
            UsageError: the prompt is no string, messages or ids; the template refuses the conversation; or what would
                be recomputed holds latent positions.
        """
        before = context.turns if context is not None else ()
        template = template or (context.template if context is not None else {})
        ids = self._raw_ids(prompt)
        if ids is not None:
            held = context.tokens if context is not None else ()
            whole = (*held, *ids)
            raw = Turn({"role": "raw", "content": ""}, (0, len(whole)))
            return Plan(whole, len(context) if context is not None else 0, (raw,), template, open=True)
        turns = (*before, *messages(prompt))
        if not turns:
            raise UsageError("there is nothing to compute. Fix: pass a prompt, or a context that holds something.")
        if context is not None and not messages(prompt) and (not reply or _is_open(context)):
            return Plan(context.tokens, len(context), turns, template, open=_is_open(context))
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

    def _raw_ids(self, prompt: Prompt) -> tuple[int, ...] | None:
        """The token ids, if the prompt is a list of them."""
        if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not prompt:
            return None
        if not all(isinstance(item, int) for item in prompt):
            return None
        ids = tuple(int(cast(int, item)) for item in prompt)
        wrong = next((i for i in ids if not 0 <= i < self.vocabulary), None)
        if wrong is not None:
            raise UsageError(
                f"{wrong} is no token id: the model has {self.vocabulary}. Fix: pass ids of its own tokenizer."
            )
        return ids

    def _encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of a piece of rendered text; a template writes its own BOS, plain text gets the tokenizer's."""
        return self.tokenizer.encode(text, special=first and not self.tokenizer.has_template)

    def text(self, turns: Sequence[Turn], *, template: Mapping[str, object], reply: bool) -> str:
        """The conversation as text; latent positions show as a mark.

        Consecutive turns of one role are merged, and a system turn joins the first user turn, only if the template
        refuses them as they are.
        """
        shown = [
            {**turn.message, "content": _MARK + turn.content} if turn.opaque else dict(turn.message) for turn in turns
        ]
        if not self.tokenizer.has_template:
            return "".join(str(message.get("content") or "") for message in shown)
        _arguments(template)
        problem: Exception | None = None
        for candidate in (shown, _merged(shown), _merged(_without_system(shown))):
            try:
                return self._apply(candidate, template, reply)
            except (TemplateError, TypeError, ValueError) as error:
                problem = problem or error
        raise UsageError(
            f"the chat template refuses the conversation: {problem}. Fix: order the messages as the model expects."
        ) from problem

    def _apply(self, shown: list[dict[str, object]], template: Mapping[str, object], reply: bool) -> str:
        tools, extra = _arguments(template)
        return self.tokenizer.render(shown, tools=tools, reply=reply, variables=extra)


def _is_open(context: Context) -> bool:
    """Whether the last turn has not ended: the model was writing (its last token is pending) or thinking; raw ids."""
    if context.kind != "kv" or not context.turns:
        return False
    unfinished = bool(context.pending) or context.tokens[-1:] == (LATENT,)
    return context.turns[-1].role == "raw" or (context.turns[-1].role == "assistant" and unfinished)


# What a caller, or a context from elsewhere, must not set: the template itself and what the renderer decides.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


def _arguments(template: Mapping[str, object]) -> tuple[list[dict[str, object]] | None, dict[str, object]]:
    """Tools and arguments for the template, checked: a received context brings its own.

    Raises:
        UsageError: tools are no list of objects, or an argument is one that the renderer sets itself.
    """
    tools, extra = template.get("tools"), template.get("chat_template_kwargs", {})
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UsageError("tools are no list of objects. Fix: pass tools as JSON schemas, or leave them out.")
    found = sorted(_RESERVED & set(extra)) if isinstance(extra, dict) else extra
    if found or not isinstance(extra, dict):
        raise UsageError(
            f"chat_template_kwargs may not set {found}: the renderer does. Fix: pass only the template's own variables."
        )
    return cast("list[dict[str, object]] | None", tools), extra


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
    if plan.open and last.role == "raw":
        return (*plan.turns[:-1], Turn(last.message, (0, positions)))
    if plan.open:
        return (*plan.turns[:-1], Turn({**last.message, "content": last.content + text}, last.opaque))
    return (*plan.turns, Turn({"role": "assistant", "content": text}))


def with_thought(plan: Plan, positions: int) -> tuple[Turn, ...]:
    """The turns with latent positions up to `positions`: a new assistant turn, or more of the one that was open.

    Raises:
        UsageError: the open turn has text already; a turn holds its latent positions before its text.
    """
    last = plan.turns[-1]
    if not plan.open:
        return (*plan.turns, Turn({"role": "assistant", "content": ""}, (len(plan.ids), positions)))
    if last.role != "raw" and (last.opaque is None or last.content):
        raise UsageError("latent steps cannot follow text within one turn. Fix: pass a prompt, which closes the turn.")
    return (*plan.turns[:-1], Turn(last.message, (last.opaque[0] if last.opaque else 0, positions)))


def template_of(
    tools: Sequence[Mapping[str, object]] | None, chat_template_kwargs: Mapping[str, object] | None
) -> Mapping[str, object]:
    """What a context keeps of the arguments that a chat template sees."""
    given = {
        "tools": list(tools) if tools else None,
        "chat_template_kwargs": dict(chat_template_kwargs) if chat_template_kwargs else None,
    }
    return MappingProxyType({name: value for name, value in given.items() if value is not None})
