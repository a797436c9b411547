"""The plug-in's two sides over paged caches of our own, driven as vLLM drives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from time import monotonic

import numpy as np
import torch

from avp.buffers import Buffer
from avp.connectors.vllm_jobs import PluginSettings
from avp.connectors.vllm_pages import LAYOUTS, Pages
from avp.connectors.vllm_scheduler import Scheduled, SchedulerSide
from avp.connectors.vllm_worker import WorkerSide
from avp.identity import CacheLayout, LayerLayout, ModelIdentity
from avp.stores import open_store

MODEL = ModelIdentity("tiny", "llama", "ab" * 32, "cd" * 32, CacheLayout((LayerLayout(2, 8),) * 3))
NUMBERS = count()


@dataclass
class Request:
    """As much of vLLM's request as the plug-in reads."""

    all_token_ids: list[int]
    kv_transfer_params: dict[str, object] | None = None
    cache_salt: str | None = None
    lora_request: object | None = None
    mm_features: Sequence[object] = ()
    prompt_embeds: object | None = None
    request_id: str = field(default_factory=lambda: f"r{next(NUMBERS)}")

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.all_token_ids)


def prompt(length: int, seed: int = 0) -> list[int]:
    return Random(seed).choices(range(1000), k=length)


def kv(tokens: Sequence[int], layer: int, part: int) -> np.ndarray:
    """KV that follows from the ids before each position, as a model's does; [heads, tokens, dim]."""
    state = np.cumsum(np.asarray(tokens, np.float64)) % 977
    scale = np.arange(1, 17).reshape(2, 1, 8) * (1 + layer) + part
    return (state[None, :, None] * scale).astype(np.float32)


class Node:
    """A vLLM: both sides, and a cache that `compute` fills."""

    def __init__(self, store: str, *, ahead: int = 2**30, clock: Callable[[], float] = monotonic, **extra: str) -> None:
        self.settings = PluginSettings.of({"store": store, **extra})
        caches = [torch.zeros(200, 2, 32, 16) for _ in MODEL.layout.layers]
        self.pages = Pages.of(caches, MODEL.layout, LAYOUTS["transposed"])
        self.scheduler = SchedulerSide(self.settings, MODEL, "float32", open_store(store), clock=clock)
        self.worker = WorkerSide(self.settings, MODEL, open_store(store), lambda: self.pages, ahead=ahead)
        self.next_block = 0

    def close(self) -> None:
        self.worker.close()
        self.scheduler.close()

    def serve(self, request: Request, *, local: int = 0, new: int = 0) -> dict[str, object]:
        """A request from its look-up to its end, `new` tokens decoded; what the answer says."""
        blocks = list(range(self.next_block, self.next_block + -(-(len(request.all_token_ids) + new) // 32)))
        self.next_block += len(blocks)
        found = self.scheduler.find(request, local)
        self._fill(request, blocks, 0, local)
        self.scheduler.allocated(request, blocks, found)
        cached = local + found
        if found:
            cached = self._load(request, blocks, cached)
        if not cached:
            assert self.scheduler.find(request, 0) == 0  # vLLM asks again where nothing of a load is left
        self._step(request, blocks, cached, len(request.all_token_ids) - cached)
        for token in prompt(new, seed=9):
            request.all_token_ids.append(token)
            self._step(request, blocks, len(request.all_token_ids) - 1, 1)
        said = self.scheduler.finished(request)
        assert said is not None
        self._learn()
        found_says = said["avp"]
        assert isinstance(found_says, dict)
        return found_says

    def _load(self, request: Request, blocks: list[int], cached: int) -> int:
        self.worker.start(self.scheduler.step([]))
        while request.request_id not in self.worker.loaded():
            pass
        failed = self.worker.failed_blocks()
        self._learn()
        return min([cached, *(blocks.index(block) * 32 for block in failed)])

    def _step(self, request: Request, blocks: list[int], before: int, count: int) -> None:
        jobs = self.scheduler.step([Scheduled(request.request_id, before, count, lambda: blocks)])
        self.worker.start(jobs)
        self._fill(request, blocks, before, before + count)
        self.worker.save(jobs)
        self._learn()

    def _fill(self, request: Request, blocks: list[int], start: int, stop: int) -> None:
        for layer in range(len(MODEL.layout.layers)):
            for part, name in enumerate("kv"):
                rows = kv(request.all_token_ids[:stop], layer, part)
                held = self.pages.read(blocks, len(blocks) * 32)[layer][part].array.copy()
                held[:, start:stop] = rows[:, start:stop]
                self.pages.write(layer, name, blocks, Buffer("float32", held))

    def _learn(self) -> None:
        self.scheduler.learn(self.worker.report())

    def holds(self, request: Request, stop: int) -> bool:
        """Whether the last request's blocks hold its KV, up to a position."""
        blocks = range(self.next_block - -(-len(request.all_token_ids) // 32), self.next_block)
        found = self.pages.read(list(blocks), stop)
        return all(
            np.array_equal(found[layer][part].array, kv(request.all_token_ids[:stop], layer, part))
            for layer in range(len(MODEL.layout.layers))
            for part in (0, 1)
        )


def segments(store: Path) -> list[Path]:
    return sorted((store / "segments").glob("*/*.avp"))
