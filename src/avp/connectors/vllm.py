"""VLLMConnector: a vLLM with AVP's plug-in, from outside. The engine computes; KV goes to and fro through a store.

A context's segments are put into the store, and vLLM loads them by the ids of the prompt; what vLLM computes it puts
there, and the context after it is read from there: full pages of 32 positions. Up to 32 ids after them are pending.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from transformers import AutoConfig, AutoTokenizer

from avp.connectors import loading
from avp.connectors.admission import admit, refuse_source
from avp.connectors.chat import Plan, Renderer, template_of, with_reply, with_work
from avp.connectors.options import Sampling
from avp.connectors.tokenizer import TransformersText
from avp.connectors.vllm_engine import Ask, Engine, Offline, Server
from avp.connectors.vllm_identity import checkpoint_identity
from avp.connectors.vllm_jobs import ENGINE
from avp.connectors.vllm_run import Run, VLLMStream, complete
from avp.connectors.vllm_shelf import Shelf
from avp.connectors.weights import vocabulary
from avp.context import Context, Turn
from avp.errors import AVPError, ContextTooLong, IdentityMismatch, ModelNotFound, UsageError
from avp.protocols import Prompt, Store
from avp.receipt import Generation, Receipt, Usage
from avp.security import Tenant
from avp.segment import LATENT, Exactness, root_page, worst
from avp.stores import open_store

_ONE = Sampling(1, 0, 0.0, 1.0, (), None)  # vLLM always samples; one token is the least


class VLLMConnector:
    """A vLLM engine, and the store that it shares with us. Any number of threads, if the store takes them."""

    def __init__(self, engine: Engine, checkpoint: Path, *, name: str, store: Store, tenant: Tenant) -> None:
        """Asks the engine for one token, to see that it runs the plug-in, these weights and this tenant.

        Raises:
            UsageError, IdentityMismatch: it does not.
        """
        config = AutoConfig.from_pretrained(checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.identity = checkpoint_identity(checkpoint, name=name, tokenizer=self.tokenizer)
        self.max_positions = engine.max_positions
        self.engine = ENGINE
        self._vllm = engine
        text = config.get_text_config(decoder=True)
        self._renderer = Renderer(TransformersText(self.tokenizer), int(text.vocab_size))
        self.dtype = self._greet(tenant)
        self._shelf = Shelf(store, tenant, self.identity, self.dtype)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        url: str = "http://127.0.0.1:8000",
        store: str = "disk:",
        tenant: str = "",
        secret: str = "",
        token: str | None = None,
        timeout: float = 600.0,
    ) -> VLLMConnector:
        """A running `vllm serve` at `url`, of the checkpoint `name` (a folder, a hub id that is here, "smollm2").

        store, tenant, secret: as in the server's `kv_connector_extra_config`. token: its --api-key.

        Raises:
            ModelNotFound: no such checkpoint here. ConnectionFailed, AccessDenied: no such server. UsageError,
            IdentityMismatch: it runs without the plug-in, for another tenant, or other weights.
        """
        checkpoint = _folder(name)
        opened = open_store(store)
        server = Server(url, token=token, timeout=timeout)
        return cls._made(server, checkpoint, loading.title(name), opened, Tenant.named(tenant, secret=secret.encode()))

    @classmethod
    def offline(
        cls,
        name: str | Path,
        *,
        store: str = "disk:",
        tenant: str = "",
        secret: str = "",
        accept: str = "exact",
        dtype: str = "float32",
        max_positions: int = 2048,
    ) -> VLLMConnector:
        """An engine in this process, which must be one of vLLM's environment.

        Raises:
            MissingExtra: vLLM is not installed here. Else as `from_pretrained`.
        """
        checkpoint = _folder(name)
        given = {"store": store, "tenant": tenant, "secret": secret, "accept": accept, "checkpoint": str(checkpoint)}
        engine = Offline(checkpoint, extra=given, dtype=dtype, max_positions=max_positions)
        whose = Tenant.named(tenant, secret=secret.encode())
        return cls._made(engine, checkpoint, loading.title(name), open_store(store), whose)

    @classmethod
    def _made(cls, engine: Engine, checkpoint: Path, name: str, store: Store, tenant: Tenant) -> VLLMConnector:
        try:
            return cls(engine, checkpoint, name=name, store=store, tenant=tenant)
        except AVPError:
            engine.close()
            store.close()
            raise

    # --- the verbs

    def prefill(
        self,
        prompt: Prompt,
        *,
        context: Context | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> Context:
        """The context after `prompt`: vLLM computes what the store lacks, and one token, which is left out.

        Raises:
            IdentityMismatch, ContextTooLong, UsageError: before anything is computed. SegmentMissing: what vLLM
            computed is not in our store.
        """
        base, _, _ = self._admit(context, "exact")
        plan = self._renderer.extend(base, prompt, template=template_of(tools, chat_template_kwargs), reply=False)
        if not plan.ids:
            raise UsageError("there is nothing to compute. Fix: pass a prompt that is not empty.")
        if base is not None and plan.reuse == len(base) == len(plan.ids):
            return base if plan.turns == base.turns else replace(base, turns=plan.turns, template=plan.template)
        self._shelf.send(base)
        self._check_room(len(plan.ids) + 1)
        self._vllm.complete(Ask(plan.ids, _ONE, tail=True))
        return self._shelf.context(plan, len(plan.ids))

    def prefill_steps(self, prompt: Prompt, *, context: Context | None = None) -> Iterator[Context]:
        """As `prefill`: first the context as it was, with the ids that are to be computed, then the whole. vLLM does
        not say how far it is in between.
        """
        base, _, _ = self._admit(context, "exact")
        plan = self._renderer.extend(base, prompt, template={}, reply=False)
        kept = base[: plan.reuse] if base is not None and plan.reuse else Context("kv", self.identity)
        yield replace(kept, tokens=plan.ids, turns=plan.turns, template=plan.template)
        yield self.prefill(prompt, context=context)

    def think(self, prompt: Prompt, *, steps: int = 20, context: Context | None = None) -> Context:
        """Refused: vLLM gives no hidden states after a step.

        Raises:
            UsageError: always, if `steps` is not 0.
        """
        if steps == 0:
            return self.prefill(prompt, context=context)
        raise UsageError(
            "vLLM cannot think in latent steps: a step feeds the last hidden state back as the next input, and vLLM "
            "samples a token after every step and gives no hidden state to others. "
            "Fix: think with HuggingFaceConnector or LlamaCppConnector of the same weights."
        )

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

        Raises:
            as `HuggingFaceConnector.generate`; ConnectionFailed: vLLM cannot be reached.
        """
        refuse_source(source)
        sampling = Sampling.of(max_new_tokens, min_new_tokens, temperature, top_p, stop, seed)
        plan, ask, mode = self._plan(prompt, context, sampling, template_of(tools, chat_template_kwargs), accept)
        return self._finish(plan, ask, mode, complete(self._vllm, ask))

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
    ) -> VLLMStream:
        """As `generate`, piece by piece: iterate over the stream, then take its `result`. Closing it ends the run."""
        refuse_source(source)
        sampling = Sampling.of(max_new_tokens, min_new_tokens, temperature, top_p, stop, seed)
        plan, ask, mode = self._plan(prompt, context, sampling, template_of(tools, chat_template_kwargs), accept)
        return VLLMStream(self._vllm, ask, partial(self._finish, plan, ask, mode))

    def vocabulary(self) -> tuple[str, ...]:
        """The tokens as the tokenizer spells them, by id; an id without a token is ""."""
        return vocabulary(self.tokenizer)

    def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids that `prefill(prompt)` would compute; computes nothing."""
        return self._renderer.extend(None, prompt, template={}, reply=False).ids

    def close(self) -> None:
        """Let go of the engine, or of the connection to it, and of the store."""
        self._vllm.close()
        self._shelf.store.close()

    # --- one run

    def _plan(
        self,
        prompt: Prompt,
        context: Context | None,
        sampling: Sampling,
        template: Mapping[str, object],
        accept: str,
    ) -> tuple[Plan, Ask, str]:
        """What is to be computed, what vLLM is asked, and the mode; the context's KV is in the store then."""
        base, mode, fallback = self._admit(context, accept)
        plan = with_work(self._renderer.extend(base, prompt, template=template, reply=True))
        plan = replace(plan, reasons=(*fallback, *plan.reasons))
        room = self.max_positions - len(plan.ids)
        if room < sampling.max_new_tokens:
            self._check_room(len(plan.ids) + 1)
            cut = f"max_new_tokens cut to {room}: the engine has {self.max_positions} positions"
            plan = replace(plan, reasons=(*plan.reasons, cut))
            sampling = replace(sampling, max_new_tokens=room)
        if mode == "kv":
            self._shelf.send(base)
        return plan, Ask(plan.ids, sampling), mode

    def _finish(self, plan: Plan, ask: Ask, mode: str, run: Run) -> Generation:
        """The generation out of what vLLM said."""
        answer, seconds = run.answer, run.seconds()
        text = str(
            self.tokenizer.decode(list(answer.ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
        ids = plan.ids + answer.ids
        after = replace(plan, ids=ids, turns=with_reply(plan, text, len(ids)))
        result = self._shelf.context(after, len(ids) - 1, only_full=True)
        cached, computed, reasons = run.counts(len(plan.ids), plan.reuse if mode == "kv" else 0)
        if mode == "kv" and not cached:
            mode = "tokens"
        exact = worst([result.exactness, run.exactness]) if mode == "kv" else Exactness.TEXT
        receipt = Receipt(
            mode,
            exact,
            bytes_reused=self.identity.layout.bytes_per_token(self.dtype) * (cached if mode == "kv" else 0),
            tokens_reused=cached if mode == "kv" else 0,
            positions_computed=computed,
            seconds=MappingProxyType(seconds),
            reasons=(*plan.reasons, *reasons),
        )
        ending = {"length": "length"}.get(
            answer.ended, "stop" if any(each in text for each in ask.sampling.stop) else "eos"
        )
        usage = Usage(len(plan.ids), len(answer.ids), cached)
        return Generation(text, tokens=answer.ids, context=result, usage=usage, receipt=receipt, finish_reason=ending)

    # --- what a context, and an engine, must be

    def _admit(self, context: Context | None, accept: str) -> tuple[Context | None, str, tuple[str, ...]]:
        """As `admit`; vLLM reads token ids only, so that latent positions are left to those who accept text."""
        base, mode, reasons = admit(context, self.identity, accept=accept)
        if base is None or LATENT not in base.tokens:
            return base, mode, reasons
        why = "vLLM loads KV by token ids, and the context has latent positions, which have none"
        if Exactness.parse(accept) is not Exactness.TEXT:
            raise UsageError(f'{why}. Fix: go on with another engine, or from its text with accept="text".')
        turns = tuple(Turn(turn.message) for turn in base.turns if turn.content)
        return Context("text", turns=turns, template=base.template, exactness=Exactness.TEXT), "text", (*reasons, why)

    def _check_room(self, need: int) -> None:
        if need > self.max_positions:
            raise ContextTooLong(
                f"{need} positions are needed and the engine has {self.max_positions}. Nothing was computed. "
                "Fix: shorten the prompt, start from a shorter context, ask for fewer tokens, or raise --max-model-len."
            )

    def _greet(self, tenant: Tenant) -> str:
        """The dtype of the engine's cache, once it is seen to be of these weights and this tenant."""
        report = self._vllm.complete(Ask((0,), _ONE)).report
        if not report:
            raise UsageError(
                "this vLLM runs without AVP's plug-in, or has switched it off (its log says why). "
                "Fix: start it with the --kv-transfer-config of docs/guides/vllm.md."
            )
        if report.get("weights") != self.identity.weights:
            raise IdentityMismatch(
                f"the engine runs weights {str(report.get('weights'))[:8]}… and the checkpoint here is "
                f"{self.identity.describe()}. Fix: pass the checkpoint that vLLM serves."
            )
        if report.get("root") != root_page(self.identity, salt=tenant.salt):
            raise UsageError(
                "the engine keeps its pages for another tenant or secret, or under another cache layout. "
                "Fix: pass tenant and secret as in its kv_connector_extra_config."
            )
        return str(report.get("dtype"))


def _folder(name: str | Path) -> Path:
    """The folder of a checkpoint that is on this machine.

    Raises:
        ModelNotFound: it is not.
    """
    found = loading.resolve(name)
    folder = found if isinstance(found, Path) else loading.hub_folder(found)
    if folder is None:
        raise ModelNotFound(f"no checkpoint {str(name)!r} is on this machine. Fix: pass the folder that vLLM serves.")
    return folder
