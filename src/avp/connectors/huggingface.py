"""HuggingFaceConnector: transformers models that take and give contexts.

One run of the model goes over a claimed arena (avp.connectors.arena); what it leaves is a snapshot, and a context over
it. Sampling, stopping and streaming are transformers' own `generate`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import MappingProxyType

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avp import registry
from avp.buffers import Buffer
from avp.connectors import loading
from avp.connectors.admission import admit, refuse_source
from avp.connectors.arena import SLACK, Arena, Shape, Snapshot, continue_from
from avp.connectors.cache import PositionCounter, RunCache
from avp.connectors.chat import Plan, Renderer, template_of, with_reply, with_thought, with_work
from avp.connectors.embeddings import Tables
from avp.connectors.layout import cache_layout
from avp.connectors.options import Sampling
from avp.connectors.sampling import Stream, eos_ids, run_generate
from avp.connectors.state import ENGINE, dtype_name, from_segments, make_context, to_buffer, to_tensor
from avp.connectors.tokenizer import TransformersText
from avp.connectors.weights import tokenizer_fingerprint, vocabulary, weights_fingerprint
from avp.context import Context
from avp.errors import ContextTooLong, UsageError
from avp.identity import ModelIdentity
from avp.protocols import Prompt, Step
from avp.receipt import Generation, Receipt, Usage
from avp.segment import LATENT, SEGMENT, Exactness

_SCORED = 256  # positions whose logits are held at once by `score`


class HuggingFaceConnector:
    """A transformers causal model and its tokenizer. Batch of one; any number of threads."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        weights: str | None = None,
    ) -> None:
        """`weights` is the checkpoint's fingerprint if the caller took it; else it is taken of the model in memory.

        Raises:
            UnsupportedCache: MLA, state-space, hybrid, chunked, shared or quantised caches.
        """
        layout = cache_layout(model.config, model.generation_config)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.identity = ModelIdentity(
            name or model.config.name_or_path or model.config.model_type,
            model.config.model_type,
            weights or weights_fingerprint(model),
            tokenizer_fingerprint(tokenizer),
            layout,
        )
        self.max_positions = int(model.config.get_text_config(decoder=True).max_position_embeddings)
        self.engine = ENGINE
        self.dtype = dtype_name(model.dtype)
        self._shape = Shape(layout, model.dtype, model.device)
        self._renderer = Renderer(TransformersText(tokenizer), model.get_input_embeddings().weight.shape[0])
        self._snapshots: weakref.WeakKeyDictionary[Context, Snapshot] = weakref.WeakKeyDictionary()
        self._steps: dict[str, Step] = {}
        self._lock = threading.Lock()
        counter = PositionCounter()
        hook = model.base_model.register_forward_pre_hook(counter, with_kwargs=True)
        weakref.finalize(self, hook.remove)
        self._counter = counter

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> HuggingFaceConnector:
        """Load by hub id, folder, .gguf file, "smollm2" or "gemma3"; device (cuda, mps, cpu) and dtype chosen where
        None.

        Raises:
            ModelNotFound: no such model. UnsupportedCache: AVP does not carry its cache.
        """
        loaded = loading.load(name, device=device, dtype=dtype)
        return cls(loaded.model, loaded.tokenizer, name=loaded.name, weights=loaded.weights)

    # --- the verbs

    @torch.no_grad()
    def prefill(
        self,
        prompt: Prompt,
        *,
        context: Context | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> Context:
        """The context after `prompt`: a user turn, messages, or token ids; computes only what `context` lacks.

        Raises:
            IdentityMismatch, ContextTooLong, UsageError: before anything is computed.
        """
        self._check(context)
        plan = self._renderer.extend(context, prompt, template=template_of(tools, chat_template_kwargs), reply=False)
        if context is not None and plan.ids == context.tokens and plan.reuse == len(context) == len(plan.ids):
            return context if plan.turns == context.turns else self._renamed(context, plan)
        if plan.reuse == len(plan.ids):
            return self._renamed(context, plan)
        with self._run(context, plan, more=0) as cache:
            self._hidden(cache, context, plan.ids[cache.length :])
            return self._context(cache, plan, context)

    @torch.no_grad()
    def prefill_steps(self, prompt: Prompt, *, context: Context | None = None) -> Iterator[Context]:
        """As `prefill`, a segment of 256 positions at a time: growing contexts, the last one the whole.

        The first one computes nothing: its ids after `len` are those that will be. Raises as `prefill`.
        """
        self._check(context)
        plan = self._renderer.extend(context, prompt, template={}, reply=False)
        if plan.reuse == len(plan.ids):
            yield self.prefill(prompt, context=context)
            return
        with self._run(context, plan, more=0) as cache:
            yield make_context(self.identity, Snapshot(cache.arena, plan.reuse), plan, context)
            while cache.length < len(plan.ids):
                stop = min((cache.length // SEGMENT + 1) * SEGMENT, len(plan.ids))
                self._hidden(cache, context, plan.ids[cache.length : stop])
                yield self._context(cache, plan, context)

    @torch.no_grad()
    def think(
        self,
        prompt: Prompt,
        *,
        steps: int = 20,
        context: Context | None = None,
        method: str = "norm",
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> Context:
        """The context after `prompt` and `steps` latent positions of the assistant's turn.

        A step feeds the last hidden state back as the next input vector, by the projection `method` ("norm", "soft",
        "ridge"; "noise" is the control). The result is approximate by class. `steps=0` is `prefill`.

        Raises:
            as `prefill`; UsageError for an unknown method.
        """
        if steps == 0:
            return self.prefill(prompt, context=context, tools=tools, chat_template_kwargs=chat_template_kwargs)
        if steps < 0:
            raise UsageError(f"steps is {steps}. Fix: pass 0 or more.")
        self._check(context)
        step = self._step(method)
        plan = with_work(
            self._renderer.extend(context, prompt, template=template_of(tools, chat_template_kwargs), reply=True)
        )
        ids = plan.ids + (LATENT,) * steps
        turns = with_thought(plan, len(ids))
        with self._run(context, plan, more=steps) as cache:
            hidden = vector = self._hidden(cache, context, plan.ids[cache.length :])
            for _ in range(steps):
                vector = step(hidden)
                output = self.model.base_model(inputs_embeds=vector[None], past_key_values=cache, use_cache=True)
                hidden = output.last_hidden_state[0, -1:]
            return self._context(cache, replace(plan, ids=ids, turns=turns), context, hidden=to_buffer(vector))

    def generate(
        self,
        prompt: Prompt = "",
        *,
        context: Context | None = None,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        source: object | None = None,
        accept: str = "exact",
    ) -> Generation:
        """Text after `context` and `prompt`; an empty prompt goes on with the turn that is open.

        Greedy at temperature 0. The text ends with the token that completed a stop string. `min_new_tokens` suppresses
        the end of sequence until then. `accept="text"` lets a context of other weights fall back to its text; the
        receipt says so.

        Raises:
            IdentityMismatch: the context was made by other weights and `accept` does not allow text.
            ContextTooLong, UsageError: before anything is computed.
        """
        sampling = Sampling.of(max_new_tokens, min_new_tokens, temperature, top_p, stop, seed)
        refuse_source(source)
        return self._generate(prompt, context, sampling, template_of(tools, chat_template_kwargs), accept, None)

    def stream(
        self,
        prompt: Prompt = "",
        *,
        context: Context | None = None,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        source: object | None = None,
        accept: str = "exact",
    ) -> Stream:
        """As `generate`, piece by piece: iterate over the stream, then take its `result`. Closing it ends the run."""
        sampling = Sampling.of(max_new_tokens, min_new_tokens, temperature, top_p, stop, seed)
        refuse_source(source)
        template = template_of(tools, chat_template_kwargs)
        return Stream(
            self.tokenizer, lambda stream: self._generate(prompt, context, sampling, template, accept, stream)
        )

    @torch.no_grad()
    def score(self, ids: Sequence[int], *, context: Context | None = None) -> torch.Tensor:
        """Log-probability of each id given the context and the ids before it, float32 [n] on the CPU.

        Without a context nothing precedes the first id: its entry is NaN.

        Raises:
            IdentityMismatch, ContextTooLong, UsageError: before anything is computed.
        """
        self._check(context)
        plan = self._renderer.extend(context, list(ids), template={}, reply=False)
        start = len(plan.ids) - len(ids)
        plan = replace(plan, reuse=min(plan.reuse, max(start - 1, 0)))
        targets = torch.tensor(plan.ids, device=self.model.device)
        scores: list[torch.Tensor] = [] if start else [torch.full((1,), torch.nan)]
        with self._run(context, plan, more=0) as cache:
            while cache.length < len(plan.ids) - 1:
                first = cache.length
                last = min(first + _SCORED, len(plan.ids) - 1)
                logits = self._logits(cache, context, plan.ids[first:last])
                scores.append(
                    torch.log_softmax(logits.float(), -1).gather(-1, targets[first + 1 : last + 1, None])[:, 0].cpu()
                )
        return torch.cat(scores)[-len(ids) :]

    def vocabulary(self) -> tuple[str, ...]:
        """The tokens as the tokenizer spells them, by id; an id without a token is ""."""
        return vocabulary(self.tokenizer)

    def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids that `prefill(prompt)` would compute; computes nothing."""
        return self._renderer.extend(None, prompt, template={}, reply=False).ids

    # --- one run

    def _generate(
        self,
        prompt: Prompt,
        context: Context | None,
        sampling: Sampling,
        template: Mapping[str, object],
        accept: str,
        stream: Stream | None,
    ) -> Generation:
        started = perf_counter()
        base, mode, fallback = admit(context, self.identity, accept=accept)
        plan = self._renderer.extend(base, prompt, template=template, reply=True)
        plan = replace(with_work(plan), reasons=(*fallback, *plan.reasons))
        room = self.max_positions - len(plan.ids)
        if room < sampling.max_new_tokens:
            self._check_room(len(plan.ids) + 1)
            plan = replace(
                plan,
                reasons=(*plan.reasons, f"max_new_tokens cut to {room}: the model has {self.max_positions} positions"),
            )
            sampling = replace(sampling, max_new_tokens=room)
        with torch.no_grad(), self._run(base, plan, more=sampling.max_new_tokens) as cache:
            vector = self._latent(base) if plan.ids[plan.reuse] == LATENT else None
            new, first = run_generate(self.model, self.tokenizer, cache, plan.ids, vector, sampling, stream)
            text = self._decode(new)
            after = replace(plan, ids=plan.ids + new, turns=with_reply(plan, text, len(plan.ids) + len(new)))
            result = self._context(cache, after, base, pending=1)
        ended = perf_counter()
        reused = plan.reuse if mode == "kv" else 0
        mode = mode if mode != "kv" or plan.reuse else "text"
        receipt = Receipt(
            mode,
            result.exactness if mode == "kv" else Exactness.TEXT,
            bytes_reused=self._shape.nbytes(reused),
            tokens_reused=reused,
            positions_computed=cache.positions,
            seconds=MappingProxyType({"ttft": first - started, "decode": ended - first, "total": ended - started}),
            reasons=plan.reasons,
        )
        usage = Usage(len(plan.ids), len(new), reused)
        stopped = any(each in text for each in sampling.stop)
        reason = "eos" if new and new[-1] in eos_ids(self.model) else "stop" if stopped else "length"
        return Generation(text, tokens=new, context=result, usage=usage, receipt=receipt, finish_reason=reason)

    @contextmanager
    def _run(self, context: Context | None, plan: Plan, *, more: int) -> Iterator[RunCache]:
        """A cache that holds the first `plan.reuse` positions, and room for the rest and `more`."""
        need = len(plan.ids) + more
        self._check_room(need)
        if context is None or plan.reuse == 0:
            arena = Arena.empty(self._shape, min(need + SLACK, max(need, self.max_positions)))
            arena.claim(0)
        else:
            arena = continue_from(self._snapshot(context), plan.reuse, need)
        cache = RunCache(arena, plan.reuse, counter=self._counter)
        try:
            yield cache
        finally:
            arena.release(cache.kept)

    def _context(
        self, cache: RunCache, plan: Plan, base: Context | None, *, hidden: Buffer | None = None, pending: int = 0
    ) -> Context:
        """Keep what the run computed, as a context; its last `pending` ids count as not computed."""
        cache.kept = min(cache.length, len(plan.ids) - pending)
        snapshot = Snapshot(cache.arena, cache.kept)
        context = make_context(self.identity, snapshot, plan, base, hidden=hidden)
        with self._lock:
            self._snapshots[context] = snapshot
        return context

    def _snapshot(self, context: Context) -> Snapshot:
        with self._lock:
            if context not in self._snapshots:
                self._snapshots[context] = from_segments(context, self._shape)
            return self._snapshots[context]

    def _hidden(self, cache: RunCache, context: Context | None, ids: Sequence[int]) -> torch.Tensor:
        """Compute `ids`; the last hidden state after the final norm, [1, hidden]."""
        output = self.model.base_model(**self._inputs(context, ids), past_key_values=cache, use_cache=True)
        hidden: torch.Tensor = output.last_hidden_state[0, -1:]
        return hidden

    def _logits(self, cache: RunCache, context: Context | None, ids: Sequence[int]) -> torch.Tensor:
        """Compute `ids`; logits after each, [n, vocabulary]. A latent first position goes alone."""
        if ids[0] == LATENT and len(ids) > 1:
            return torch.cat([self._logits(cache, context, ids[:1]), self._logits(cache, context, ids[1:])])
        logits: torch.Tensor = self.model(**self._inputs(context, ids), past_key_values=cache, use_cache=True).logits[0]
        return logits

    def _inputs(self, context: Context | None, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        if ids[0] == LATENT:
            return {"inputs_embeds": self._latent(context)[None]}
        return {"input_ids": torch.tensor([list(ids)], device=self.model.device)}

    def _latent(self, context: Context | None) -> torch.Tensor:
        """The input vector of the context's last position, [1, hidden], kept for those that go on right after it."""
        if context is None or context.hidden is None:
            raise UsageError(
                "the context ends in a latent position whose input vector it does not hold. Fix: pass a prompt."
            )
        return to_tensor(context.hidden, self.model.device).to(self.model.dtype)

    # --- what a context must be

    def _check(self, context: Context | None) -> None:
        if context is not None:
            admit(context, self.identity, accept="exact")

    def _check_room(self, need: int) -> None:
        if need > self.max_positions:
            raise ContextTooLong(
                f"{need} positions are needed and {self.identity.id} has {self.max_positions}. Nothing was computed. "
                "Fix: shorten the prompt, start from a shorter context, or ask for fewer tokens or steps."
            )

    def _renamed(self, context: Context | None, plan: Plan) -> Context:
        """The context with more messages and nothing more to compute yet."""
        if context is None:
            raise UsageError("there is nothing to compute. Fix: pass a prompt that is not empty.")
        with self._run(context, plan, more=0) as cache:
            return self._context(cache, plan, context)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _step(self, method: str) -> Step:
        with self._lock:
            if method not in self._steps:
                tables = Tables(self.model)
                with torch.no_grad():
                    self._steps[method] = registry.projection(method).fit(tables, tables)
            return self._steps[method]
