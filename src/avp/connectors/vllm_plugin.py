"""AVPKVConnector: the plug-in inside vLLM, which loads and saves KV by token prefix from and to a store of AVP.

vLLM makes one in its scheduler and one in its worker; `vllm_scheduler` and `vllm_worker` are what they do. Here is only
the border: vLLM's objects on one side, ours on the other. No hook raises while requests are served: what fails is
logged, and vLLM computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.forward_context import ForwardContext
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionMetadata
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from avp.connectors import loading
from avp.connectors.vllm_identity import checkpoint_identity
from avp.connectors.vllm_jobs import Jobs, PluginSettings, Report
from avp.connectors.vllm_pages import DTYPES, LAYOUTS, Pages, find_layout
from avp.connectors.vllm_scheduler import Scheduled, SchedulerSide
from avp.connectors.vllm_worker import WorkerSide
from avp.errors import AVPError, UnsupportedCache, UsageError
from avp.identity import ModelIdentity
from avp.segment import PAGE
from avp.stores import open_store

logger = logging.getLogger("vllm.avp")
Params = ParamSpec("Params")
Result = TypeVar("Result")


def _guarded(
    otherwise: Callable[[], Result],
) -> Callable[[Callable[Params, Result]], Callable[Params, Result]]:
    """A hook that logs and answers `otherwise()` where it would raise."""

    def guard(hook: Callable[Params, Result]) -> Callable[Params, Result]:
        @wraps(hook)
        def guarded(*args: Params.args, **kwargs: Params.kwargs) -> Result:
            try:
                return hook(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the engine serves on without us
                logger.warning("AVP left out one step of its work (%s): %s", hook.__name__, error)
                return otherwise()

        return guarded

    return guard


def _nothing() -> None:
    return None


def _not_found() -> tuple[int | None, bool]:
    return 0, False


def _no_handle() -> tuple[bool, dict[str, object] | None]:
    return False, None


def _none_ended() -> tuple[set[str] | None, set[str] | None]:
    return None, None


def _nobody() -> list[Scheduled]:
    return []


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """The jobs of a step, from scheduler to worker."""

    jobs: Jobs


@dataclass
class WorkerNews(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What became of jobs, from worker to scheduler."""

    report: Report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both."""
        return WorkerNews(self.report | other.report) if isinstance(other, WorkerNews) else self


class AVPKVConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Loads and saves KV between vLLM's paged cache and a store; see docs/guides/vllm.md for its settings."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Raises UsageError for settings that are wrong; a model or cache that AVP does not carry switches it off."""
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        settings = PluginSettings.of(transfer.kv_connector_extra_config)
        if transfer.kv_load_failure_policy != "recompute":
            raise UsageError(
                'kv_load_failure_policy is "fail": a damaged segment would fail its request. '
                'Fix: set "kv_load_failure_policy": "recompute" in --kv-transfer-config.'
            )
        self._scheduler_side: SchedulerSide | None = None
        self._worker_side: WorkerSide | None = None
        self._caches: Mapping[str, torch.Tensor] = {}
        try:
            _check(vllm_config, kv_cache_config)
            dtype = DTYPES[vllm_config.model_config.dtype]
            identity = _identity(settings.checkpoint or vllm_config.model_config.model)
            store = open_store(settings.store)
        except UsageError:
            raise
        except AVPError as error:
            logger.warning("AVP is off, vLLM serves without it: %s", error)
            return
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler_side = SchedulerSide(settings, identity, dtype, store)
            logger.info("AVP is on: %s in %s, store %s", identity.describe(), dtype, settings.store.partition(":")[0])
        else:
            self._worker_side = WorkerSide(settings, identity, store, lambda: self._pages(identity))

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is lost is computed again."""
        return False

    # --- in the scheduler

    @_guarded(_not_found)
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many positions the store can give after those that vLLM has; they are loaded between steps."""
        found = self._scheduler_side.find(request, num_computed_tokens) if self._scheduler_side else 0
        return found, found > 0

    @_guarded(_nothing)
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Plan the load into the blocks that were set aside."""
        if self._scheduler_side is not None and num_external_tokens:
            self._scheduler_side.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    @_guarded(lambda: StepMetadata(Jobs()))
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The jobs of this step."""
        if self._scheduler_side is None:
            return StepMetadata(Jobs())
        return StepMetadata(self._scheduler_side.step(_scheduled(scheduler_output)))

    @_guarded(_nothing)
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Hear what became of earlier jobs."""
        news = connector_output.kv_connector_worker_meta
        if self._scheduler_side is not None and isinstance(news, WorkerNews):
            self._scheduler_side.learn(news.report)

    @_guarded(_no_handle)
    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, object] | None]:
        """The handle of what was computed, and what was loaded, for the answer. The blocks may go at once."""
        del block_ids
        return False, self._scheduler_side.finished(request) if self._scheduler_side else None

    # --- in the worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Keep vLLM's paged cache of each layer."""
        self._caches = kv_caches

    @_guarded(_nothing)
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: object) -> None:
        """Begin the loads of this step, in the background."""
        del forward_context, kwargs
        if self._worker_side is not None:
            self._worker_side.start(self._jobs())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no request is computed before its load has ended."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: object
    ) -> None:
        """Nothing: all layers are copied together, after the step."""

    @_guarded(_nothing)
    def wait_for_save(self) -> None:
        """Copy what is to be saved of this step."""
        if self._worker_side is not None:
            self._worker_side.save(self._jobs())

    @_guarded(_none_ended)
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The requests whose loads have ended."""
        del finished_req_ids
        return None, self._worker_side.loaded() if self._worker_side else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that vLLM is to compute after all."""
        return self._worker_side.failed_blocks() if self._worker_side else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What became of earlier jobs."""
        report = self._worker_side.report() if self._worker_side else Report()
        return WorkerNews(report) if report else None

    @_guarded(_nothing)
    def shutdown(self) -> None:
        """Finish what is being saved."""
        if self._worker_side is not None:
            self._worker_side.close()
        if self._scheduler_side is not None:
            self._scheduler_side.close()

    def _jobs(self) -> Jobs:
        metadata = self._connector_metadata
        return metadata.jobs if isinstance(metadata, StepMetadata) else Jobs()

    def _pages(self, identity: ModelIdentity) -> Pages:
        """The paged cache, in the layout in which its attention layer writes."""
        layers = self._vllm_config.compilation_config.static_forward_context
        names = sorted(self._caches, key=extract_layer_index)
        layer = layers[names[0]]

        def write(key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
            layer.impl.do_kv_cache_update(layer, key, value, pages, slots)

        caches = [self._caches[name] for name in names]
        return Pages.of(caches, identity.layout, LAYOUTS[find_layout(caches[0], write)])


@_guarded(_nobody)
def _scheduled(output: SchedulerOutput) -> list[Scheduled]:
    """The requests of a step."""
    cached = output.scheduled_cached_reqs
    before = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    before.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    state = output.kv_connector_block_state
    return [
        Scheduled(request, before[request], count, partial(_first_group, state, request))
        for request, count in output.num_scheduled_tokens.items()
    ]


def _first_group(state: KVConnectorBlockState, request: str) -> list[int]:
    """The blocks of a request; there is one group of layers."""
    groups: tuple[list[int], ...] = state.get_block_ids(request)
    return groups[0]


def _check(config: VllmConfig, caches: KVCacheConfig) -> None:
    """Whether segments of this engine would be what their name says.

    Raises:
        UnsupportedCache: they would not.
    """
    problems = {
        "block_size is not 32, the page of AVP (--block-size 32)": config.cache_config.block_size != PAGE,
        "the model has groups of layers with caches of their own; a segment carries all positions of all layers "
        "(leave the hybrid KV cache manager off)": len(caches.kv_cache_groups) != 1,
        "several workers share the model, and a segment carries all heads and layers": config.parallel_config.world_size
        > 1,
        "the cache is quantised (--kv-cache-dtype auto)": config.cache_config.cache_dtype != "auto",
        "the weights are quantised, so that their fingerprint is not that of the checkpoint's values": bool(
            config.model_config.quantization
        ),
        "the checkpoint's config is overridden (hf_overrides), and so may be its rotary positions": bool(
            config.model_config.hf_overrides
        ),
        "a draft model is in use (speculative decoding)": config.speculative_config is not None,
        "the model computes in a dtype that AVP does not carry": config.model_config.dtype not in DTYPES,
    }
    found = [problem for problem, holds in problems.items() if holds]
    if found:
        raise UnsupportedCache(f"{'; '.join(found)}. Fix: change that, or serve without AVP's plug-in.")


@cache
def _identity(name: str) -> ModelIdentity:
    """The identity of the checkpoint that vLLM loaded: a folder, or a hub id that it has downloaded."""
    folder = Path(name) if Path(name).is_dir() else loading.hub_folder(name)
    if folder is None:
        raise UnsupportedCache(
            f"the files of {name} are not found. Fix: give their folder as checkpoint in kv_connector_extra_config."
        )
    return checkpoint_identity(folder, name=name)
