"""LlamaCppConnector: GGUF models in llama.cpp that take and give contexts.

A context is a sequence of llama.cpp's one cache (avp.connectors.llamacpp_memory); a run takes a sequence that shares
the cells of what it continues. What leaves the engine is canonical KV (avp.connectors.llamacpp_state), never its blob.
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

import numpy as np

from avp.buffers import Buffer
from avp.connectors.admission import admit, refuse_source
from avp.connectors.chat import Plan, Renderer, template_of, with_reply, with_thought, with_work
from avp.connectors.llamacpp_context import ENGINE, covered, held_by, make_context
from avp.connectors.llamacpp_engine import Engine, Floats, offloads
from avp.connectors.llamacpp_memory import Held, Memory
from avp.connectors.llamacpp_model import ModelFile, open_model
from avp.connectors.llamacpp_run import Pass, Stream, write
from avp.connectors.llamacpp_state import StateShape, plain
from avp.connectors.llamacpp_text import LlamaText
from avp.connectors.llamacpp_think import Stepper
from avp.connectors.options import Sampling
from avp.context import Context
from avp.errors import ContextTooLong, UsageError
from avp.identity import ModelIdentity
from avp.protocols import Prompt
from avp.receipt import Generation, Receipt, Usage
from avp.segment import LATENT, SEGMENT, Exactness

POSITIONS = 8192  # of all contexts that are in the engine at once, where the caller says no other number
SEQUENCES = 64  # contexts and runs that are in the engine at once
_SCORED = 2**23  # logits held at once by `score`


class LlamaCppConnector:
    """A GGUF model in llama.cpp. Any number of threads may call; their runs take turns."""

    def __init__(self, model: ModelFile, engine: Engine) -> None:
        """`engine` runs `model`, and nobody else uses it."""
        self.identity = ModelIdentity(model.title, model.family, model.weights, model.header.tokenizer, model.layout)
        self.max_positions = min(model.positions, engine.positions)
        self.tokenizer = LlamaText(engine, model.header)
        self._shape = StateShape(model.layout, engine.cache, model.interleaved)
        self.engine = ENGINE
        self.dtype = self._shape.dtype
        self.memory = Memory(engine, self._shape)
        self._engine = engine
        self._renderer = Renderer(self.tokenizer, engine.vocabulary)
        self._stepper = Stepper(model)
        self._kept: weakref.WeakKeyDictionary[Context, Held] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        positions: int | None = None,
        sequences: int = SEQUENCES,
        threads: int | None = None,
    ) -> LlamaCppConnector:
        """Load "smollm2", "gemma3", a .gguf file, or "ollama:NAME[:TAG]".

        `device` is "cpu" or "gpu" (None: the GPU, if the library was built for one); `dtype` that of the KV-cache:
        "float16" (None), "float32" or "q8_0". `positions` (None: 8192, or what the model has) and `sequences` bound
        what is in the engine at once; contexts beyond that wait in host memory.

        Raises:
            ModelNotFound: no such model. UnsupportedCache: AVP does not carry its cache.
        """
        if device not in (None, "cpu", "gpu") or (device == "gpu" and not offloads()):
            raise UsageError(f"device {device!r} is not here. Fix: use cpu, or gpu with a library built for it.")
        if (positions is not None and positions < 1) or not 2 <= sequences <= 120:
            raise UsageError(f"positions is {positions}, sequences {sequences}. Fix: at least 1, and 2 to 120.")
        model = open_model(name)
        engine = Engine(
            model.path,
            positions=positions or min(POSITIONS, model.positions),
            sequences=sequences,
            cache=dtype or "float16",
            threads=threads,
            gpu=device != "cpu" and offloads(),
        )
        return cls(model, engine)

    # --- the verbs

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
        with self._run(context, plan, more=0) as going:
            going.feed(plan.ids[going.length :])
            return self._context(going, plan, context)

    def prefill_steps(self, prompt: Prompt, *, context: Context | None = None) -> Iterator[Context]:
        """As `prefill`, a segment of 256 positions at a time: growing contexts, the last one the whole.

        The first one computes nothing: its ids after `len` are those that will be. Raises as `prefill`.
        """
        self._check(context)
        plan = self._renderer.extend(context, prompt, template={}, reply=False)
        if plan.reuse == len(plan.ids):
            yield self.prefill(prompt, context=context)
            return
        part = self._renamed(context, plan) if context is not None and plan.reuse else self._nothing(plan)
        yield part
        while len(part) < len(plan.ids):
            plan = replace(plan, reuse=len(part))
            with self._run(part, plan, more=0) as going:
                going.feed(plan.ids[going.length : (going.length // SEGMENT + 1) * SEGMENT])
                part = self._context(going, plan, part)
            yield part

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
            as `prefill`; UsageError for an unknown method; MissingExtra without torch and gguf.
        """
        if steps == 0:
            return self.prefill(prompt, context=context, tools=tools, chat_template_kwargs=chat_template_kwargs)
        if steps < 0:
            raise UsageError(f"steps is {steps}. Fix: pass 0 or more.")
        self._check(context)
        plan = with_work(
            self._renderer.extend(context, prompt, template=template_of(tools, chat_template_kwargs), reply=True)
        )
        self._check_room(len(plan.ids) + steps)
        step = self._stepper.step(method)
        ids = plan.ids + (LATENT,) * steps
        turns = with_thought(plan, len(ids))
        with self._run(context, plan, more=steps) as going:
            going.feed(plan.ids[going.length : -1])
            with self._engine.hidden_states():
                going.feed(plan.ids[-1:])
                for _ in range(steps):
                    vector = step(self._engine.hidden())
                    going.feed_vector(vector)
            kept = Buffer("float32", vector[None])
            return self._context(going, replace(plan, ids=ids, turns=turns), context, hidden=kept)

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
        the ends of a turn until then. `accept="text"` lets a context of other weights fall back to its text; the
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
        return Stream(lambda stream: self._generate(prompt, context, sampling, template, accept, stream))

    def score(self, ids: Sequence[int], *, context: Context | None = None) -> Floats:
        """Log-probability of each id given the context and the ids before it, float32 [n].

        Without a context nothing precedes the first id: its entry is NaN.

        Raises:
            IdentityMismatch, ContextTooLong, UsageError: before anything is computed.
        """
        self._check(context)
        plan = self._renderer.extend(context, list(ids), template={}, reply=False)
        start = len(plan.ids) - len(ids)
        plan = replace(plan, reuse=min(plan.reuse, max(start - 1, 0)))
        step = max(1, min(_SCORED // self._engine.vocabulary, SEGMENT))
        found: list[Floats] = [] if start else [np.full(1, np.nan, np.float32)]
        with self._run(context, plan, more=0) as going:
            while going.length < len(plan.ids) - 1:
                first = going.length
                size = 1 if plan.ids[first] == LATENT else min(step, SEGMENT - first % SEGMENT)
                targets = plan.ids[first + 1 : min(first + size, len(plan.ids) - 1) + 1]
                given = plan.ids[first : first + len(targets)]
                going.feed(given, every=True)
                found.append(self._scores(targets))
        return np.concatenate(found)[-len(ids) :]

    def vocabulary(self) -> tuple[str, ...]:
        """The tokens as the tokenizer spells them, by id."""
        return self.tokenizer.vocabulary()

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
            cut = f"max_new_tokens cut to {room}: the model has {self.max_positions} positions"
            plan = replace(plan, reasons=(*plan.reasons, cut))
            sampling = replace(sampling, max_new_tokens=room)
        with self._run(base, plan, more=sampling.max_new_tokens) as going:
            new, first = write(going, self.tokenizer, plan.ids[plan.reuse :], sampling, stream)
            text = self.tokenizer.decode(new)
            after = replace(plan, ids=plan.ids + new, turns=with_reply(plan, text, len(plan.ids) + len(new)))
            result = self._context(going, after, base)
        ended = perf_counter()
        reused = plan.reuse if mode == "kv" else 0
        mode = mode if mode != "kv" or plan.reuse else "text"
        receipt = Receipt(
            mode,
            result.exactness if mode == "kv" else Exactness.TEXT,
            bytes_reused=reused * self.identity.layout.bytes_per_token(self.dtype),
            tokens_reused=reused,
            positions_computed=going.positions,
            seconds=MappingProxyType({"ttft": first - started, "decode": ended - first, "total": ended - started}),
            reasons=plan.reasons,
        )
        stopped = any(each in text for each in sampling.stop)
        reason = "eos" if self._engine.ends(new[-1]) else "stop" if stopped else "length"
        usage = Usage(len(plan.ids), len(new), reused)
        return Generation(text, tokens=new, context=result, usage=usage, receipt=receipt, finish_reason=reason)

    @contextmanager
    def _run(self, context: Context | None, plan: Plan, *, more: int) -> Iterator[Pass]:
        """A run over the first `plan.reuse` positions, with room for the rest and `more`."""
        need = len(plan.ids) + more
        self._check_room(need)
        base = self._held(context) if context is not None and plan.reuse else None
        with self.memory.run(base, reuse=plan.reuse, need=need) as run:
            yield Pass(self._engine, run, _vector(context, self._engine.width))

    def _context(self, going: Pass, plan: Plan, base: Context | None, *, hidden: Buffer | None = None) -> Context:
        """Keep what the run computed, as a context."""
        before = self._held(base) if base is not None and plan.reuse else None
        held = self.memory.keep(going.run, base=before, reuse=plan.reuse)
        return self._over(held, plan, base, hidden)

    def _over(self, held: Held, plan: Plan, base: Context | None, hidden: Buffer | None = None) -> Context:
        context = make_context(self.identity, held, plan, base, hidden=hidden)
        with self._lock:
            self._kept[context] = held
        return context

    def _nothing(self, plan: Plan) -> Context:
        """A context of which nothing is computed yet."""
        with self._run(None, plan, more=0) as going:
            return self._context(going, plan, None)

    def _held(self, context: Context) -> Held:
        """The sequence of a context; one from elsewhere is written into the engine first."""
        with self._lock:
            held = self._kept.get(context)
        if held is None:
            covered(context)
            held = held_by(context, self.memory) or self.memory.adopt(context.segments, len(context))
            with self._lock:
                held = self._kept.setdefault(context, held)
        self.memory.touch(held)
        return held

    def _scores(self, targets: Sequence[int]) -> Floats:
        rows = np.stack([self._engine.logits(i) for i in range(len(targets))])
        rows -= rows.max(axis=1, keepdims=True)
        scores = rows[np.arange(len(targets)), list(targets)] - np.log(np.exp(rows).sum(axis=1))
        found: Floats = scores.astype(np.float32)
        return found

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
        if plan.reuse == len(context):
            return self._over(self._held(context), plan, context)
        with self._run(context, plan, more=0) as going:
            return self._context(going, plan, context)


def _vector(context: Context | None, width: int) -> Floats | None:
    """The input vector of a context's last position, kept for those that go on right after it."""
    if context is None or context.hidden is None or context.hidden.shape != (1, width):
        return None
    vector: Floats = plain(context.hidden)[0].astype(np.float32)
    return vector
