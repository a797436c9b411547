"""Runs in vLLM's environment: an offline engine that carries out one JSON line after another. Answers begin with @."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    OMP_WAIT_POLICY="passive",
)


def say(value: object) -> None:
    print("@" + json.dumps(value), flush=True)


def contract() -> dict[str, object]:
    """vLLM's abstract methods, and how ours are called."""
    import inspect

    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    from avp.connectors.vllm_plugin import AVPKVConnector

    ours = [name for name, value in vars(AVPKVConnector).items() if callable(value) and not name.startswith("_")]
    return {
        "abstract": sorted(KVConnectorBase_V1.__abstractmethods__),
        "left": sorted(AVPKVConnector.__abstractmethods__),
        "unknown": sorted(name for name in ours if not hasattr(KVConnectorBase_V1, name)),
        "parameters": {
            name: [
                [(p.name, str(p.kind)) for p in inspect.signature(getattr(kind, name)).parameters.values()]
                for kind in (AVPKVConnector, KVConnectorBase_V1)
            ]
            for name in ours
        },
    }


def switched(model: str, folder: str) -> dict[str, object]:
    """What the plug-in makes of configurations of vLLM: whether it is on, or how it refuses to start."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from avp.connectors.vllm_plugin import AVPKVConnector
    from avp.errors import AVPError

    def of(policy: str = "recompute", groups: int = 1, store: str = "disk:", **more: object) -> object:
        transfer = KVTransferConfig(
            kv_connector="AVPKVConnector",
            kv_connector_module_path="avp.connectors.vllm_plugin",
            kv_role="kv_both",
            kv_load_failure_policy=policy,
            kv_connector_extra_config={"store": store},
        )
        arguments = {"model": model, "dtype": "float32", "block_size": 32, "kv_transfer_config": transfer, **more}
        config = EngineArgs(**arguments).create_engine_config()
        caches = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[None] * groups)
        try:
            made = AVPKVConnector(config, KVConnectorRole.SCHEDULER, caches)
        except AVPError as error:
            return f"{type(error).__name__}: {error}"
        return made._scheduler_side is not None

    disk = f"disk:{folder}/store"
    return {
        "as it should be": of(store=disk),
        "blocks of 64": of(store=disk, block_size=64),
        "two groups": of(store=disk, groups=2),
        "overrides": of(store=disk, hf_overrides={"rope_theta": 1.0}),
        "a store that cannot be": of(store="disk:/dev/null/store"),
        "policy fail": of(store=disk, policy="fail"),
        "memory": of(store="memory:"),
    }


def connected(model: str, folder: str) -> dict[str, object]:
    """`VLLMConnector.offline`: a context, a continuation, and the same as a stream."""
    import avp

    connector = avp.VLLMConnector.offline(model, store=f"disk:{folder}/store", tenant="red", max_positions=512)
    context = connector.prefill(list(range(1000, 1100)))
    said = connector.generate([5, 6], context=context, max_new_tokens=4)
    with connector.stream([5, 6], context=context, max_new_tokens=4) as stream:
        pieces = list(stream)
    connector.close()
    return {
        "positions": len(context),
        "mode": said.receipt.mode,
        "exactness": said.receipt.exactness.label,
        "reused": said.receipt.tokens_reused,
        "computed": said.receipt.positions_computed,
        "same": stream.result.tokens == said.tokens,
        "pieces": len(pieces),
    }


class Engine:
    def __init__(self, model: str, extra: dict[str, str] | None, longest: int) -> None:
        from vllm.config import KVTransferConfig

        from vllm import LLM

        transfer = None
        if extra is not None:
            transfer = KVTransferConfig(
                kv_connector="AVPKVConnector",
                kv_connector_module_path="avp.connectors.vllm_plugin",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=extra,
            )
        self.llm = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_model_len=longest,
            kv_transfer_config=transfer,
            disable_log_stats=False,
        )
        self.sides: tuple[object, object] | tuple[()] = ()
        self.hooked = 0.0  # seconds within the plug-in's hooks
        if transfer is not None:
            self._clock_hooks()

    def _connectors(self) -> tuple[Any, Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return self.llm.llm_engine.engine_core.engine_core.scheduler.connector, get_kv_transfer_group()

    def _clock_hooks(self) -> None:
        def clocked(hook: Callable[..., object]) -> Callable[..., object]:
            def run(*args: object, **kwargs: object) -> object:
                started = time.perf_counter()
                try:
                    return hook(*args, **kwargs)
                finally:
                    self.hooked += time.perf_counter() - started

            return run

        for connector in self._connectors():
            for name, value in vars(type(connector)).items():
                if callable(value) and not name.startswith("_"):
                    setattr(connector, name, clocked(getattr(connector, name)))

    def generate(
        self, prompts: list[dict[str, object]], count: int, params: dict[str, object] | None
    ) -> list[dict[str, object]]:
        from vllm import SamplingParams

        given = {"kv_transfer_params": {"avp": params}} if params is not None else None
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, extra_args=given)
        self.hooked, started = 0.0, time.perf_counter()
        done = self.llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        return [
            {
                "ids": list(each.outputs[0].token_ids),
                "cached": each.num_cached_tokens,
                "ttft": each.metrics.first_token_latency,
                "seconds": seconds,
                "hooked": self.hooked,
                "avp": (each.kv_transfer_params or {}).get("avp"),
            }
            for each in done
        ]

    def hits(self) -> int:
        found = [metric.value for metric in self.llm.get_metrics() if metric.name == "vllm:external_prefix_cache_hits"]
        return int(sum(found))

    def plug(self, sides: bool) -> bool:
        """Put the plug-in's two sides in, or out: without them its hooks return at once."""
        scheduler, worker = self._connectors()
        if not self.sides:
            self.sides = (scheduler._scheduler_side, worker._worker_side)
        scheduler._scheduler_side, worker._worker_side = self.sides if sides else (None, None)
        return sides

    def reset(self) -> bool:
        """Forget vLLM's own prefix cache."""
        return bool(self.llm.reset_prefix_cache())


def main() -> None:
    first = json.loads(sys.stdin.readline())
    if first.get("contract"):
        say(contract())
        return
    if first.get("switched"):
        say(switched(first["model"], first["switched"]))
        return
    if first.get("connected"):
        say(connected(first["model"], first["connected"]))
        return
    engine = Engine(first["model"], first["extra"], first["longest"])
    say("ready")
    for line in sys.stdin:
        call = json.loads(line)
        if call["do"] == "generate":
            say(engine.generate(call["prompts"], call["count"], call["params"]))
        elif call["do"] == "hits":
            say(engine.hits())
        elif call["do"] == "plug":
            say(engine.plug(call["sides"]))
        elif call["do"] == "reset":
            say(engine.reset())
    engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
