"""vLLM as the benchmark of engines reads it; runs in vLLM's environment.

A logits processor writes down the raw logits of every step, and chooses the next token where it is given. So what is
judged is how vLLM decodes: a prompt whose KV is loaded or computed, then one position after the other.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from avp.bench.engines_task import Floats
from avp.connectors.vllm import VLLMConnector
from avp.connectors.vllm_engine import Answer, Ask
from avp.connectors.vllm_jobs import FIELD
from avp.context import Context
from avp.delta import store_new
from avp.errors import AVPError
from avp.protocols import Store
from avp.security import Tenant
from avp.stores import open_store

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CONFIGURE_LOGGING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # as many threads as OMP_NUM_THREADS says, wherever there is room
    OMP_WAIT_POLICY="passive",
)

from vllm.config import KVTransferConfig, VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from vllm import LLM, SamplingParams

if TYPE_CHECKING:
    from avp.bench.engines_read import Judged

_LONGEST = 512  # positions of a sequence
Followed: TypeAlias = "tuple[Path, list[int], list[int]]"  # where to, the tokens to choose, those chosen so far


class Tap(LogitsProcessor):  # type: ignore[misc]
    """Rows of raw logits into files; what comes next is what `extra_args["tap"]` says."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._followed: dict[int, Followed] = {}

    def is_argmax_invariant(self) -> bool:
        """It is not: it chooses."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Which row of the batch is which request."""
        process_dict_updates(self._followed, batch_update, _followed)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """A prompt that is computed in parts comes by once for each part: the last one counts."""
        for row, (path, chosen, so_far) in self._followed.items():
            step = len(so_far)
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.seek(step * logits.shape[1] * 4)
                file.write(logits[row].numpy().tobytes())
            logits[row] = -torch.inf
            logits[row, chosen[step]] = 0.0
        return logits


def _followed(params: SamplingParams, prompt: list[int] | None, so_far: list[int]) -> Followed | None:
    tap = (params.extra_args or {}).get("tap")
    return (Path(tap["file"]), tap["ids"], so_far) if tap else None


class _Engine:
    """vLLM's engine, as the connector asks it."""

    max_positions = _LONGEST

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def complete(self, ask: Ask) -> Answer:
        """One call."""
        sampling = SamplingParams(**ask.to_json(), extra_args={"kv_transfer_params": ask.params})
        done = self.llm.generate([{"prompt_token_ids": list(ask.ids)}], sampling, use_tqdm=False)[0]
        said, report = done.outputs[0], (done.kv_transfer_params or {}).get(FIELD, {})
        return Answer(said.text, tuple(said.token_ids), said.finish_reason or "", report, done.num_cached_tokens)

    def stream(self, ask: Ask) -> Generator[Answer, None, None]:
        """All of it at once."""
        yield self.complete(ask)

    def close(self) -> None:
        """End the engine."""
        self.llm.llm_engine.engine_core.shutdown()


@dataclass(frozen=True, slots=True)
class VLLMReader:
    """See `avp.bench.engines_read.Reader`. A context goes to the engine through the store."""

    connector: VLLMConnector
    llm: LLM
    store: Store
    loads: list[int]  # positions that were loaded, by request
    drafted: bool = False

    def own(self, context: Context) -> Context:
        """Its ids: the engine computes them itself, within the run."""
        return replace(context, kind="tokens", length=0, segments=())

    def logits(self, items: Sequence[Judged], folder: Path) -> Iterable[Floats]:
        """All items at once: prompt and first id, then the rest one by one."""
        self._offer([context for context, _ in items])
        prompts, how = [], []
        for number, (context, ids) in enumerate(items):
            prompts.append({"prompt_token_ids": [*context.tokens, ids[0]]})
            tap = {"file": str(folder / f"{number}.f32"), "ids": [*ids[1:], 0]}
            extra = {"tap": tap, "kv_transfer_params": {FIELD: {}}}
            how.append(SamplingParams(temperature=0.0, max_tokens=len(ids), ignore_eos=True, extra_args=extra))
        self._run(prompts, how)
        for number, (_, ids) in enumerate(items):
            rows = np.memmap(folder / f"{number}.f32", np.float32, "r").reshape(len(ids), -1)
            yield rows

    def greedy(self, items: Sequence[Judged], *, count: int, drafts: Sequence[Sequence[int]]) -> list[list[int]]:
        """All items at once, by vLLM's own sampler; drafts are of no use."""
        self._offer([context for context, _ in items])
        extra: dict[str, object] = {"kv_transfer_params": {FIELD: {}}}
        how = SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count, extra_args=extra)
        prompts = [{"prompt_token_ids": [*context.tokens, *ids]} for context, ids in items]
        return self._run(prompts, [how] * len(prompts))

    def plain(self, item: Judged, *, count: int) -> list[int]:
        """One alone."""
        return self.greedy([item], count=count, drafts=())[0]

    def _offer(self, contexts: Sequence[Context]) -> None:
        """Let the engine know nothing but these; its own pages of the same ids would be taken first."""
        for entry in list(self.store.entries()):
            self.store.remove(entry.page, tenant=entry.tenant)
        self.llm.reset_prefix_cache()
        for context in contexts:
            store_new(self.store, context, Tenant())

    def _run(self, prompts: list[dict[str, list[int]]], how: list[SamplingParams]) -> list[list[int]]:
        done = self.llm.generate(prompts, how, use_tqdm=False)
        self.loads[:] = [int((each.kv_transfer_params or {}).get(FIELD, {}).get("loaded", 0)) for each in done]
        return [list(each.outputs[0].token_ids) for each in done]


def vllm_reader(model: str, folder: Path) -> VLLMReader:
    """vLLM in float32 on the checkpoint in `model`, with AVP's plug-in and a store in `folder`.

    Raises:
        AVPError: the engine does not run the plug-in.
    """
    url = f"disk:{folder}/vllm-store"
    store = open_store(url)
    transfer = KVTransferConfig(
        kv_connector="AVPKVConnector",
        kv_connector_module_path="avp.connectors.vllm_plugin",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"store": url, "accept": "bounded", "save": "prompt", "checkpoint": model},
    )
    llm = LLM(
        model=model,
        dtype="float32",
        block_size=32,
        max_model_len=_LONGEST,
        enforce_eager=True,
        async_scheduling=False,
        logits_processors=[Tap],
        kv_transfer_config=transfer,
    )
    try:
        connector = VLLMConnector(_Engine(llm), Path(model), name="smollm2", store=store, tenant=Tenant())
    except AVPError:
        llm.llm_engine.engine_core.shutdown()
        raise
    return VLLMReader(connector, llm, store, [])
